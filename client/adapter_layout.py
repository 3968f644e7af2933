"""Where a model's experts, routers and projections are, and how PEFT stores what is trained of them.

The rest of Bouquet knows one layout: LoRA's A is (rank, in) and B is (out, rank), an expert's arrays
have the expert on axis 0, and B @ A is what ``x -> W x`` gains. PEFT keeps the experts of a fused parameter in
two plain matrices, A expert-major and B rank-major. This file is where the two meet.

Shape suffixes: E experts, R rank, I inputs, O outputs, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from conf.model import ExpertTraining, LoraConfig, ModelConfig, RouterTraining

ADAPTER = "default"
"""PEFT's name for its only adapter; stock ``PeftModel.from_pretrained`` uses the same."""

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class MoeLayer:
    """One layer of routed experts."""

    name: str
    """Path of the module that holds experts and router, such as ``model.layers.0.mlp``."""
    num_experts: int
    weights: tuple[str, ...]
    """The experts' fused projections, 3-D parameters with the expert on axis 0: gate_up_proj, down_proj."""
    router: str | None
    """Path of the router, such as ``model.layers.0.mlp.gate``; None if there is none we recognise."""
    has_interface: bool = True
    """Whether the experts are called through transformers' experts interface: tokens, chosen experts, weights."""


class Packing(Enum):
    """How PEFT stores an array of ours."""

    plain = "plain"
    """As it is."""
    expert_a = "expert_a"
    """(E, R, I) as (E*R, I): expert-major."""
    expert_b = "expert_b"
    """(E, O, R) as (O, R*E): rank-major. Slices of R columns would mix experts."""


@dataclass(frozen=True)
class Slot:
    """An array of the adapter and the torch tensor that holds it: a parameter, if it is trained."""

    parameter: torch.Tensor
    packing: Packing
    num_experts: int = 1
    base: nn.Parameter | None = None
    """The base model's weight that this one replaces; None for LoRA, which is added to it."""

    def unpack(self, stored: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape (itself, its gradient, a moment) in our layout."""
        if self.packing is Packing.expert_a:
            return stored.reshape(self.num_experts, -1, stored.shape[1])
        if self.packing is Packing.expert_b:
            return stored.reshape(stored.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return stored

    def pack(self, array: torch.Tensor) -> torch.Tensor:
        """The inverse of ``unpack``."""
        if self.packing is Packing.expert_a:
            return array.reshape(-1, array.shape[2])
        if self.packing is Packing.expert_b:
            return array.permute(1, 2, 0).reshape(array.shape[1], -1)
        return array


def moe_layers(model: PreTrainedModel) -> dict[str, MoeLayer]:
    """The model's layers of routed experts by their name, in order; empty for a dense model.

    Nearly every family of transformers 5 with fused experts goes through its experts interface, which marks
    the module with ``is_transposed``; so this needs no list of families.
    """
    layers = {}
    for path, module in model.named_modules():
        name, _, last = path.rpartition(".")
        weights = {key: weight for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3}
        counts = {weight.shape[0] for weight in weights.values()}
        if last == "experts" and len(counts) == 1:
            (num_experts,) = counts
            router = _router_path(model, name, num_experts)
            has_interface = hasattr(module, "is_transposed")
            if has_interface or router is not None:  # else nobody could count its tokens
                layers[name] = MoeLayer(name, num_experts, tuple(weights), router, has_interface)
    return layers


def _router_path(model: PreTrainedModel, layer: str, num_experts: int) -> str | None:
    """The router is the module beside the experts with a weight (E, D)."""
    for path, module in model.get_submodule(layer).named_children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] == num_experts:
            return f"{layer}.{path}"
    return None


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether the model has routed experts, in whatever form."""
    counts = [getattr(model.config.get_text_config(), key, None) or 0 for key in _EXPERT_COUNTS]
    return max(counts) > 1 or any(path.endswith("experts") for path, _ in model.named_modules())


def lora_targets(model: PreTrainedModel, *, feed_forward: bool) -> list[str]:
    """Paths of the linear attention projections and, if asked, of every other linear map but the output embedding.

    Raises:
        ValueError: If there is none.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [
        path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    targets = [path for path in linear if feed_forward or _in_attention(model, path)]
    if not targets:
        raise ValueError(
            f"lora.attention=true, but {type(model).__name__} has no linear layer in a module whose name ends in "
            "'attn' or 'attention', or whose class is called so; set lora.attention=false"
        )
    return targets


def _in_attention(model: PreTrainedModel, path: str) -> bool:
    """By the name of a module around it or, in Nemotron-H, where all mixers are called alike, by its own class."""
    parts = path.split(".")
    parents = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    return any(part.endswith(("attn", "attention")) for part in parts) or any(
        type(parent).__name__.endswith("Attention") for parent in parents
    )


def peft_config(model: PreTrainedModel, config: ModelConfig, lora: LoraConfig) -> peft.LoraConfig:
    """What PEFT is to adapt: full paths, so that a name never matches more than it says.

    Raises:
        ValueError: If ``model.experts``, ``model.router`` and ``lora.attention`` do not fit the model, or
            leave no weight that gets LoRA.
    """
    layers = moe_layers(model)
    _check_settings(model, config, layers)
    attention = lora_targets(model, feed_forward=not is_mixture(model)) if lora.attention else []
    fused = [f"{layer.name}.experts.{weight}" for layer in layers.values() for weight in layer.weights]
    replaced = [f"{name}.experts" for name in layers] if config.experts is ExpertTraining.full else []
    if config.router is not RouterTraining.frozen:
        replaced += [layer.router for layer in layers.values() if layer.router is not None]
    adapted = fused if config.experts is ExpertTraining.lora else []
    if not (attention or adapted):
        raise ValueError("no weight gets LoRA, without which PEFT makes no adapter: set lora.attention=true")
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        # PEFT divides it by the rank and takes any number, whatever its annotation says.
        lora_alpha=cast("int", lora.alpha),
        target_modules=attention,
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in attention),
        target_parameters=adapted or None,
        modules_to_save=replaced or None,
    )


def _check_settings(model: PreTrainedModel, config: ModelConfig, layers: dict[str, MoeLayer]) -> None:
    """Raise ``ValueError`` if experts or routers are to be trained that are not there or not recognised."""
    family = f"model.name={config.name} ({type(model).__name__})"
    if not layers and is_mixture(model):
        if config.experts is not ExpertTraining.frozen:
            raise ValueError(
                f"{family} has experts, but none as fused 3-D parameters of a module named 'experts' beside a router, "
                f"so model.experts={config.experts.value} would leave every routed expert untrained; set "
                "model.experts=frozen to train the rest"
            )
    elif not layers and config.experts is ExpertTraining.full:
        raise ValueError(f"{family} is dense: model.experts=full has no expert to train; set model.experts=lora")
    if config.router is RouterTraining.frozen:
        return
    if not layers or any(layer.router is None for layer in layers.values()):
        raise ValueError(
            f"{family} has no router that could be trained; model.router must be frozen, got {config.router.value}"
        )


def train_replaced_in_float32(model: peft.PeftModel, layers: dict[str, MoeLayer]) -> None:
    """Make the copies in ``modules_to_save`` float32, and train of an expert module only its 3-D weights.

    The experts' biases (GPT-OSS) stay those of the base.
    """
    for path, module in _adapted_modules(model):
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        replacement = module.modules_to_save[ADAPTER]
        dtype = next(replacement.parameters()).dtype
        if dtype != torch.float32:
            _run_in_float32(replacement, dtype)
        layer = layers.get(path.removesuffix(".experts"))
        for name, parameter in replacement.named_parameters():
            parameter.requires_grad_(layer is None or name in layer.weights)


def _run_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    """Make the module float32 inside a model of ``dtype``: its floating inputs are widened, its outputs narrowed."""

    def widen(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:  # noqa: ARG001
        return tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)

    def narrow(module: nn.Module, inputs: Any, outputs: Any) -> Any:  # noqa: ARG001
        if isinstance(outputs, torch.Tensor):
            return outputs.to(dtype)
        return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in outputs)

    module.float()
    module.register_forward_pre_hook(widen)
    module.register_forward_hook(narrow)


def adapter_slots(model: peft.PeftModel) -> dict[str, Slot]:
    """Every trainable parameter under our name for it, in the order of the model's modules."""
    slots: dict[str, Slot] = {}
    for path, module in _adapted_modules(model):
        if isinstance(module, ParamWrapper):
            name = f"{path}.{module.parameter_name}"
            slots[f"{name}.lora_A"], slots[f"{name}.lora_B"] = expert_slots(module)
        elif isinstance(module, LoraLayer):
            slots[f"{path}.lora_A"] = Slot(_weight(module.lora_A), Packing.plain)
            slots[f"{path}.lora_B"] = Slot(_weight(module.lora_B), Packing.plain)
        else:
            originals = dict(module.original_module.named_parameters())
            for name, parameter in module.modules_to_save[ADAPTER].named_parameters():
                if parameter.requires_grad:
                    slots[f"{path}.{name}"] = Slot(parameter, Packing.plain, base=originals[name])
    return slots


def expert_slots(wrapper: ParamWrapper) -> tuple[Slot, Slot]:
    """A and B of one fused parameter: (E, R, I) and (E, O, R) when unpacked."""
    return (
        Slot(_weight(wrapper.lora_A), Packing.expert_a, wrapper.num_experts),
        Slot(_weight(wrapper.lora_B), Packing.expert_b, wrapper.num_experts),
    )


def _weight(factor: nn.ModuleDict) -> nn.Parameter:
    weight = factor[ADAPTER].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _adapted_modules(model: peft.PeftModel) -> Iterator[tuple[str, LoraLayer | ModulesToSaveWrapper]]:
    """PEFT's wrappers, each with the path of what it wraps in the base model.

    The wrappers of two parameters of one module are nested: the path of the inner one
    ends in ``.base_layer``, and only its ``parameter_name`` says which parameter it adapts.
    """
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, (LoraLayer, ModulesToSaveWrapper)):
            yield path.replace(".base_layer", ""), module
