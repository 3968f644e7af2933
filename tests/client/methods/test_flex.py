"""FLEx at a site: what is sent, what stays, and what the graft buys."""

import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from client.adapter_layout import adapter_slots, moe_layers, peft_config
from client.evaluation.held_out import held_out_loss
from client.grafting.grafts import is_graft_array
from client.methods import method_for
from client.private import under
from client.text import Example, encode
from conf.methods import FlexConfig, GraftConfig, GraftForm, GraftStart, SftConfig
from conf.model import ExpertTraining, LoraConfig, ModelConfig
from conf.schema import OptimizerState
from tests.client.test_site import HELD_OUT, TRAIN, assert_same, differ, first_global, make_site, noisy, settings_for
from tests.client.tiny_models import NUM_EXPERTS, save_tiny_base


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return replace(save_tiny_base(folder, "olmoe"), experts=ExpertTraining.frozen)


@pytest.fixture
def config(base_config):
    return settings_for(base_config, FlexConfig())


def held_out(site):
    return encode(HELD_OUT, site.adapted.tokenizer, site.config.data)


def test_attention_is_sent_and_the_graft_stays(config, tmp_path):
    site = make_site(config, tmp_path)
    update = site.train(1, first_global(site))
    assert update.adapter
    assert all(".self_attn." in name for name in update.adapter)
    own = under("own/", site.store.load())
    assert own
    assert all(is_graft_array(name) for name in own)
    assert {name for name in site.adapted.array_names if name not in update.adapter} == own.keys()
    assert update.metrics.keys() >= {"graft_seconds", "graft_spread", "graft_ties"}
    assert update.metrics["graft_ties"] == 0
    assert update.metrics["graft_spread"] > 0


def test_how_experts_were_selected_is_noted_at_the_site_alone(config, tmp_path):
    site = make_site(config, tmp_path)
    update = site.train(1, first_global(site))
    note = json.loads((tmp_path / "here.flex.json").read_text())
    assert note["num_tokens"] == sum(len(s.input_ids) for s in encode(TRAIN, site.adapted.tokenizer, config.data))
    for layer, choice in note["layers"].items():
        assert choice["experts"] == site.store.load()[f"own/{layer}.graft.choice"].astype(int).tolist()
    spreads = [choice["spread"] for choice in note["layers"].values()]
    assert update.metrics["graft_spread"] == pytest.approx(np.mean(spreads))
    assert (tmp_path / "here.flex.json").stat().st_mode & 0o777 == 0o600


def test_experts_are_selected_once(config, tmp_path):
    """Whatever the shared part becomes; and a round asked for again begins again."""
    site = make_site(config, tmp_path)
    first = site.train(1, first_global(site))
    chosen = {name: array for name, array in site.store.load().items() if name.endswith(".choice")}
    assert len(chosen) == len(site.adapted.layers)
    assert all(0 <= array.item() < NUM_EXPERTS for array in chosen.values())
    again = make_site(config, tmp_path).train(1, first_global(site))
    assert_same(again.adapter, first.adapter)
    second = make_site(config, tmp_path).train(2, noisy(first.adapter, seed=0))
    assert "graft_seconds" not in second.metrics
    assert_same({name: site.store.load()[name] for name in chosen}, chosen)


def test_the_first_step_of_the_shared_part_is_that_without_a_graft(base_config, tmp_path):
    """An exact start computes what the base does, so attention gets the gradients it would get alone."""
    grafted = make_site(settings_for(base_config, FlexConfig(), max_steps=1), tmp_path / "grafted")
    plain = make_site(settings_for(base_config, SftConfig(), max_steps=1), tmp_path / "plain")
    ours, theirs = (site.train(1, first_global(site)) for site in (grafted, plain))
    assert ours.metrics["train_loss"] == theirs.metrics["train_loss"]
    for name, array in theirs.adapter.items():
        np.testing.assert_allclose(ours.adapter[name], array, atol=1e-4)


def test_a_sites_loss_is_its_personal_models_and_before_it_has_trained_the_shared_ones(config, tmp_path):
    site = make_site(config, tmp_path)
    received = noisy(first_global(site), seed=0)
    shared_only = {**site.adapted.initial_adapter(0), **received}
    assert site.evaluate(received)["here"] == held_out_loss(site.adapted, shared_only, held_out(site), 16)
    update = site.train(1, received, evaluate_own=True)
    personal = {**update.adapter, **under("own/", site.store.load())}
    evaluated = site.evaluate(update.adapter)["here"]
    assert evaluated == held_out_loss(site.adapted, personal, held_out(site), 16)
    assert evaluated.loss == update.metrics["own_loss"]
    assert evaluated != held_out_loss(site.adapted, {**shared_only, **update.adapter}, held_out(site), 16)


def test_sites_that_share_a_model_swap_their_grafts(base_config, tmp_path):
    """Each comes out as if it had been alone in its process, though they take turns on one model."""
    config, alone = settings_for(base_config, FlexConfig(), max_steps=1), {}
    for name in ("here", "there"):
        site = make_site(config, tmp_path / "alone", name)
        update = site.train(1, first_global(site))
        alone[name] = site.train(2, update.adapter), site.store.load(), site.evaluate(update.adapter)
    first, second = (make_site(config, tmp_path / "together", name) for name in ("here", "there"))
    assert first.adapted is second.adapted
    updates = {site.name: site.train(1, first_global(site)) for site in (first, second)}
    together = {site.name: (site.train(2, updates[site.name].adapter), site.store.load()) for site in (first, second)}
    evaluated = {site.name: site.evaluate(updates[site.name].adapter) for site in (second, first)}
    for name, (update, private, losses) in alone.items():
        assert_same(together[name][0].adapter, update.adapter)
        assert_same(together[name][1], private)
        assert evaluated[name] == losses
    assert differ(*(under("own/", together[name][1]) for name in ("here", "there")))


def test_adams_moments_of_the_graft_are_kept_when_asked_for(base_config, tmp_path):
    site = make_site(settings_for(base_config, FlexConfig(), optimizer_state=OptimizerState.keep), tmp_path)
    site.train(1, first_global(site))
    kept = under("optimizer/", site.store.load())
    of_graft = {name.partition("/")[2] for name in kept if is_graft_array(name)}
    assert of_graft == {name for name in site.adapted.parameters_by_name() if is_graft_array(name)}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize(
    ("start", "form"),
    [
        (GraftStart.exact, GraftForm.additive),
        (GraftStart.paper, GraftForm.additive),
        (GraftStart.paper, GraftForm.convex),
    ],
)
def test_after_20_steps_the_graft_has_moved_and_helps(base_config, tmp_path, start, form, rank):
    """One answer to every question, so that what was learnt holds for questions never seen."""
    method = FlexConfig(graft=GraftConfig(rank=rank, start=start, form=form))
    asked = [Example(f"Name colour {number}.", "", "teal") for number in range(40, 56)]
    held_out = {"here": [Example(f"Name colour {number}.", "", "teal") for number in range(80, 90)]}
    config = settings_for(base_config, method, max_steps=20)
    site = make_site(config, tmp_path, train=asked, held_out=held_out)
    received = first_global(site)
    before = site.evaluate(received)["here"].loss
    site.train(1, received)
    own = under("own/", site.store.load())
    layers = {name.partition(".graft.")[0] for name in own}
    choices = {layer: own[f"{layer}.graft.choice"].astype(int).tolist() for layer in layers}
    started = site.adapted.grafted(choices, np.random.default_rng(0))
    for name, array in own.items():
        if not name.endswith((".choice", "_A")):  # a random A is not known here
            assert (array != started[name]).any(), name
    # The shared part as it was: what is gained is the graft's alone.
    assert site.evaluate(received)["here"].loss < before - 0.1


QWEN_15_MOE = {
    "hidden_size": 2048, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    "vocab_size": 151936,
}  # fmt: skip
"""Of Qwen/Qwen1.5-MoE-A2.7B, as far as sizes go; but for its 24 layers, which are all alike."""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_at_qwens_shape_a_39th_of_all_lora_is_sent():
    """By hand, with rank r, a layer: attention 4 * (2048 + 2048) r = 16,384 r, experts 60 * 3 * (2048 + 1408) r =
    622,080 r for gate, up and down apart; together 38.97 times the former. Fused gate and up share one A, so
    experts have 60 * (2048 + 2 * 1408 + 1408 + 2048) r = 499,200 r here, and the factor is 31.5."""
    lora = LoraConfig(rank=2)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", **QWEN_15_MOE))
        layers = moe_layers(base)
        model = peft.get_peft_model(base, peft_config(base, ModelConfig(), lora))
    shares = method_for(FlexConfig()).shares
    sent, of_experts = 0, 0
    for name, slot in adapter_slots(model).items():
        assert shares(name)
        if ".experts." in name:
            of_experts += slot.parameter.numel()
        else:
            sent += slot.parameter.numel()
    assert len(layers) == 1
    assert sent == 16_384 * lora.rank
    assert of_experts == 499_200 * lora.rank
    assert (of_experts + sent) / sent == pytest.approx(31.5, rel=1e-2)
    unfused = 60 * 3 * (2048 + 1408) * lora.rank
    assert (unfused + sent) / sent == pytest.approx(39, rel=1e-3)
