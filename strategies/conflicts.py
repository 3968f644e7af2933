"""Where sites pull an expert in opposite directions, and what is left of their updates: rules on stacked arrays.

Shapes: C sites, E experts, G groups of values inside an expert, D values of a group. Each (expert, group) is one
vector a site. Every rule takes inner products of the sites' updates and ``weights_CE`` (each column sums to 1, or to 0
for an expert nobody used), and says how often each update, or their weighted sum, is in the step: no projected update
is ever formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import Arrays
from strategies.base import require
from strategies.quotient import CANCELLED, divided

_Real = TypeVar("_Real", bound=np.floating)
_PIECE = 1024
"""Values of a piece of an inner product."""

# Enums carry lower-case member names because OmegaConf matches settings by member name.


class Space(Enum):
    """What counts as an expert's update."""

    factors = "factors"
    """The arrays that are exchanged: both LoRA factors of all projections, or whole weights, as one vector."""
    product = "product"
    """The change of the products B A of all projections; the result is truncated to the adapter's rank."""


class Granularity(Enum):
    """Which parts of an expert have a consensus, a conflict test and a projection of their own."""

    expert = "expert"
    """The expert as a whole, as in the paper."""
    matrix = "matrix"
    """Each projection; the two factors of a LoRA pair go together."""
    component = "component"
    """Each rank component of each LoRA pair: row r of A with column r of B."""
    row = "row"
    """Each row of each array as it is stored: of A, of B, or of a whole weight."""


class Against(Enum):
    """What a site's update is tested against."""

    consensus = "consensus"
    """The weighted mean of all sites, as in the paper."""
    others = "others"
    """The weighted mean of the other sites."""
    pairwise = "pairwise"
    """Every other site in turn, in the order of their names (PCGrad, which draws the order at random)."""
    off = "off"
    """Nothing: conflicts with the consensus are reported and left alone (ablation)."""


ALONG_CONSENSUS = {Against.consensus, Against.off}
"""The rules whose step is a multiple of the consensus: they need no inner products of sites with each other."""


@dataclass(kw_only=True)
class ConflictConfig:
    """How FC-MoE tests for conflicts and projects them away."""

    space: Space = Space.factors
    granularity: Granularity = Granularity.expert
    against: Against = Against.consensus

    def __post_init__(self) -> None:
        if self.space is Space.product:
            condition = "with strategy.conflict.space=product"
            whole = self.granularity in {Granularity.expert, Granularity.matrix}
            require(whole, "strategy.conflict.granularity", f"expert or matrix {condition}", self.granularity.name)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found in one block of groups, all (expert, group) vectors of the same projections."""

    dots: NDArray[np.float64]
    """(C, E) <update, consensus>, summed over the groups."""
    squared: NDArray[np.float64]
    """(E,) ||consensus||^2, summed over the groups."""
    along: NDArray[np.float64]
    """(E,) <step, consensus>, summed over the groups."""
    conflict: NDArray[np.bool_]
    """(C, E, G) whether the site was in conflict with what it was tested against."""


def resolve(
    gram_EGCC: NDArray[np.float64], weights_CE: NDArray[np.float64], against: Against
) -> tuple[NDArray[np.float64], Verdict]:
    """(C, E, G) factor of each update in the step: the weighted sum after projection, and what was found on the way.

    ``gram_EGCC`` are the inner products of the updates.
    """
    weights_CEG = np.broadcast_to(weights_CE[..., None], (*weights_CE.shape, gram_EGCC.shape[1]))
    dots_CEG = np.einsum("egcd,deg->ceg", gram_EGCC, weights_CEG)
    own_CEG = np.moveaxis(np.diagonal(gram_EGCC, axis1=-2, axis2=-1), -1, 0)
    if against in ALONG_CONSENSUS:
        scale_EG, verdict = scaled(dots_CEG, own_CEG, weights_CE, against)
        return weights_CEG * scale_EG, verdict
    if against is Against.others:
        factor_CEG, conflict_CEG = _against_others(own_CEG, weights_CEG, dots_CEG)
    else:
        factor_CEG, conflict_CEG = _against_each(gram_EGCC, weights_CEG)
    squared_EG = _squared(dots_CEG, own_CEG, weights_CEG)
    return factor_CEG, _verdict(dots_CEG, squared_EG, np.einsum("ceg,ceg->e", factor_CEG, dots_CEG), conflict_CEG)


def scaled(
    dots_CEG: NDArray[np.float64], own_CEG: NDArray[np.float64], weights_CE: NDArray[np.float64], against: Against
) -> tuple[NDArray[np.float64], Verdict]:
    """(E, G) how many times the consensus the step is, for the rules of ``ALONG_CONSENSUS``, and what was found.

    Args:
        dots_CEG: Inner product of each update with the consensus, ``sum_i w_i update_i``.
        own_CEG: Squared length of each update.
        weights_CE: Of the sites.
        against: One of ``ALONG_CONSENSUS``.
    """
    weights_CEG = np.broadcast_to(weights_CE[..., None], dots_CEG.shape)
    squared_EG = _squared(dots_CEG, own_CEG, weights_CEG)
    is_projected = against is Against.consensus
    scale_EG = step_scale(dots_CEG, squared_EG, weights_CE) if is_projected else np.ones(squared_EG.shape)
    along_E = (scale_EG * squared_EG).sum(axis=-1)
    return scale_EG, _verdict(dots_CEG, squared_EG, along_E, (dots_CEG < 0) & (weights_CEG > 0))


def _squared(
    dots_CEG: NDArray[np.float64], own_CEG: NDArray[np.float64], weights_CEG: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(E, G) ||consensus||^2; 0 where the updates cancel but for rounding, which points nowhere."""
    squared_EG = np.einsum("ceg,ceg->eg", weights_CEG, dots_CEG)
    uncancelled_EG = np.einsum("ceg,ceg->eg", weights_CEG, np.sqrt(np.maximum(own_CEG, 0.0)))
    return np.where(squared_EG > CANCELLED * uncancelled_EG**2, squared_EG, 0.0)


def _verdict(
    dots_CEG: NDArray[np.float64],
    squared_EG: NDArray[np.float64],
    along_E: NDArray[np.float64],
    conflict_CEG: NDArray[np.bool_],
) -> Verdict:
    dots_CE, squared_E = dots_CEG.sum(axis=-1), squared_EG.sum(axis=-1)
    return Verdict(dots=dots_CE, squared=squared_E, along=along_E, conflict=conflict_CEG)


def step_scale(
    dots_CEG: NDArray[np.float64], squared_EG: NDArray[np.float64], weights_CE: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(E, G) factor 1 + s >= 1 that FC-MoE's projection comes to.

    With g the consensus and d_i the updates, projecting those with <d_i, g> < 0 on the normal plane of g and
    summing with the consensus' own weights gives

        sum_i w_i d_i^proj = (1 + s) g,     s = sum over conflicting i of  w_i |<d_i, g>| / ||g||^2

    so no projected update is ever formed. 1 where the consensus is zero.
    """
    opposing_EG = np.einsum("ce,ceg->eg", weights_CE, np.maximum(-dots_CEG, 0.0))
    return 1.0 + divided(opposing_EG, squared_EG, 0.0)


def _against_others(
    own_CEG: NDArray[np.float64], weights_CEG: NDArray[np.float64], dots_CEG: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each update is projected on the normal plane of the others' weighted sum, which a site cannot hide itself in.

    With o_i = g - w_i d_i and t_i = min(0, <w_i d_i, o_i>) / ||o_i||^2 the step is sum_i w_i d_i - t_i o_i.
    """
    length_CEG = weights_CEG * np.sqrt(np.maximum(own_CEG, 0.0))
    uncancelled_CEG = length_CEG.sum(axis=0) - length_CEG
    with_own_CEG = weights_CEG * own_CEG
    with_others_CEG = weights_CEG * (dots_CEG - with_own_CEG)
    squared_EG = np.einsum("ceg,ceg->eg", weights_CEG, dots_CEG)
    others_CEG = squared_EG - 2 * weights_CEG * dots_CEG + weights_CEG * with_own_CEG
    others_CEG = np.where(others_CEG > CANCELLED * uncancelled_CEG**2, others_CEG, 0.0)
    opposing_CEG = divided(np.minimum(with_others_CEG, 0.0), others_CEG, 0.0)
    return weights_CEG * (1.0 - opposing_CEG.sum(axis=0) + opposing_CEG), opposing_CEG < 0


def _against_each(
    gram_EGCC: NDArray[np.float64], weights_CEG: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """PCGrad (Yu et al., 2020, Algorithm 1, https://arxiv.org/abs/2001.06782), weighted.

    The projected update meets the other sites' original ones; those that did not use the expert take no part.
    """
    used_CEG = weights_CEG > 0
    factor_CEG = np.zeros(weights_CEG.shape)
    conflict_CEG = np.zeros(weights_CEG.shape, np.bool_)
    for site in range(len(weights_CEG)):
        projected_CEG = np.zeros(weights_CEG.shape)
        projected_CEG[site] = 1.0
        for other in range(len(weights_CEG)):
            if other != site:
                dot_EG = np.einsum("egc,ceg->eg", gram_EGCC[:, :, other], projected_CEG)
                dot_EG = np.where(used_CEG[site] & used_CEG[other], np.minimum(dot_EG, 0.0), 0.0)
                projected_CEG[other] -= divided(dot_EG, gram_EGCC[:, :, other, other], 0.0)
                conflict_CEG[site] |= dot_EG < 0
        factor_CEG += weights_CEG[site] * projected_CEG
    return factor_CEG, conflict_CEG


@dataclass(frozen=True)
class Block:
    """The sites' updates of the groups in some arrays, and their inner products, multiplied in float32."""

    updates: NDArray[np.float32]
    """(E, G, C, D) trained minus received."""

    @cached_property
    def squared(self) -> NDArray[np.float64]:
        """(C, E, G) squared length of each update."""
        return np.moveaxis(_dots(self.updates, self.updates), -1, 0)

    def weighted(self, factor_CEG: NDArray[np.float64]) -> NDArray[np.float32]:
        """(E, G, D) ``sum_i factor_i update_i``."""
        factor_EGC = np.moveaxis(factor_CEG, 0, -1).astype(np.float32)
        return np.asarray((factor_EGC[:, :, None, :] @ self.updates)[:, :, 0])

    def dots(self, vector_EGD: NDArray[np.float32]) -> NDArray[np.float64]:
        """(C, E, G) of each update with a vector of its group."""
        return np.moveaxis(_dots(self.updates, vector_EGD[:, :, None]), -1, 0)

    def gram(self) -> NDArray[np.float64]:
        """(E, G, C, C) of each update with each."""
        return np.asarray(self.updates @ np.swapaxes(self.updates, -1, -2), np.float64)


def _dots(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """(...) inner products along the last axis, piece by piece.

    NumPy keeps other threads waiting for functions with few results, however long they take.
    """
    length = math.gcd(left.shape[-1], _PIECE)
    pieces = [np.reshape(array, (*array.shape[:-1], -1, length)) for array in (left, right)]
    return np.asarray(np.vecdot(*pieces).sum(axis=-1, dtype=np.float64))


def split(received: Arrays, trained: Sequence[Arrays], granularity: Granularity) -> dict[tuple[str, ...], Block]:
    """Names of the arrays in a block -> the updates of its groups.

    Takes expert arrays (E, ...) of one layer, ``trained`` of each site.
    """
    blocks: dict[str, list[str]] = {}
    for name in received:
        projection = name.removesuffix(".lora_A").removesuffix(".lora_B")
        key = {Granularity.expert: "", Granularity.row: name}.get(granularity, projection)
        blocks.setdefault(key, []).append(name)
    return {tuple(names): _block(names, received, trained, granularity) for names in blocks.values()}


def _block(names: Sequence[str], received: Arrays, trained: Sequence[Arrays], granularity: Granularity) -> Block:
    befores = [_as_groups(received[name], name, granularity) for name in names]
    ends = np.cumsum([before.shape[-1] for before in befores])
    updates_EGCD = np.empty((*befores[0].shape[:2], len(trained), ends[-1]), np.float32)
    for name, before, end in zip(names, befores, ends, strict=True):
        part_EGCD = updates_EGCD[..., end - before.shape[-1] : end]
        for site, arrays in enumerate(trained):
            np.subtract(_as_groups(arrays[name], name, granularity), before, out=part_EGCD[:, :, site])
    return Block(updates_EGCD)


def join(
    names: Sequence[str], step_EGD: NDArray[_Real], like: Arrays, granularity: Granularity
) -> dict[str, NDArray[_Real]]:
    """Arrays (E, ...) of one block from its groups: what ``split`` did, undone for one site."""
    widths = [_as_groups(like[name], name, granularity).shape[-1] for name in names]
    arrays = {}
    for name, part in zip(names, np.split(step_EGD, np.cumsum(widths)[:-1], axis=-1), strict=True):
        is_column = granularity is Granularity.component and name.endswith(".lora_B")
        arrays[name] = np.swapaxes(part, -1, -2) if is_column else part.reshape(like[name].shape)
    return arrays


def _as_groups(array: NDArray[_Real], name: str, granularity: Granularity) -> NDArray[_Real]:
    """(E, G, D) view of an expert array (E, ...)."""
    if granularity is Granularity.component:
        return np.swapaxes(array, -1, -2) if name.endswith(".lora_B") else array
    num_groups = array.shape[1] if granularity is Granularity.row and array.ndim > 2 else 1
    return array.reshape(len(array), num_groups, -1)


def measures(
    verdicts: Sequence[Verdict], weights_CE: NDArray[np.float64], norms_CE: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Findings over all blocks, with the expert on the last axis and NaN where there is nothing to say.

    ``cosine`` (C, E): between a site's update of the whole expert and the consensus. ``conflict`` (C, E): share of
    the expert's groups in which a site that used it was in conflict, so 0 or 1 for granularity=expert. ``scale`` (E,):
    <step, consensus> / ||consensus||^2, which is 1 + s for against=consensus, and with finer groups the mean of
    their 1 + s weighted by ||consensus||^2.
    """
    squared_E = np.sum([verdict.squared for verdict in verdicts], axis=0)
    lengths_CE = np.where(weights_CE > 0, norms_CE * np.sqrt(squared_E), 0.0)
    dots_CE = np.sum([verdict.dots for verdict in verdicts], axis=0)
    along_E = np.sum([verdict.along for verdict in verdicts], axis=0)
    conflict_CEG = np.concatenate([verdict.conflict for verdict in verdicts], axis=-1)
    return {
        "cosine": divided(dots_CE, lengths_CE, otherwise=np.nan),
        "conflict": np.where(weights_CE > 0, conflict_CEG.mean(axis=-1), np.nan),
        "scale": divided(along_E, squared_E, otherwise=np.nan),
    }
