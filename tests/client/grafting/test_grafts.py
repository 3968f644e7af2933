"""Grafts in every checked family: their formula, their start, and that nothing which computes around them breaks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.base_model import BaseModel
from client.bases import BaseIdentity
from client.checkpointing import checkpointed_layers
from client.grafting.grafts import is_graft_array
from client.memory import Shape, TrainingMemory
from client.model import AdaptedModel
from client.text import byte_tokenizer
from conf.methods import GraftConfig, GraftForm, GraftStart
from conf.model import ExpertTraining, LoraConfig, ModelConfig
from tests.client.tiny_models import MOE_FAMILIES, random_tokens, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FAMILIES = (*MOE_FAMILIES, "nemotron_h")
TOKENS = random_tokens(batch_size=3, length=9)
LORA = LoraConfig(rank=2, alpha=6.0)
EXACT = GraftConfig()
FORMS = {
    "exact": EXACT,
    "additive": GraftConfig(start=GraftStart.paper),
    "convex": GraftConfig(start=GraftStart.paper, form=GraftForm.convex),
}


def grafted_model(
    family: str, graft: GraftConfig | None = EXACT, dtype: torch.dtype = torch.float32, **overrides: Any
) -> AdaptedModel:
    """A tiny base of ``family`` with a graft in every MoE layer, made in memory."""
    model = tiny_model(family, **overrides).to(dtype).requires_grad_(False)
    identity = BaseIdentity(name=family, path="/bases/tiny", sha256="0" * 64, folder=Path("/bases/tiny"))
    config = ModelConfig(name=family, experts=ExpertTraining.frozen)
    return AdaptedModel(BaseModel(model, byte_tokenizer(), identity), config, LORA, graft)


def fresh(adapted: AdaptedModel, experts: tuple[int, ...] = (2,)) -> dict[str, NDArray[np.float32]]:
    """The initial adapter with untrained grafts, made of the same experts in each layer."""
    choices = dict.fromkeys(adapted.layers, experts)
    return {**adapted.initial_adapter(seed=0), **adapted.grafted(choices, np.random.default_rng(0))}


def noisy(adapter: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Every array moved, but for the choice of experts."""
    generator = np.random.default_rng(1)
    return {
        name: array
        if name.endswith(".choice")
        else (array + 0.2 * generator.standard_normal(array.shape)).astype(np.float32)
        for name, array in adapter.items()
    }


def logits(adapted: AdaptedModel) -> Tensor:
    with torch.no_grad():
        return adapted.model(TOKENS).logits


def personal_expert(adapted: AdaptedModel, layer: str, arrays: dict[str, Tensor], place: int) -> Any:
    """A copy of the base's experts in which the chosen one is the personal one, its weights written out."""
    experts: Any = copy.deepcopy(adapted.base.model.get_submodule(f"{layer}.experts"))
    expert = int(arrays["choice"][place])
    for own, name in (("up", "gate_up_proj" if experts.has_gate else "up_proj"), ("down", "down_proj")):
        weight = getattr(experts, name)
        with torch.no_grad():
            if own in arrays:
                weight[expert] = arrays[own][place]
                if experts.has_bias:
                    getattr(experts, f"{name}_bias")[expert] = arrays[f"{own}_bias"][place]
            else:
                rank = len(arrays[f"{own}_A"][place])
                delta = LORA.alpha / rank * arrays[f"{own}_B"][place] @ arrays[f"{own}_A"][place]
                weight[expert] += delta.T if experts.is_transposed else delta
    return experts


def alone(experts: Any, x_ND: Tensor, expert: int) -> Tensor:
    """(N, D) one expert's output by transformers' own code."""
    return experts(x_ND, torch.full((len(x_ND), 1), expert), torch.ones(len(x_ND), 1))


def shared_part(block: Any, x_ND: Tensor) -> Tensor:
    """(N, D) what a layer adds to its routed experts."""
    if hasattr(block, "shared_expert_gate"):
        return block.shared_expert_gate(x_ND).sigmoid() * block.shared_expert(x_ND)
    return block.shared_experts(x_ND) if hasattr(block, "shared_experts") else torch.zeros_like(x_ND)


def naive(adapted: AdaptedModel, layer: str, arrays: dict[str, Tensor], x_ND: Tensor, form: str) -> Tensor:
    """(N, D) the base's layer and its graft, by the formula."""
    block: Any = adapted.base.model.get_submodule(layer)
    output = block(x_ND[None])
    output = (output[0] if isinstance(output, tuple) else output)[0]
    gate_NM = x_ND @ arrays["gate_weight"].T + arrays["gate_bias"]
    share_NM = gate_NM.exp() / (1 + gate_NM.exp())
    if form == "convex":
        share_NM = gate_NM.exp() / (1 + gate_NM.exp().sum(dim=1, keepdim=True))
        output = output - share_NM.sum(dim=1, keepdim=True) * (output - shared_part(block, x_ND))
    for place, expert in enumerate(arrays["choice"].int().tolist()):
        term = alone(personal_expert(adapted, layer, arrays, place), x_ND, expert)
        if form == "exact":
            term = term - alone(block.experts, x_ND, expert)
        output = output + share_NM[:, place, None] * term
    return output


@pytest.mark.parametrize(("form", "rank"), [("exact", 0), ("exact", 3), ("additive", 3), ("convex", 0)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_computes_the_formula(family: str, form: str, rank: int) -> None:
    graft = GraftConfig(num_experts=2, rank=rank, start=FORMS[form].start, form=FORMS[form].form)
    adapted = grafted_model(family, graft)
    adapter = noisy(fresh(adapted, (2, 1)))
    adapted.load_adapter(adapter)
    x_ND = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for layer in adapted.layers:
        prefix = f"{layer}.graft."
        arrays = {
            name.removeprefix(prefix): torch.from_numpy(array)
            for name, array in adapter.items()
            if name.startswith(prefix)
        }
        with torch.no_grad():
            output = adapted.model.get_base_model().get_submodule(layer)(x_ND[None])
            output = (output[0] if isinstance(output, tuple) else output)[0]
            torch.testing.assert_close(output, naive(adapted, layer, arrays, x_ND, form), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("rank", "dtype"), [(0, torch.bfloat16), (3, torch.float32)])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exact_start_changes_no_bit_and_every_expert_weight_has_a_gradient(
    family: str, rank: int, dtype: torch.dtype
) -> None:
    adapted = grafted_model(family, GraftConfig(rank=rank), dtype)
    adapted.load_adapter(adapted.initial_adapter(seed=0))
    without = logits(adapted)
    adapted.load_adapter(fresh(adapted))
    torch.testing.assert_close(logits(adapted), without, rtol=0, atol=0)
    adapted.model(TOKENS).logits.float().logsumexp(dim=-1).sum().backward()
    for name, parameter in adapted.parameters_by_name().items():
        if is_graft_array(name) and not name.endswith(("_A", "gate_weight", "gate_bias")):  # B = 0, and E_p = E_frozen
            assert parameter.grad is not None
            assert parameter.grad.any(), name


def added_with_half_weight(model: Any, layer: str, expert: int) -> dict[str, Tensor]:
    """Weights of a copy of the layer's experts, of which ``model`` adds half of one to the layer from now on.

    Less the same again without gradients, and with none to the layer's input, where copy and original cancel out.
    """
    added: Any = copy.deepcopy(model.get_submodule(f"{layer}.experts")).requires_grad_()

    def add(_module: Any, inputs: tuple[Tensor, ...], routed: Tensor) -> Tensor:
        output = alone(added, inputs[0].detach(), expert)
        return routed + (output - output.detach()) / 2

    model.get_submodule(f"{layer}.experts").register_forward_hook(add)
    return dict(added.named_parameters(recurse=False))


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_at_an_exact_start_gradients_are_those_of_an_expert_with_weight_a_half(family: str, rank: int) -> None:
    """Of the factors by hand from the whole weight's gradient G: scale * G A^T of B, and of A, since B = 0, nothing."""
    adapted, expert = grafted_model(family, GraftConfig(rank=rank)), 2
    adapted.load_adapter(fresh(adapted, (expert,)))
    other = copy.deepcopy(adapted.base.model)
    added = {layer: added_with_half_weight(other, layer, expert) for layer in adapted.layers}
    for model in (adapted.model, other):
        model(TOKENS).logits.logsumexp(dim=-1).sum().backward()
    graft_of = adapted.parameters_by_name()
    for layer, weights in added.items():
        experts: Any = other.get_submodule(f"{layer}.experts")
        for name, weight in weights.items():
            own = f"{layer}.graft.{name.replace('gate_up_proj', 'up').replace('_proj', '')}"
            whole = weight.grad[expert]
            if not rank:
                torch.testing.assert_close(graft_of[own].grad[0], whole, atol=1e-5, rtol=1e-4)
            elif not name.endswith("_bias"):
                A, B = graft_of[f"{own}_A"], graft_of[f"{own}_B"]
                by_hand = LORA.alpha / rank * (whole.T if experts.is_transposed else whole) @ A[0].detach().T
                torch.testing.assert_close(B.grad[0], by_hand, atol=1e-5, rtol=1e-4)
                assert not A.grad.any()


def test_the_papers_start_changes_the_output_and_no_graft_does_not() -> None:
    adapted = grafted_model("olmoe", FORMS["additive"])
    adapted.load_adapter(adapted.initial_adapter(seed=0))
    torch.testing.assert_close(logits(adapted), tiny_model("olmoe")(TOKENS).logits)
    without = logits(adapted)
    adapted.load_adapter(fresh(adapted))
    assert (logits(adapted) - without).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_half_precision_graft_is_near_the_float32_one(family: str) -> None:
    exact = grafted_model(family)
    adapter = noisy(fresh(exact))
    half = grafted_model(family, dtype=torch.bfloat16)
    for adapted in (exact, half):
        adapted.load_adapter(adapter)
    expected = logits(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained_like = logits(half)
    for found in (trained_like, logits(half)):
        assert (found.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    adapted = grafted_model(family, GraftConfig(rank=2))
    adapted.load_adapter(noisy(fresh(adapted)))
    adapted.model.train()

    def gradients(*, enabled: bool) -> list[Tensor]:
        with checkpointed_layers(adapted.model, enabled=enabled):
            loss = adapted.model(TOKENS).logits.logsumexp(dim=-1).sum()
            return list(torch.autograd.grad(loss, list(adapted.parameters_by_name().values())))

    for plain, again in zip(gradients(enabled=False), gradients(enabled=True), strict=True):
        torch.testing.assert_close(again, plain)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_generation_with_a_cache_says_the_same(family: str) -> None:
    adapted = grafted_model(family)
    adapted.load_adapter(noisy(fresh(adapted)))
    said = [
        adapted.model.generate(input_ids=TOKENS[:1], max_new_tokens=6, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*said)


def test_loading_and_reading_is_the_identity_and_what_is_fixed_is_not_trained() -> None:
    adapted = grafted_model("gpt_oss", GraftConfig(num_experts=2))
    adapter = noisy(fresh(adapted, (3, 0)))
    adapted.load_adapter(adapter)
    read = adapted.read_adapter()
    assert list(read) == adapted.array_names
    for name, array in adapter.items():
        np.testing.assert_array_equal(read[name], array)
    trained = adapted.parameters_by_name()
    assert trained.keys() == {name for name in adapter if not name.endswith(".choice")}
    shared = [name for name in adapter if not is_graft_array(name)]
    with adapted.fixed(shared):
        assert adapted.parameters_by_name().keys() == trained.keys() - set(shared)
    assert adapted.parameters_by_name().keys() == trained.keys()


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {}, "no fused experts in transformers' experts interface"),
        ("llama4_text", {}, "no fused experts in transformers' experts interface"),
        ("olmoe", {"num_experts": 3, "of": 2}, "method.graft.num_experts must be at most the model's 2, got 3"),
    ],
)
def test_models_that_cannot_take_a_graft_are_refused(family: str, settings: dict[str, int], message: str) -> None:
    overrides = {"num_experts": settings["of"]} if "of" in settings else {}
    with pytest.raises(ValueError, match=message):
        grafted_model(family, GraftConfig(num_experts=settings.get("num_experts", 1)), **overrides)


def test_a_convex_graft_cannot_start_exactly() -> None:
    with pytest.raises(ValueError, match="start must be paper with method.graft.form=convex.*, got 'exact'"):
        GraftConfig(form=GraftForm.convex)


def test_the_memory_estimate_counts_the_graft_its_gradient_and_its_moments() -> None:
    """A copy of one expert of width 24 in each of two layers, a gate of 16 weights and a bias: float32."""
    models = grafted_model("olmoe"), grafted_model("olmoe", None)
    grafted, plain = (
        TrainingMemory(adapted, Shape(9, 5, packed=False), gradient_checkpointing=False) for adapted in models
    )
    of_grafts = 2 * 4 * (3 * 24 * 16 + 16 + 1)
    assert grafted.adapter_bytes - plain.adapter_bytes == of_grafts
    assert grafted.optimizer_bytes - plain.optimizer_bytes == 3 * of_grafts
    assert grafted.activation_bytes(1) > plain.activation_bytes(1)
    assert grafted.base_bytes == plain.base_bytes
