"""From the words a user types to checked settings, and the hash that proves two sides hold the same."""

from __future__ import annotations

import copy
import dataclasses
from enum import Enum

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from conf.compose import (
    METHODS,
    NOT_HASHED,
    PARTITIONS,
    STRATEGIES,
    expand_sweep,
    load_config,
    load_saved,
    quoted,
    settings_hash,
    swept_keys,
    to_dict,
    to_yaml,
)
from conf.methods import FcMoeConfig, RetentionKind, SftConfig
from conf.partitions import Dirichlet
from conf.schema import Logger, OptimizerState, Template
from strategies.conflicts import Space
from strategies.fc_moe import FcMoe

METHOD_OF = dict.fromkeys(
    (
        "fedavg",
        "fedprox",
        "fedavgm",
        "fedadam",
        "fedadagrad",
        "fedyogi",
        "fedmoe",
        "fc_moe_plus",
        "clair",
        "centralised",
    ),
    "sft",
)
METHOD_OF |= {name: name for name in ("scaffold", "fedalign_moe", "pfl_moe", "fc_moe", "firm", "flex", "local_only")}
METHOD_OF |= {"fedcmoo": "firm"}


@pytest.fixture(scope="module")
def fc_moe():
    return load_config("strategy=fc_moe partition=dirichlet partition.alpha=0.1 rounds=5")


def test_settings_loaded_twice_are_two_configs():
    first = load_config("seed=3")
    first.train.batch_size, first.seed = 1, 4
    assert load_config("seed=3").train.batch_size != 1
    assert load_config("seed=3").seed == 3


def test_command_of_the_readme_composes(fc_moe):
    assert isinstance(fc_moe.strategy, FcMoe)
    assert isinstance(fc_moe.method, FcMoeConfig)
    assert isinstance(fc_moe.partition, Dirichlet)
    assert (fc_moe.partition.alpha, fc_moe.rounds) == (0.1, 5)


def test_words_and_one_string_compose_the_same(fc_moe):
    words = ["strategy=fc_moe", "partition=dirichlet", "partition.alpha=0.1", "rounds=5"]
    assert load_config(words[::-1]) == fc_moe


def test_every_setting_that_scripts_rely_on_can_be_set():
    config = load_config(
        "strategy=fc_moe method=fc_moe model=tiny_moe rounds=2 seed=7 data.path=/some/file.parquet "
        "data.prompt_column=q data.context_column=c data.response_column=a partition=shard partition.column=topic "
        "partition.num_sites=6 train.max_steps=3 train.learning_rate=1e-4 train.batch_size=2 lora.rank=4 lora.alpha=8 "
        "eval.every=2 federation=remote federation.superlink=host:8000 federation.min_sites=3 federation.fraction=0.5 "
        "output=/tmp/run data.split_column=split data.filter.topic=[a,b] data.max_length=64 eval.max_examples=5 "
        "train.num_threads=2 train.optimizer_state=keep model.experts=full logger=tensorboard "
        "method.retention.kind=orthogonal method.retention.strength=0.25 method.retention.norm_guard=2 "
        "strategy.importance=uniform strategy.conflict.space=factors strategy.conflict.granularity=expert"
    )
    assert (config.data.prompt_column, config.data.filter) == ("q", {"topic": ["a", "b"]})
    assert (config.lora.rank, config.lora.alpha) == (4, 8.0)
    assert config.train.optimizer_state is OptimizerState.keep
    assert config.logger is Logger.tensorboard
    assert config.method.retention.kind is RetentionKind.orthogonal
    assert config.strategy.conflict.space is Space.factors


def test_context_column_can_be_absent():
    assert load_config("data.context_column=null").data.context_column is None


def test_template_follows_from_the_model_and_not_from_where_the_data_lie(fc_moe):
    """A real site has no data.path, the simulation of the same run has one; both must see the same tokens."""
    assert fc_moe.data.template is Template.plain
    assert load_config("partition=files data.path=sites").data.template is Template.plain
    simulated = load_config("partition=files data.path=sites model=smollm2_moe")
    remote = load_config("partition=files federation=remote model=smollm2_moe")
    assert simulated.data.template is remote.data.template is Template.alpaca
    assert settings_hash(simulated) == settings_hash(remote)
    assert load_config("model=smollm2_moe data.template=chat").data.template is Template.chat


@pytest.mark.parametrize("strategy", [strategy.name for strategy in STRATEGIES])
def test_strategy_chooses_its_client_half(strategy):
    config = load_config([f"strategy={strategy}"])
    assert (config.strategy.name, config.method.name) == (strategy, METHOD_OF[strategy])


def test_registered_classes_have_distinct_names():
    for registered in (STRATEGIES, METHODS, PARTITIONS):
        assert len({choice.name for choice in registered}) == len(registered)


@pytest.mark.parametrize("words", ["strategy=fc_moe method=sft", "method=sft strategy=fc_moe"])
def test_method_on_the_command_line_wins(words):
    assert isinstance(load_config(words).method, SftConfig)


def test_fedprox_is_fedavg_with_a_proximal_term(fc_moe):
    assert fc_moe.train.proximal_mu == 0.0
    assert load_config("strategy=fedprox").train.proximal_mu == 0.01
    assert load_config("train.proximal_mu=0.5 strategy=fedprox").train.proximal_mu == 0.5


def test_experiment_is_a_group_of_settings_that_single_ones_override():
    config = load_config("experiment=smoke rounds=3")
    assert (config.rounds, config.train.max_steps) == (3, 2)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("data.filter.category=open_qa", {"category": "open_qa"}),
        ("data.filter.category=[open_qa,closed_qa]", {"category": ["open_qa", "closed_qa"]}),
        ("data.filter={category:open_qa,level:3}", {"category": "open_qa", "level": 3}),
        ("data.filter.category=open_qa data.filter.level=3", {"category": "open_qa", "level": 3}),
        ("'data.filter.category=creative writing'", {"category": "creative writing"}),
        ("data.filter={}", {}),
    ],
)
def test_filter_takes_any_column(words, expected):
    assert load_config(words).data.filter == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "strategy=nope",
            r"^strategy must be one of centralised, clair, fc_moe, .*flex, local_only, .*got 'nope'$",
        ),
        ("partition=even", r"^partition must be one of dirichlet, files, iid, .*, got 'even'$"),
        ("method=null", r"^method must be a name, got 'null'"),
        ("roundz=3", r"^unknown setting 'roundz'; settings of the run: data, .*rounds, screen, seed"),
        ("train.step=3", r"^unknown setting 'train.step'; settings of train: batch_size, .*max_steps"),
        (
            "partition=natural partition.num_sites=3",
            r"^unknown setting 'partition.num_sites'.* partition=natural: column$",
        ),
        ("partition.alpha=0.1", r"^unknown setting 'partition.alpha'; settings of partition=natural: column$"),
        (
            "strategy.conflict.space=product",
            r"^unknown setting 'strategy.conflict'; settings of strategy=fedavg: expert_step, weights$",
        ),
        ("method.retention.kind=off", r"^unknown setting 'method.retention'; settings of method=sft: none$"),
        ("strategy=fc_moe strategy.name=x", r"^unknown setting 'strategy.name'"),
        ("data.filterx=3", r"^unknown setting 'data.filterx'"),
        ("rounds=three", r"^rounds must be a whole number, got 'three'$"),
        ("rounds=null", r"^rounds must be a whole number, got null$"),
        ("train.micro_batch=2.5", r"^train.micro_batch must be a whole number or text or null, got 2.5$"),
        ("train.max_steps=all", r"^train.max_steps must be a whole number or null, got 'all'$"),
        ("lora.attention=perhaps", r"^lora.attention must be true or false, got 'perhaps'$"),
        ("data.prompt_column=null", r"^data.prompt_column must be text, got null$"),
        ("data.path=[a,b]", r"^data.path must be text or null, got \['a', 'b'\]$"),
        ("train=3", r"^train must be a group of settings, each set by key.setting=value, got 3$"),
        ("model.experts=all", r"^model.experts must be one of lora, full, frozen, got 'all'$"),
        (
            "strategy=fc_moe method.retention.kind=all",
            r"^method.retention.kind must be one of off, paper, .*, got 'all'$",
        ),
        ("strategy=fc_moe strategy.conflict.space=all", r"^strategy.conflict.space must be one of .*, got 'all'$"),
        ("train.batch_size=0", r"^train.batch_size must be >= 1, got 0$"),
        ("strategy=fedadam strategy.learning_rate=-1", r"^strategy.learning_rate must be > 0, got -1.0$"),
        (
            "strategy=fedavg method=local_only",
            r"^strategy=fedavg needs method=dpo, fc_moe, firm, flex, sft, got method=local_only$",
        ),
        ("data.filter=3", r"^data.filter must be \{column: value\}, got '3'$"),
        ("data.filter.topic={a:1}", r"^data.filter.topic must be a value or a list of values, got \{'a': 1\}$"),
        ("rounds", r"^cannot read the setting 'rounds': write it as key=value$"),
        ("=3", r"^cannot read the setting '=3': write it as key=value$"),
        ("+train.steps=3", r"^cannot read the setting '\+train.steps=3': write it as key=value$"),
        ("++train.steps=3", r"^cannot read the setting '\+\+train.steps=3': write it as key=value$"),
        ("~seed", r"^cannot read the setting '~seed': write it as key=value$"),
        ("hydra.run.dir=/tmp", r"^hydra.run.dir=/tmp: .* none of Hydra's own$"),
        ("seed=0,1", r"^seed=0,1 names several values: add -m to sweep over them, or write key=\[a,b\] for a list$"),
        ("output='/tmp/a", r"^cannot read the settings .*: No closing quotation$"),
    ],
)
def test_wrong_setting_is_refused_by_key_value_and_limit(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(words)


def test_sweep_expands_to_every_combination_in_the_order_written():
    assert expand_sweep(["strategy=fedavg,fc_moe", "rounds=3", "seed=0,1"]) == [
        ["strategy=fedavg", "rounds=3", "seed=0"],
        ["strategy=fedavg", "rounds=3", "seed=1"],
        ["strategy=fc_moe", "rounds=3", "seed=0"],
        ["strategy=fc_moe", "rounds=3", "seed=1"],
    ]
    assert swept_keys(["strategy=fedavg,fc_moe", "rounds=3", "seed=0,1"]) == ["strategy", "seed"]


def test_sweep_leaves_lists_and_quoted_commas_whole():
    words = ["data.filter.topic=[a,b]", "output='a,b'"]
    assert expand_sweep(words) == [words]
    assert swept_keys(words) == []


def test_sweep_ranges_are_hydras():
    assert expand_sweep(["seed=range(0,3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]


def test_word_that_is_no_setting_is_refused_before_a_sweep():
    with pytest.raises(ValueError, match="cannot read the setting 'seed'"):
        expand_sweep(["seed"])


def leaves(node, prefix=""):
    """Every setting of a config: its dotted key and the dataclass that holds it."""
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, node, field.name


def another(value):
    """A different value of about the same kind; its range does not matter to a hash."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next(member for member in type(value) if member is not value)
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, dict):
        return {**value, "another": 1}
    return "another" if value is None else f"{value}-another"


PLACES = {
    "data.path", "eval.path", "eval.general_path", "eval.choices.path", "model.wheel_dir", "model.upcycle.text",
    "output", "device",
}  # fmt: skip


def test_settings_hash_changes_with_every_setting_but_places(fc_moe):
    keys = [key for key, _, _ in leaves(fc_moe)]
    assert len(keys) > 60
    assert set(keys) > PLACES
    for key in keys:
        changed = copy.deepcopy(fc_moe)
        holder, name = next((holder, name) for found, holder, name in leaves(changed) if found == key)
        setattr(holder, name, another(getattr(holder, name)))
        is_place = key in PLACES or key.startswith(("federation.", "worker."))
        assert (settings_hash(changed) == settings_hash(fc_moe)) == is_place, key


def test_places_are_the_settings_that_are_not_hashed():
    assert set(NOT_HASHED) == {*PLACES, "federation", "worker"}


def test_settings_hash_tells_choices_with_equal_fields_apart():
    hashes = [
        settings_hash(load_config(words))
        for words in ("strategy=fedavg", "strategy=fedprox train.proximal_mu=0", "strategy=fedadam", "strategy=fedyogi")
    ]
    assert len(set(hashes)) == 4


def test_hashing_leaves_the_config_as_it_is(fc_moe):
    before = copy.deepcopy(fc_moe)
    settings_hash(fc_moe)
    assert fc_moe == before


@pytest.mark.parametrize(
    "words",
    [
        "strategy=fc_moe partition=dirichlet partition.alpha=0.1 data.filter.topic=[a,b] device=cpu output=/tmp/x",
        "strategy=fedadam model=smollm2_moe partition=files data.path=/sites/*.csv federation=remote",
        ["strategy=flex", "method.graft.start=paper", "data.prompt_column='a patient\\'s \"words\"'", "screen=clair"],
        ["partition=iid", "data.filter={a.b:x,c/d:[1,2]}"],
        ["partition=iid", r"data.filter={a kind:x,of\,two \(parts\)\=:'y: z'}"],
        ["strategy=firm", "method.site_preferences={ward 7:[0.2,0.8]}"],
    ],
)
def test_written_settings_read_back_as_the_same_run(words):
    config = load_config(words)
    written = yaml.safe_load(to_yaml(config))
    assert written == to_dict(config)
    again = load_saved(to_yaml(config))
    assert again == config
    assert settings_hash(again) == settings_hash(config)
    assert load_saved(to_yaml(config), ["rounds=17", "seed=4"]) == dataclasses.replace(config, rounds=17, seed=4)


@settings(max_examples=10, deadline=None)
@example(["a\\", "it\\'s", "${seed}", "\\${seed}\\", "${", "1e3", "a,b"])
@example(["0", "\x85"])
@given(st.lists(st.text(st.sampled_from("\\'\"${}a,: \n") | st.characters(codec="utf-8"), min_size=1), min_size=2))
def test_any_text_survives_an_override_and_a_run_folder(texts):
    options = ",".join(quoted(text) for text in texts)
    config = load_config([f"output={quoted(texts[0])}", f"eval.options=[{options}]"])
    assert (config.output, config.eval.options) == (texts[0], texts)
    assert load_saved(to_yaml(config)) == config


@pytest.mark.parametrize("text", ["", "[1]", "strategy: x", "rounds: {", "strategy: {}"])
def test_damaged_settings_of_a_run_are_refused(text):
    with pytest.raises(ValueError, match=r"^damaged settings, or of another version of Bouquet \("):
        load_saved(text)


@pytest.mark.parametrize(("word", "value"), [("3", 3), ("auto", "auto"), ("null", None)])
def test_micro_batch_is_a_number_or_a_word(word, value):
    assert load_config(f"train.micro_batch={word}").train.micro_batch == value
