"""Upcycled models compute what the dense ones did until their experts are trained apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from client.adapter_layout import moe_layers
from client.upcycle import upcycle, upcycle_folder
from conf.model import Differentiation, UpcycleConfig
from tests.client.tiny_models import random_tokens, save_tiny_base, tiny_model

FOUR = UpcycleConfig(num_experts=4, experts_per_token=2)
ROPE_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def logits(model: torch.nn.Module, length: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(length=length)).logits


@pytest.mark.parametrize("rope", [None, ROPE_SCALING])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "granite"])
def test_copied_experts_leave_the_logits_unchanged(family: str, tied: bool, rope: dict[str, Any] | None) -> None:
    overrides = {} if rope is None else {"rope_parameters": rope}
    dense = tiny_model(family, tie_word_embeddings=tied, **overrides)
    model = upcycle(dense, FOUR)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    layers = moe_layers(model)
    assert [layer.num_experts for layer in layers.values()] == [4, 4]
    assert model.config.tie_word_embeddings == tied
    assert rope is None or model.config.rope_parameters["factor"] == rope["factor"]


def test_granite_keeps_its_multipliers() -> None:
    dense = tiny_model("granite", embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=3.0)
    torch.testing.assert_close(logits(upcycle(dense, FOUR)), logits(dense), atol=1e-5, rtol=1e-5)


def test_sliding_window_of_mistral_is_kept() -> None:
    dense = tiny_model("mistral", sliding_window=8)
    model = upcycle(dense, FOUR)
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(model), logits(tiny_model("mistral")), atol=1e-3)


@pytest.mark.parametrize("num_chosen", [1, 3, 4])
def test_any_number_of_experts_per_token_leaves_the_logits_unchanged(num_chosen: int) -> None:
    dense = tiny_model("qwen3")
    model = upcycle(dense, UpcycleConfig(num_experts=4, experts_per_token=num_chosen))
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("olmoe", {}, r"cannot upcycle a model of type olmoe, only llama, mistral, qwen3, granite"),
        ("gpt2", {}, r"cannot upcycle a model of type gpt2"),
        ("llama", {"attention_bias": True}, r"llama model with attention_bias=true: mixtral has none"),
        ("llama", {"mlp_bias": True}, r"llama model with mlp_bias=true"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, r"sliding attention in some layers"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(family: str, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_model(family, **overrides), FOUR)


def upcycled(folder: Path, family: str = "llama", **settings: Any) -> tuple[torch.nn.Module, dict[str, float]]:
    """A tiny model upcycled through folders, and the report on it."""
    if not (folder / "dense").exists():
        save_tiny_base(folder / "dense", family)
    target = folder / repr(settings)
    upcycle_folder(folder / "dense", UpcycleConfig(num_experts=4, **settings), target)
    return AutoModelForCausalLM.from_pretrained(target), json.loads((target / "upcycle.json").read_text())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fitted_routers_leave_the_logits_unchanged_and_spread_the_tokens(tmp_path: Path, family: str) -> None:
    model, report = upcycled(tmp_path, family, differentiate=Differentiation.kmeans_router)
    torch.testing.assert_close(logits(model), logits(tiny_model(family)), atol=1e-5, rtol=1e-5)
    assert report["mean_relative_expert_distance"] == 0.0
    assert report["max_logit_change"] < 1e-5
    assert report["mean_routing_entropy"] > 0.8
    assert report["largest_expert_share"] < 0.5


def test_steps_make_the_experts_differ_and_say_how_far(tmp_path: Path) -> None:
    """The reported distance, computed here weight by weight: mean over pairs of experts of ||a - b|| / mean norm."""
    model, report = upcycled(tmp_path, differentiate=Differentiation.steps, steps=6)
    ratios = []
    for layer in moe_layers(model).values():
        for weight in layer.weights:
            experts = list(model.get_parameter(f"{layer.name}.experts.{weight}").detach())
            norm = sum(float(expert.norm()) for expert in experts) / 4
            ratios += [float((a - b).norm()) / norm for a in experts for b in experts if a is not b]
    assert report["mean_relative_expert_distance"] == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert report["mean_relative_expert_distance"] > 1e-4
    assert report["max_logit_change"] > 0
    assert report["loss"] < report["dense_loss"]


def test_steps_train_nothing_but_experts_and_routers(tmp_path: Path) -> None:
    model, _ = upcycled(tmp_path, differentiate=Differentiation.steps, steps=2)
    dense = tiny_model("llama").state_dict()
    for name, tensor in model.state_dict().items():
        if ".mlp." not in name:
            torch.testing.assert_close(tensor, dense[name], atol=0, rtol=0)


@pytest.mark.parametrize("differentiation", [Differentiation.kmeans_router, Differentiation.steps])
def test_upcycling_twice_gives_the_same_weights(tmp_path: Path, differentiation: Differentiation) -> None:
    models = []
    for attempt in ("first", "second"):
        torch.manual_seed(len(models))
        models.append(upcycled(tmp_path / attempt, differentiate=differentiation, steps=2)[0])
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, atol=0, rtol=0)


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("A few words.")
    with pytest.raises(ValueError, match=r"model.upcycle.text=.*short.txt has 13 tokens, at least 1536 are needed"):
        upcycled(tmp_path, text=str(text), differentiate=Differentiation.kmeans_router)
