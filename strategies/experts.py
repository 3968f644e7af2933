"""Which arrays have an expert axis, and the arithmetic that treats every expert as a vector of its own.

Shapes: C sites, E experts of one MoE layer; an expert array is (E, ...) with the expert on axis 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import Arrays, check_same_layout

# The leading dot keeps `mlp.shared_experts.up_proj` out: a shared expert is a dense block.
_MARK = ".experts."


def is_expert_array(name: str) -> bool:
    """Whether the array belongs to routed experts and so has the expert on axis 0."""
    return _MARK in name


def layer_of(name: str) -> str:
    """MoE layer of an expert array, the key of ``expert_tokens``: ``model.layers.0.mlp``.

    Raises:
        ValueError: If the array has no expert axis.
    """
    layer, mark, _ = name.partition(_MARK)
    if not mark:
        raise ValueError(f"{name} has no expert axis")
    return layer


def is_router_array(name: str) -> bool:
    """Whether the array belongs to a router: only experts and routers are ever trained as whole weights."""
    return not is_expert_array(name) and not name.endswith((".lora_A", ".lora_B"))


def by_layer(adapter: Arrays) -> dict[str, dict[str, NDArray[np.floating]]]:
    """MoE layer -> its expert arrays, both in the order of their names; empty for a dense model."""
    layers: dict[str, dict[str, NDArray[np.floating]]] = {}
    for name in sorted(filter(is_expert_array, adapter)):
        layers.setdefault(layer_of(name), {})[name] = adapter[name]
    return layers


def num_experts(arrays: Arrays) -> int:
    """Number of experts in the expert arrays of one layer.

    Raises:
        ValueError: If there are none, or they disagree.
    """
    sizes = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"arrays of one layer must have the same number of experts, got {sizes}")
    return int(next(iter(sizes.values())))


def dots(left: Arrays, right: Arrays) -> NDArray[np.float64]:
    """(E,) inner product of each expert of one layer, flattened over all its arrays, in float64.

    Raises:
        ValueError: If the two differ in their names or shapes, or the arrays in their number of experts.
    """
    check_same_layout(left, right)
    total_E = np.zeros(num_experts(left), np.float64)
    for name in left:
        left_ED = left[name].reshape(len(total_E), -1).astype(np.float64)
        total_E += np.einsum("ed,ed->e", left_ED, right[name].reshape(left_ED.shape).astype(np.float64))
    return total_E


def norms(arrays: Arrays) -> NDArray[np.float64]:
    """(E,) Euclidean length of each expert of one layer, flattened over all its arrays."""
    return np.sqrt(dots(arrays, arrays))


def shares(importance_CE: NDArray[np.floating]) -> NDArray[np.float64]:
    """(C, E) weights of the sites in each expert: a column sums to 1, or is all 0 where no site has any importance.

    Raises:
        ValueError: If an importance is negative or not finite.
    """
    if not np.isfinite(importance_CE).all() or (importance_CE < 0).any():
        raise ValueError("importance must be finite and >= 0")
    total_E = importance_CE.sum(axis=0, dtype=np.float64)
    return importance_CE / np.where(total_E > 0, total_E, 1.0)


def weighted_mean(
    received: Arrays, trained: Sequence[Arrays], weights_CE: NDArray[np.floating]
) -> dict[str, NDArray[np.float32]]:
    """Mean of each expert of one layer over the sites, summed in float64; an expert of total weight 0 keeps its value.

    Args:
        received: Expert arrays of one layer before the round.
        trained: The same after it, one a site.
        weights_CE: Weight of each site in each expert, on any scale.

    Raises:
        ValueError: If names, shapes or the number of sites or experts differ, or a weight is negative or not finite.
    """
    if weights_CE.shape != (len(trained), num_experts(received)):
        expected = (len(trained), num_experts(received))
        raise ValueError(f"weights must have the shape (sites, experts) = {expected}, got {weights_CE.shape}")
    for arrays in trained:
        check_same_layout(received, arrays)
    share_CE = shares(weights_CE)
    mean = {}
    for name, before in received.items():
        per_expert = (-1, *[1] * (before.ndim - 1))
        accumulated = np.zeros(before.shape, np.float64)
        for share_E, arrays in zip(share_CE, trained, strict=True):
            accumulated += arrays[name] * share_E.reshape(per_expert)
        is_used = share_CE.any(axis=0).reshape(per_expert)
        mean[name] = np.where(is_used, accumulated, before).astype(np.float32)
    return mean


def expert_slices(arrays: Mapping[str, NDArray[np.floating]], num_sites: int, limit: int = 2**23) -> list[slice]:
    """Ranges of experts whose values over all sites number at most ``limit`` (or one expert), covering one layer.

    All take as long, give or take an expert: threads that share them end together.

    The default keeps a float64 copy of one range of every site's update at 64 MiB, whatever the layer's size.
    """
    count = num_experts(arrays)
    values_per_expert = num_sites * sum(array[0].size for array in arrays.values())
    num_slices = math.ceil(count / max(1, limit // max(1, values_per_expert)))
    edges = [count * place // num_slices for place in range(num_slices + 1)]
    return list(itertools.starmap(slice, itertools.pairwise(edges)))
