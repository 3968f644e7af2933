"""Where sites pull an expert in opposite directions, and what is left of their updates: rules on stacked arrays.

Shapes: C sites, E experts, G groups of values inside an expert, D values of a group. Every rule takes
``updates_CEGD`` (trained minus received, float64) and ``weights_CE`` (each column sums to 1, or to 0 for an
expert nobody used) and treats each (expert, group) as one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import Arrays
from strategies.base import require

_Real = TypeVar("_Real", bound=np.floating)

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
    rank = "rank"
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
            one_reference = self.against in {Against.consensus, Against.off}
            require(one_reference, "strategy.conflict.against", f"consensus or off {condition}", self.against.name)


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
    updates_CEGD: NDArray[np.float64], weights_CE: NDArray[np.float64], against: Against
) -> tuple[NDArray[np.float64], Verdict]:
    """(E, G, D) weighted sum of the updates after projection, and what was found on the way."""
    consensus_EGD = np.einsum("ce,cegd->egd", weights_CE, updates_CEGD)
    dots_CEG = np.einsum("cegd,egd->ceg", updates_CEGD, consensus_EGD)
    squared_EG = np.einsum("egd,egd->eg", consensus_EGD, consensus_EGD)
    conflict_CEG = (dots_CEG < 0) & (weights_CE > 0)[..., None]
    if against is Against.consensus:
        step_EGD = consensus_EGD * step_scale(dots_CEG, squared_EG, weights_CE)[..., None]
    elif against is Against.others:
        step_EGD, conflict_CEG = _against_others(updates_CEGD, weights_CE, consensus_EGD)
    elif against is Against.pairwise:
        step_EGD, conflict_CEG = _against_each(updates_CEGD, weights_CE)
    else:
        step_EGD = consensus_EGD
    along_E = np.einsum("egd,egd->e", step_EGD, consensus_EGD)
    return step_EGD, Verdict(
        dots=dots_CEG.sum(axis=-1), squared=squared_EG.sum(axis=-1), along=along_E, conflict=conflict_CEG
    )


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
    return 1.0 + _divided(opposing_EG, squared_EG)


def _against_others(
    updates_CEGD: NDArray[np.float64], weights_CE: NDArray[np.float64], consensus_EGD: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Each update is projected on the normal plane of the others' weighted sum, which a site cannot hide itself in."""
    step_EGD = np.zeros_like(consensus_EGD)
    conflicts = []
    for update_EGD, weight_E in zip(updates_CEGD, weights_CE, strict=True):
        own_EGD = update_EGD * weight_E[:, None, None]
        projected_EGD, conflict_EG = _on_normal_plane(own_EGD, consensus_EGD - own_EGD)
        step_EGD += projected_EGD
        conflicts.append(conflict_EG)
    return step_EGD, np.stack(conflicts)


def _against_each(
    updates_CEGD: NDArray[np.float64], weights_CE: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """PCGrad (Yu et al., 2020, Algorithm 1, https://arxiv.org/abs/2001.06782), weighted.

    The projected update meets the other sites' original ones; those that did not use the expert take no part.
    """
    used_CE = weights_CE > 0
    step_EGD = np.zeros(updates_CEGD.shape[1:])
    conflict_CEG = np.zeros(updates_CEGD.shape[:-1], np.bool_)
    for site, update_EGD in enumerate(updates_CEGD):
        projected_EGD = update_EGD * used_CE[site][:, None, None]
        for other, reference_EGD in enumerate(updates_CEGD):
            if other != site:
                projected_EGD, met_EG = _on_normal_plane(projected_EGD, reference_EGD * used_CE[other][:, None, None])
                conflict_CEG[site] |= met_EG
        step_EGD += projected_EGD * weights_CE[site][:, None, None]
    return step_EGD, conflict_CEG


def _on_normal_plane(
    vector_EGD: NDArray[np.float64], reference_EGD: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The vectors without what opposes the reference (Eq. 3 of FC-MoE), and (E, G) which of them opposed it."""
    dot_EG = np.einsum("egd,egd->eg", vector_EGD, reference_EGD)
    squared_EG = np.einsum("egd,egd->eg", reference_EGD, reference_EGD)
    opposing_EG = _divided(np.minimum(dot_EG, 0.0), squared_EG)
    return vector_EGD - opposing_EG[..., None] * reference_EGD, dot_EG < 0


def split(
    changes: Mapping[str, NDArray[np.float64]], granularity: Granularity
) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """Names of the arrays in a block -> the block's groups (C, E, G, D), from stacked expert arrays (C, E, ...)."""
    blocks: dict[str, list[str]] = {}
    for name in changes:
        projection = name.removesuffix(".lora_A").removesuffix(".lora_B")
        key = {Granularity.expert: "", Granularity.row: name}.get(granularity, projection)
        blocks.setdefault(key, []).append(name)
    grouped = {}
    for names in blocks.values():
        parts = [_as_groups(changes[name], name, granularity) for name in names]
        grouped[tuple(names)] = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
    return grouped


def join(
    names: Sequence[str], step_EGD: NDArray[np.float64], like: Arrays, granularity: Granularity
) -> dict[str, NDArray[np.float64]]:
    """Arrays (E, ...) of one block from its groups: what ``split`` did, undone for one site."""
    widths = [_as_groups(like[name][None], name, granularity).shape[-1] for name in names]
    arrays = {}
    for name, part in zip(names, np.split(step_EGD, np.cumsum(widths)[:-1], axis=-1), strict=True):
        is_column = granularity is Granularity.rank and name.endswith(".lora_B")
        arrays[name] = np.swapaxes(part, -1, -2) if is_column else part.reshape(like[name].shape)
    return arrays


def _as_groups(array: NDArray[_Real], name: str, granularity: Granularity) -> NDArray[_Real]:
    """(C, E, G, D) view of one stacked expert array (C, E, ...)."""
    if granularity is Granularity.rank:
        return np.swapaxes(array, -1, -2) if name.endswith(".lora_B") else array
    num_groups = array.shape[2] if granularity is Granularity.row and array.ndim > 3 else 1
    return array.reshape(*array.shape[:2], num_groups, -1)


def measures(
    verdicts: Sequence[Verdict], weights_CE: NDArray[np.float64], norms_CE: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Findings over all blocks, with the expert on the last axis and NaN where there is nothing to say.

    ``cosine`` (C, E): between a site's update of the whole expert and the consensus. ``conflict`` (C, E): share of
    the expert's groups in which the site was in conflict, so 0 or 1 for granularity=expert. ``scale`` (E,):
    <step, consensus> / ||consensus||^2, which is 1 + s for against=consensus, and with finer groups the mean of
    their 1 + s weighted by ||consensus||^2.
    """
    squared_E = np.sum([verdict.squared for verdict in verdicts], axis=0)
    lengths_CE = np.where(weights_CE > 0, norms_CE * np.sqrt(squared_E), 0.0)
    dots_CE = np.sum([verdict.dots for verdict in verdicts], axis=0)
    along_E = np.sum([verdict.along for verdict in verdicts], axis=0)
    conflict_CEG = np.concatenate([verdict.conflict for verdict in verdicts], axis=-1)
    return {
        "cosine": _divided(dots_CE, lengths_CE, otherwise=np.nan),
        "conflict": conflict_CEG.mean(axis=-1),
        "scale": _divided(along_E, squared_E, otherwise=np.nan),
    }


def _divided(above: NDArray[np.float64], below: NDArray[np.float64], otherwise: float = 0.0) -> NDArray[np.float64]:
    """Quotient, or ``otherwise`` where the divisor is 0."""
    return np.divide(above, below, out=np.full_like(above, otherwise), where=below > 0)
