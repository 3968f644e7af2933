"""Frozen weights in 8 bits, by torchao; an optional dependency."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from client.adapter_layout import moe_layers


def quantize_int8(model: PreTrainedModel) -> None:
    """Keep every linear map and every fused expert as int8 with one scale a row; embeddings stay as they are.

    Products are computed in the model's own dtype: a weight is widened for the pass that needs it, layer by layer.

    Args:
        model: A frozen model; changed in place.

    Raises:
        ValueError: If torchao is not installed.
    """
    try:
        # Here: where it is installed it costs every process seconds.
        from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, PerRow, quantize_  # noqa: PLC0415
    except ImportError as error:
        raise ValueError("model.quantization=int8 needs torchao: pip install bouquet-fl[int8]") from error
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head,
    )
    for layer in moe_layers(model).values():
        experts = model.get_submodule(f"{layer.name}.experts")
        for name in layer.weights if layer.has_interface else ():
            quantized = Int8Tensor.from_hp(getattr(experts, name).detach(), granularity=PerRow())
            setattr(experts, name, nn.Parameter(quantized, requires_grad=False))
