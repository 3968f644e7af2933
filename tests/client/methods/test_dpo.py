"""DPO at a site: its loss against a loop, the mixture of objectives, and what is measured."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.federation import simulated
from client.methods.dpo import Dpo, margins_of
from client.model import adapted_model
from client.text import Example
from conf.alignment import DpoConfig
from conf.compose import load_config
from conf.model import LoraConfig
from conf.schema import DataConfig, Template
from tests.client.local_training import gradient, noisy, run
from tests.client.tiny_models import save_tiny_base

DATA = DataConfig(template=Template.plain, max_length=40, rejected_column="rejected", objective_column="objective")
EXAMPLES = [
    Example("Name a colour.", "", "red", "a car", "helpful"),
    Example("Name a fruit.", "", "plum", "stone", "helpful"),
    Example("Say hello.", "", "Hello!", "Go away", "harmless"),
    Example("Name a bird.", "", "crow", "shoe", "helpful"),
]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return adapted_model(config, LoraConfig(rank=2), torch.device("cpu"))


@pytest.fixture
def start(adapted):
    return noisy(adapted.initial_adapter(0))


def pairs_of(adapted, config, examples=EXAMPLES):
    return Dpo(config).encode(examples, adapted.tokenizer, DATA)


def log_p(adapted, sequence):
    """Of a response, token by token."""
    logits = adapted.model(input_ids=torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
    first = len(sequence.input_ids) - sequence.num_targets
    places = range(first, len(sequence.input_ids))
    return torch.stack([logits[place - 1, sequence.input_ids[place]] for place in places]).sum()


def test_gradient_is_that_of_the_loss_written_out(adapted, start):
    """Objectives mixed 3 to 1: helpful's mean over its three pairs at 0.75, harmless' one pair at 0.25."""
    config = DpoConfig(objectives=["helpful", "harmless"], preference=[0.75, 0.25], beta=0.3)
    pairs = pairs_of(adapted, config)
    rule = Dpo(config).local_rule(adapted, {}, {})
    found = gradient(adapted, pairs, start, rule=rule, batch_size=4)
    adapted.load_adapter(adapted.initial_adapter(0))
    with torch.no_grad():
        reference = [log_p(adapted, pair) - log_p(adapted, pair.rejected) for pair in pairs]
    adapted.load_adapter(start)
    losses = {"helpful": [], "harmless": []}
    for pair, margin in zip(pairs, reference, strict=True):
        ratio = log_p(adapted, pair) - log_p(adapted, pair.rejected) - margin
        losses[pair.objective].append(-torch.log(1 / (1 + torch.exp(-0.3 * ratio))))
    total = 0.75 * torch.stack(losses["helpful"]).mean() + 0.25 * torch.stack(losses["harmless"]).mean()
    parameters = adapted.parameters_by_name()
    for (name, _), expected in zip(parameters.items(), torch.autograd.grad(total, [*parameters.values()]), strict=True):
        canonical = adapted.to_canonical(name, expected)
        np.testing.assert_allclose(found[name], canonical, atol=1e-4 * np.abs(canonical).max() + 1e-7)


def test_micro_batches_change_no_gradient(adapted, start):
    config = DpoConfig()
    pairs, rule = pairs_of(adapted, config), Dpo(config).local_rule(adapted, {}, {})
    whole, parts = (
        gradient(adapted, pairs, start, rule=rule, batch_size=4, micro_batch=micro_batch) for micro_batch in (4, 2)
    )
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], atol=1e-5 * np.abs(whole[name]).max() + 1e-8)


def test_at_the_base_model_the_loss_is_log_two_and_training_ranks_pairs_right(adapted):
    config = DpoConfig()
    pairs, start = pairs_of(adapted, config), adapted.initial_adapter(0)
    settings = {"batch_size": 4, "learning_rate": 3e-2}
    first = run(adapted, pairs, start, rule=Dpo(config).local_rule(adapted, {}, {}), max_steps=1, **settings)
    assert first.loss == pytest.approx(math.log(2), rel=1e-5)
    run(adapted, pairs, start, rule=Dpo(config).local_rule(adapted, {}, {}), max_steps=8, **settings)
    with torch.no_grad():
        assert (margins_of(adapted, pairs) > 0).all()


def test_held_out_pairs_are_counted_by_objective(adapted, start):
    config = DpoConfig(objectives=["helpful", "harmless"])
    pairs = pairs_of(adapted, config)
    found = Dpo(config).measures(adapted, start, pairs, 2)
    with torch.no_grad():
        margins = margins_of(adapted, pairs)
    helpful = margins[[0, 1, 3]]
    assert found["held_out_accuracy/helpful"] == pytest.approx((helpful > 0).float().mean().item())
    assert found["held_out_margin/helpful"] == pytest.approx(helpful.mean().item(), rel=1e-4)
    assert found["held_out_margin/harmless"] == pytest.approx(margins[2].item(), rel=1e-4)


def test_values_of_a_column_that_the_settings_do_not_name_are_told_nobody(adapted, start, caplog):
    """A run chooses the column: with the column of responses they would be text of the site."""
    config = DpoConfig()
    found = Dpo(config).measures(adapted, start, pairs_of(adapted, config), 2)
    assert {name.partition("/")[2] for name in found} == {"pairs"}
    with pytest.raises(ValueError, match="funny") as refusal:
        pairs_of(adapted, DpoConfig(objectives=["funny"]))
    assert "harmless" not in str(refusal.value)
    assert "harmless" in caplog.text


def test_weights_make_a_mean_over_pairs_the_preferred_mean_over_objectives(adapted):
    config = DpoConfig(objectives=["helpful", "harmless"], preference=[0.4, 0.6])
    pairs = pairs_of(adapted, config)
    sums = {name: sum(pair.weight for pair in pairs if pair.objective == name) for name in config.objectives}
    assert sums == pytest.approx({"helpful": 0.4 * 4, "harmless": 0.6 * 4})
    alone = [example for example in EXAMPLES if example.objective == "helpful"]
    assert [pair.weight for pair in pairs_of(adapted, config, alone)] == [1.0] * 3
    with pytest.raises(ValueError, match=r"gives no weight to \['helpful'\], all pairs there are"):
        pairs_of(adapted, replace(config, preference=[0.0, 1.0]), alone)


def test_only_pairs_of_the_objectives_are_used_and_each_needs_both_responses(adapted):
    assert len(pairs_of(adapted, DpoConfig(objectives=["harmless"]))) == 1
    with pytest.raises(ValueError, match=r"^method.objectives=\['funny'\] are those of none of 4 pairs$"):
        pairs_of(adapted, DpoConfig(objectives=["funny"]))
    lacking = [*EXAMPLES, replace(EXAMPLES[0], rejected=" ")]
    with pytest.raises(ValueError, match="data.rejected_column='rejected' is empty in 1 of 5 examples"):
        pairs_of(adapted, DpoConfig(), lacking)


def test_memory_is_estimated_for_both_responses(adapted):
    pairs = pairs_of(adapted, DpoConfig())
    over = Dpo(DpoConfig()).passes_over(pairs)
    assert len(over.sequences) == 2 * len(pairs)
    assert over.of_step(1) == 2


def test_a_round_from_a_file_of_pairs(tmp_path):
    """What the sites send are adapters; what they measure has the objectives' names."""
    rows = [
        {"prompt": f"Say {word}.", "chosen": word, "rejected": "no", "objective": objective}
        for word in ("sun", "tree", "road", "door") for objective in ("helpful", "harmless")
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = save_tiny_base(tmp_path / "base", "olmoe")
    config = load_config(
        [
            "method=dpo", "method.objectives=[helpful,harmless]", f"data.path={tmp_path / 'pairs.jsonl'}",
            "data.prompt_column=prompt", "data.context_column=null", "data.response_column=chosen",
            "data.rejected_column=rejected", "data.objective_column=objective", "data.template=plain",
            "partition=iid", "partition.num_sites=2", f"model.name={base.name}", "model.source=hub", "lora.rank=2",
            "train.max_steps=1", "train.batch_size=2",
        ]
    )  # fmt: skip
    federation = simulated(config, tmp_path / "private")
    updates = federation.play()
    assert [update.extras for update in updates] == [{}, {}]
    assert all(update.adapter.keys() == federation.adapter.keys() for update in updates)
    measured = federation.sites["site-00"].evaluate(federation.adapter)["site-00"].metrics
    assert {name.partition("/")[0] for name in measured} == {"held_out_accuracy", "held_out_margin"}
