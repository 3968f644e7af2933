"""Grafts among the adapter's arrays: what kind the settings ask for, and which tensors hold them."""

from __future__ import annotations

from collections.abc import Mapping

from client.adapter_layout import MoeLayer, Packing, Slot
from client.grafting.grafts import Graft, GraftSpec, graft_name
from conf.methods import GraftConfig, GraftForm, GraftStart
from conf.model import LoraConfig, ModelConfig


def graft_spec(config: GraftConfig, lora: LoraConfig, model: ModelConfig, layers: Mapping[str, MoeLayer]) -> GraftSpec:
    """What kind of grafts the settings ask for.

    Raises:
        ValueError: If the model's layers cannot take them.
    """
    if not layers or not all(layer.has_interface and layer.router for layer in layers.values()):
        raise ValueError(
            f"model.name={model.name} has no fused experts in transformers' experts interface beside a router that we "
            "recognise: method=flex needs a mixture of experts that has"
        )
    fewest = min(layer.num_experts for layer in layers.values())
    if config.num_experts > fewest:
        raise ValueError(f"method.graft.num_experts must be at most the model's {fewest}, got {config.num_experts}")
    return GraftSpec(
        num_experts=config.num_experts,
        rank=config.rank,
        scale=lora.alpha / config.rank if config.rank else 1.0,
        convex=config.form is GraftForm.convex,
        exact=config.start is GraftStart.exact,
    )


def graft_slots(grafts: Mapping[str, Graft]) -> dict[str, Slot]:
    """Every tensor of the layers' grafts under our name for it."""
    return {
        graft_name(layer, name): Slot(tensor, Packing.plain)
        for layer, graft in grafts.items()
        for name, tensor in (*graft.named_parameters(), *graft.named_buffers())
    }
