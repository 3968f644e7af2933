"""A base in 8 bits computes what its widened weights would."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from client.adapter_layout import moe_layers
from client.base_model import BaseModel, load_base
from client.bases import BaseIdentity
from client.model import AdaptedModel
from client.quantization import quantize_int8
from client.text import byte_tokenizer
from conf.model import ModelConfig, Quantization
from tests.client.test_model import LORA, logits, random_adapter
from tests.client.tiny_models import random_tokens, save_tiny_base, tiny_model

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adapted(model: torch.nn.Module) -> AdaptedModel:
    identity = BaseIdentity(name="tiny", path="/bases/tiny", sha256="0" * 64, folder=Path("/bases/tiny"))
    return AdaptedModel(BaseModel(model, byte_tokenizer(), identity), ModelConfig(), LORA)


def widened(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with ordinary weights of the same, rounded, values."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if hasattr(weight, "qdata"):
                setattr(module, name, torch.nn.Parameter(weight.dequantize(), requires_grad=False))
    return plain


def gradients(model: AdaptedModel) -> dict[str, torch.Tensor]:
    tokens = random_tokens()
    parameters = model.parameters_by_name()
    loss = model.model(tokens, labels=tokens).loss
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "llama"])
def test_model_in_8_bits_is_the_one_of_its_rounded_weights(family: str) -> None:
    base = tiny_model(family).requires_grad_(False)
    quantize_int8(base)
    ours, exact = adapted(base), adapted(widened(base))
    adapter = random_adapter(ours)
    for model in (ours, exact):
        model.load_adapter(adapter)
    torch.testing.assert_close(logits(ours.model), logits(exact.model))
    expected = gradients(exact)
    for name, gradient in gradients(ours).items():
        torch.testing.assert_close(gradient, expected[name])


def test_every_expert_takes_a_byte_a_weight_and_moves_by_half_a_step_at_most() -> None:
    base, quantized = tiny_model("olmoe"), tiny_model("olmoe").requires_grad_(False)
    quantize_int8(quantized)
    for layer in moe_layers(base).values():
        for name in layer.weights:
            weight = base.get_submodule(f"{layer.name}.experts").get_parameter(name)
            stored = getattr(quantized.get_submodule(f"{layer.name}.experts"), name)
            assert stored.qdata.dtype is torch.int8
            step = weight.abs().amax(dim=-1, keepdim=True) / 127
            assert ((stored.dequantize() - weight).abs() <= 0.51 * step).all()


def test_setting_reaches_the_base(tmp_path: Path) -> None:
    config = save_tiny_base(tmp_path / "base", "olmoe")
    config.quantization = Quantization.int8
    base = load_base(config, torch.device("cpu"))
    assert hasattr(base.model.model.layers[0].mlp.experts.gate_up_proj, "qdata")
    assert not hasattr(base.model.lm_head.weight, "qdata")
