"""What sites send in a round of a given size, made up: random updates that are nearly orthogonal, as real ones are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from strategies.adapters import Arrays
from strategies.base import ClientUpdate
from strategies.experts import by_layer
from strategies.fedalign_moe import MARGIN, PROBABILITY, SEMANTICS
from strategies.fedcmoo import GRADIENT, SHARES
from strategies.scaffold import CONTROL


@dataclass(frozen=True)
class Size:
    """Sites, and the LoRA adapter each of them sends, in an OLMoE of this shape."""

    sites: int = 16
    layers: int = 7
    hidden: int = 1024
    width: int = 512
    """Inner width of an expert."""
    experts: int = 64
    rank: int = 8

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Array name -> shape: LoRA on attention and experts, and whole routers."""
        h, w, e, r = self.hidden, self.width, self.experts, self.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            for name in "qkvo":
                prefix = f"model.layers.{layer}.self_attn.{name}_proj.lora_"
                shapes |= {f"{prefix}A": (r, h), f"{prefix}B": (h, r)}
            moe = f"model.layers.{layer}.mlp"
            shapes[f"{moe}.gate.weight"] = (e, h)
            shapes |= {
                f"{moe}.experts.gate_up_proj.lora_A": (e, r, h),
                f"{moe}.experts.gate_up_proj.lora_B": (e, 2 * w, r),
                f"{moe}.experts.down_proj.lora_A": (e, r, w),
                f"{moe}.experts.down_proj.lora_B": (e, h, r),
            }
        return shapes

    def mebibytes(self) -> float:
        """MiB of one site's adapter."""
        return sum(4 * int(np.prod(shape)) for shape in self.shapes().values()) / 2**20


def received_adapter(size: Size) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """What the sites trained on: random factors, none of them zero."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))
        for name, shape in size.shapes().items()
    }


def sent(size: Size) -> Iterator[ClientUpdate]:
    """Each site's update: nearly orthogonal to the others, a tenth as long as the adapter; a few experts unused."""
    received = received_adapter(size)
    for site in range(size.sites):
        rng = np.random.default_rng(site + 1)
        trained = {
            name: array + rng.standard_normal(array.shape, np.float32) * np.float32(0.1 * array.std())
            for name, array in received.items()
        }
        tokens = {
            f"model.layers.{layer}.mlp": rng.integers(0, 20, size.experts).astype(np.float64)
            for layer in range(size.layers)
        }
        yield ClientUpdate(
            site=f"site-{site:02}", adapter=trained, num_examples=int(rng.integers(50, 500)), expert_tokens=tokens
        )


def extras_of(name: str, update: ClientUpdate) -> Arrays:
    """What a site sends to this strategy beside its adapter; numbers of the right shape and range."""
    if name == "scaffold":
        return {CONTROL + key: array for key, array in update.adapter.items()}
    if name == "fedcmoo":
        gradient = {GRADIENT + key: array for key, array in update.adapter.items()}
        return gradient | {SHARES: np.ones(2, np.float32)}
    if name != "fedalign_moe":
        return {}
    extras: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    for layer, arrays in by_layer(update.adapter).items():
        semantics = next(array for key, array in arrays.items() if key.endswith("down_proj.lora_B"))[:, :, 0]
        share = np.full(len(semantics), 1 / len(semantics), np.float32)
        extras |= {PROBABILITY + layer: share, MARGIN + layer: share, SEMANTICS + layer: semantics}
    return extras
