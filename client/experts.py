"""LoRA experts as an experts implementation of transformers, beside PEFT's own way through the weights.

PEFT adapts a fused parameter by forming W + B A for every expert on every forward pass, and a gradient of that size
on every backward pass. Here PEFT still holds the factors, names and saves them, but its wrappers only pass
through: the experts module itself adds the low-rank terms, token by token (``client.grouped_lora``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from client.adapter_layout import ADAPTER, MoeLayer, expert_slots
from client.grouped_lora import (
    ALIGNMENT_BYTES,
    ExpertBlock,
    Factors,
    Pairs,
    Projection,
    expert_block,
    grouped_linear,
)
from client.routing import RoutedTokens

IMPLEMENTATION = "bouquet_lora"
"""Name under which transformers knows ours."""

log = logging.getLogger("bouquet.client")


@dataclass
class Engine:
    """What an experts module needs besides its own weights."""

    layer: str
    """The MoE layer's name."""
    routed: RoutedTokens
    """Knows where padding is and takes the counts; the same object in every layer of a model."""
    wrappers: dict[str, ParamWrapper] = field(default_factory=dict)
    """Fused weight -> PEFT's wrapper that holds its factors; empty where there is no LoRA on experts."""


def use_engine(model: peft.PeftModel, layers: Mapping[str, MoeLayer], routed: RoutedTokens) -> None:
    """Let the model's experts compute with our implementation; layers outside transformers' interface stay PEFT's.

    Args:
        model: A model that PEFT has wrapped; nothing of what it saves changes.
        layers: Its MoE layers.
        routed: Where the layers find a counter, if there is one.
    """
    slow = [layer for layer in layers.values() if not layer.has_interface]
    for layer in layers.values():
        if layer.has_interface:
            _attach(model.get_base_model().get_submodule(f"{layer.name}.experts"), Engine(layer.name, routed))
    if slow and any(isinstance(module, ParamWrapper) for module in model.modules()):
        log.warning("%s", _cost_of_peft(model, slow))


def _attach(module: nn.Module, engine: Engine) -> None:
    """Give the engine to the experts module inside PEFT's wrappers, and make these pass through."""
    while isinstance(module, ParamWrapper):
        engine.wrappers[module.parameter_name] = module
        module.forward = functools.partial(_pass_through, module)  # type: ignore[method-assign]
        module = module.base_layer
    inside: list[Any] = [module]
    if isinstance(module, ModulesToSaveWrapper):
        inside = [module.original_module, module.modules_to_save[ADAPTER]]
    for experts in inside:
        experts.bouquet_engine = engine
        experts.config._experts_implementation = IMPLEMENTATION


def _pass_through(wrapper: ParamWrapper, *args: Any, **kwargs: Any) -> Any:
    return wrapper.base_layer(*args, **kwargs)


def lora_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts' outputs, weighted and summed: transformers' interface.

    Tokens that are padding get zeros, and cost nothing.

    Args:
        experts: The module that holds the fused weights, with an ``Engine``.
        hidden_states: (N, D).
        top_k_index: (N, K), int64.
        top_k_weights: (N, K).
    """
    engine: Engine = experts.bouquet_engine
    counter = engine.routed.counter
    real = counter.real_tokens if counter is not None else None
    if real is None:
        return _experts(experts, engine, hidden_states, top_k_index, top_k_weights)
    outputs = _experts(experts, engine, hidden_states[real], top_k_index[real], top_k_weights[real])
    return torch.zeros_like(hidden_states).index_copy(0, real, outputs)


# Sorted and grouped anew for every batch: nothing that a compiler could fuse.
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, torch.compiler.disable(lora_experts))  # type: ignore[no-untyped-call]


def _experts(experts: Any, engine: Engine, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    up_weight = getattr(experts, up_name)
    pairs = Pairs.of(chosen_NK, len(up_weight))
    if engine.routed.counter is not None:
        engine.routed.counter.add(engine.layer, pairs.tokens_per_expert())
    dtype = up_weight.dtype
    up, up_factors = _projection(experts, engine, up_name, dtype)
    down, down_factors = _projection(experts, engine, "down_proj", dtype)
    gate = experts._apply_gate if experts.has_gate else experts.act_fn
    norm = getattr(experts, "post_expert_norm", None)
    if up_weight.requires_grad or norm is not None:
        x_SD = hidden_ND.to(dtype)[pairs.token_S]
        out_SD = grouped_linear(gate(grouped_linear(x_SD, up, up_factors, pairs)), down, down_factors, pairs)
        if norm is not None:
            out_SD = norm(out_SD)
        outputs = pairs.scatter_sum(out_SD * weights_NK.reshape(-1, 1)[pairs.slot_S])
    else:
        block = ExpertBlock(up, down, gate, pairs)
        outputs = expert_block(hidden_ND.to(dtype), weights_NK.to(dtype), up_factors, down_factors, block)
    return outputs.to(hidden_ND.dtype)


def every_expert(experts: Any, hidden_ND: Tensor) -> Tensor:
    """(E, N, D) what each of a layer's frozen experts makes of each token, without routing weights.

    Args:
        experts: The module that holds the fused weights, in transformers' experts interface.
        hidden_ND: Tokens; E times as many rows of the experts' inner width are made at once.
    """
    opened_ENO = _by_every_expert(experts, "gate_up_proj" if experts.has_gate else "up_proj", hidden_ND)
    inner_ENF = experts._apply_gate(opened_ENO) if experts.has_gate else experts.act_fn(opened_ENO)
    out_END = _by_every_expert(experts, "down_proj", inner_ENF)
    norm = getattr(experts, "post_expert_norm", None)
    return out_END if norm is None else norm(out_END)


def _by_every_expert(experts: Any, name: str, x: Tensor) -> Tensor:
    """(E, N, O) of x (N, I) or (E, N, I)."""
    projection = Projection(getattr(experts, name), is_transposed=experts.is_transposed)
    weight_EIO = projection.input_major()
    y_ENO = x.to(weight_EIO.dtype) @ weight_EIO
    return y_ENO + getattr(experts, f"{name}_bias")[:, None] if experts.has_bias else y_ENO


def _projection(experts: Any, engine: Engine, name: str, dtype: torch.dtype) -> tuple[Projection, Factors]:
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    wrapper = engine.wrappers.get(name)
    if wrapper is None or wrapper.disable_adapters or wrapper.merged:
        return Projection(weight, bias, is_transposed=experts.is_transposed), None
    return Projection(weight, bias, wrapper.scaling[ADAPTER], experts.is_transposed), _factors(wrapper, dtype)


def _factors(wrapper: ParamWrapper, dtype: torch.dtype) -> Factors:
    """PEFT's factors by expert, with the rank filled up with zeros to what grouped products take."""
    A_ERI, B_EOR = (slot.unpack(slot.parameter).to(dtype) for slot in expert_slots(wrapper))
    missing = -A_ERI.shape[1] % (ALIGNMENT_BYTES // dtype.itemsize)
    if missing:
        A_ERI = nn.functional.pad(A_ERI, (0, 0, 0, missing))
        B_EOR = nn.functional.pad(B_EOR, (0, missing))
    # B lies in memory as (E, R, O): products along its outputs run over whole lines.
    return A_ERI.contiguous(), B_EOR.mT.contiguous().mT


def _cost_of_peft(model: peft.PeftModel, layers: list[MoeLayer]) -> str:
    network = model.get_base_model()
    experts = network.get_submodule(f"{layers[0].name}.experts")
    num_bytes = sum(weight.nbytes for weight in experts.parameters() if weight.ndim == 3)
    return (
        f"the experts of {type(network).__name__} are outside transformers' experts interface, so PEFT adapts them "
        f"itself: each of {len(layers)} layers forms {num_bytes / 2**20:.1f} MiB of weight changes on every "
        "forward pass and as much gradient on every backward pass"
    )
