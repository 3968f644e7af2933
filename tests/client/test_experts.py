"""Our experts implementation against stock PEFT, which forms every expert's changed weight."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import numpy as np
import peft
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from client.adapter_layout import ADAPTER, adapter_slots, moe_layers, peft_config
from client.experts import IMPLEMENTATION
from client.model import AdaptedModel
from conf.model import ExpertTraining, LoraConfig, ModelConfig, RouterTraining
from tests.client.test_model import adapt, random_adapter
from tests.client.tiny_models import MOE_FAMILIES, NUM_EXPERTS, TOP_K, random_tokens, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

FAMILIES = (*MOE_FAMILIES, "nemotron_h")
TOKENS = random_tokens(batch_size=3, length=9)


def stock(adapted: AdaptedModel, family: str, lora: LoraConfig, config: ModelConfig) -> peft.PeftModel:
    """The same base and adapter in PEFT alone."""
    base = copy.deepcopy(adapted.base.model)
    model = peft.get_peft_model(base, peft_config(base, config, lora))
    arrays = adapted.read_adapter()
    with torch.no_grad():
        for name, slot in adapter_slots(model).items():
            if name in arrays:  # PEFT's copy of an experts module holds biases too
                slot.parameter.copy_(slot.pack(torch.from_numpy(arrays[name])))
    return model


def loss_and_gradients(model: torch.nn.Module, parameters: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of a loss in which every token counts."""
    logits = model(TOKENS).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return logits.detach(), dict(zip(parameters, gradients, strict=True))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def mean_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return float(np.mean([relative_difference(gradients[name].float(), expected[name]) for name in expected]))


def both(family: str, rank: int = 3, **settings: object) -> tuple[AdaptedModel, peft.PeftModel]:
    lora = LoraConfig(rank=rank, alpha=6.0)
    adapted = adapt(family, lora, **settings)
    adapted.load_adapter(random_adapter(adapted))
    return adapted, stock(adapted, family, lora, ModelConfig(name=family, **settings))


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_pefts_own(family: str, rank: int) -> None:
    adapted, peft_model = both(family, rank)
    parameters = {name: slot.parameter for name, slot in adapter_slots(peft_model).items()}
    logits, gradients = loss_and_gradients(adapted.model, adapted.parameters_by_name())
    expected_logits, expected = loss_and_gradients(peft_model, parameters)
    assert relative_difference(logits, expected_logits) < 1e-5
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        assert relative_difference(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": ExpertTraining.full},
        {"experts": ExpertTraining.full, "router": RouterTraining.averaged},
        {"experts": ExpertTraining.frozen},
        {"router": RouterTraining.averaged},
    ],
)
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_whatever_is_trained_gradients_are_pefts_own(family: str, settings: dict[str, object]) -> None:
    adapted, peft_model = both(family, **settings)
    parameters = {name: slot.parameter for name, slot in adapter_slots(peft_model).items()}
    _, gradients = loss_and_gradients(adapted.model, adapted.parameters_by_name())
    _, expected = loss_and_gradients(peft_model, {name: parameters[name] for name in gradients})
    for name, gradient in expected.items():
        assert relative_difference(gradients[name], gradient) < 1e-5, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_half_precision_is_as_near_to_float32_as_pefts(family: str, dtype: torch.dtype) -> None:
    """Both round; ours, which never rounds W + BA, must not be much further from the float32 gradients."""
    lora = LoraConfig(rank=3, alpha=6.0)
    exact = adapt(family, lora)
    adapter = random_adapter(exact)
    exact.load_adapter(adapter)
    half = adapt(family, lora, dtype)
    half.load_adapter(adapter)
    theirs = stock(half, family, lora, ModelConfig(name=family))
    _, expected = loss_and_gradients(exact.model, exact.parameters_by_name())
    _, ours = loss_and_gradients(half.model, half.parameters_by_name())
    _, pefts = loss_and_gradients(theirs, {name: slot.parameter for name, slot in adapter_slots(theirs).items()})
    assert mean_error(ours, expected) < max(1.5 * mean_error(pefts, expected), 4 * torch.finfo(dtype).eps)


def checkpointed(model: torch.nn.Module) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    adapted, _ = both(family)
    logits, gradients = loss_and_gradients(adapted.model, adapted.parameters_by_name())
    checkpointed(adapted.model)
    with adapted.count_expert_tokens() as counter:
        counter.set_mask(torch.ones(TOKENS.shape, dtype=torch.bool))
        again, checkpointed_gradients = loss_and_gradients(adapted.model, adapted.parameters_by_name())
    torch.testing.assert_close(again, logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(checkpointed_gradients[name], gradient)
    # The second forward pass over the same tokens is not counted.
    assert all(tokens.sum() == TOKENS.numel() * TOP_K for tokens in counter.totals().values())


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_autocast_is_as_near_to_float32_as_pefts(family: str) -> None:
    adapted, peft_model = both(family)
    _, expected = loss_and_gradients(adapted.model, adapted.parameters_by_name())
    parameters = {name: slot.parameter for name, slot in adapter_slots(peft_model).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, ours = loss_and_gradients(adapted.model, adapted.parameters_by_name())
        _, pefts = loss_and_gradients(peft_model, parameters)
    assert mean_error(ours, expected) < 1.5 * mean_error(pefts, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_compiled_model_agrees(family: str, dtype: torch.dtype) -> None:
    """Gated, transposed with biases, and plain experts."""
    adapted = adapt(family, LoraConfig(rank=3, alpha=6.0), dtype)
    adapted.load_adapter(random_adapter(adapted))
    logits, expected = loss_and_gradients(adapted.model, adapted.parameters_by_name())
    compiled = torch.compile(adapted.model, backend="aot_eager")
    again, gradients = loss_and_gradients(compiled, adapted.parameters_by_name())
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert relative_difference(again, logits) < tolerance
    for name, gradient in expected.items():
        assert relative_difference(gradients[name].float(), gradient.float()) < tolerance, name


class _LargestNew(TorchDispatchMode):
    """The most numbers in any tensor that an operation made in memory of its own."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_of_the_size_of_the_experts_is_ever_made() -> None:
    """Few tokens, so that the experts' weights are by far the largest tensors; PEFT makes some of their size."""
    adapted = adapt("olmoe", LoraConfig(rank=1, alpha=1.0, attention=False))
    adapted.load_adapter(random_adapter(adapted))
    theirs = stock(adapted, "olmoe", LoraConfig(rank=1, alpha=1.0, attention=False), ModelConfig(name="olmoe"))
    size = NUM_EXPERTS * 24 * 16
    made = {}
    for whose, model in (("ours", adapted.model), ("pefts", theirs)):
        known = [*model.parameters(), *model.buffers()]
        with _LargestNew(known) as largest:
            model(TOKENS[:1, :2], logits_to_keep=1).logits.sum().backward()
        made[whose] = largest.numel
        base = [parameter for name, parameter in model.named_parameters() if "lora" not in name]
        assert all(parameter.grad is None for parameter in base)
    assert made["ours"] < size <= made["pefts"]


def test_padding_is_neither_counted_nor_computed() -> None:
    adapted, _ = both("olmoe")
    mask = torch.ones(TOKENS.shape, dtype=torch.bool)
    mask[1, 4:] = mask[2, 6:] = False
    rows = []
    experts = adapted.model.get_base_model().model.layers[0].mlp.experts.get_base_layer()
    experts.act_fn.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with adapted.count_expert_tokens() as counter, torch.no_grad():
        counter.set_mask(mask)
        padded = adapted.model(TOKENS, attention_mask=mask.long()).logits
    whole = adapted.model(TOKENS, attention_mask=mask.long()).logits
    torch.testing.assert_close(padded[mask], whole[mask])
    assert rows == [mask.sum() * TOP_K, mask.numel() * TOP_K]
    assert all(tokens.sum() == mask.sum() * TOP_K for tokens in counter.totals().values())


def test_base_model_without_its_adapter_is_the_base() -> None:
    adapted, _ = both("olmoe")
    with adapted.model.disable_adapter():
        off = adapted.model(TOKENS).logits
    torch.testing.assert_close(off, adapted.base.model(TOKENS).logits)
    assert not torch.allclose(adapted.model(TOKENS).logits, off)


def test_the_base_itself_keeps_transformers_implementation() -> None:
    adapted, _ = both("olmoe")
    layer = next(iter(adapted.layers))
    ours = adapted.model.get_base_model().get_submodule(f"{layer}.experts").get_base_layer()
    assert ours.config._experts_implementation == IMPLEMENTATION
    assert adapted.base.model.get_submodule(f"{layer}.experts").config._experts_implementation != IMPLEMENTATION


def test_experts_outside_the_interface_are_pefts_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """Llama 4's experts take every token, whoever chose them; its tokens are counted at the router."""
    with caplog.at_level(logging.WARNING, "bouquet.client"):
        adapted, peft_model = both("llama4_text")
    assert "2 layers forms 0.0 MiB of weight changes" in caplog.text
    logits, gradients = loss_and_gradients(adapted.model, adapted.parameters_by_name())
    parameters = {name: slot.parameter for name, slot in adapter_slots(peft_model).items()}
    expected_logits, expected = loss_and_gradients(peft_model, parameters)
    torch.testing.assert_close(logits, expected_logits)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)
    mask = torch.ones(TOKENS.shape, dtype=torch.bool)
    mask[0, 5:] = False
    with adapted.count_expert_tokens() as counter:
        counter.set_mask(mask)
        adapted.model(TOKENS)
    per_token = adapted.base.model.config.num_experts_per_tok
    assert counter.totals().keys() == moe_layers(tiny_model("llama4_text")).keys()
    assert all(tokens.sum() == mask.sum() * per_token for tokens in counter.totals().values())


def test_adapter_is_saved_as_peft_would(tmp_path) -> None:
    adapted, peft_model = both("gpt_oss")
    adapted.save_peft(adapted.read_adapter(), tmp_path / "ours")
    peft_model.save_pretrained(tmp_path / "pefts", save_embedding_layers=False)
    ours, pefts = (peft.utils.load_peft_weights(str(tmp_path / whose), device="cpu") for whose in ("ours", "pefts"))
    assert ours.keys() == pefts.keys()
    assert all(torch.equal(ours[name], pefts[name]) for name in pefts)
    assert ADAPTER == "default"
