"""One step of every expert of a layer, from the adapters of all sites: in the space of factors or of products.

Shapes: C sites, E experts, G groups of an expert, D values of a group, P LoRA pairs of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies import low_rank
from strategies.adapters import Arrays
from strategies.change_span import changes_of
from strategies.conflicts import (
    ALONG_CONSENSUS,
    Against,
    Block,
    ConflictConfig,
    Granularity,
    Verdict,
    join,
    measures,
    resolve,
    scaled,
    split,
)
from strategies.low_rank import Factors

Weigh = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""(C, E) norms of the updates -> (C, E) weights of the sites in each expert."""


def step_factors(
    received: Arrays, trained: Sequence[Arrays], weigh: Weigh, conflict: ConflictConfig
) -> tuple[dict[str, NDArray[np.floating]], dict[str, NDArray[np.float64]]]:
    """The next expert arrays (E, ...) from those of each site, as vectors of what is exchanged."""
    blocks = split(received, trained, conflict.granularity)
    norms_CE = np.sqrt(sum(block.squared.sum(axis=-1) for block in blocks.values()))
    weights_CE = weigh(norms_CE)
    stepped: dict[str, NDArray[np.floating]] = {}
    verdicts = []
    for names, block in blocks.items():
        step_EGD, verdict = _step_of_block(block, weights_CE, conflict.against)
        steps = join(names, step_EGD, received, conflict.granularity)
        stepped |= {name: received[name] + step for name, step in steps.items()}
        verdicts.append(verdict)
    return stepped, {"weight": weights_CE} | measures(verdicts, weights_CE, norms_CE)


def _step_of_block(
    block: Block, weights_CE: NDArray[np.float64], against: Against
) -> tuple[NDArray[np.float32], Verdict]:
    """(E, G, D) the step, and what was found on the way."""
    if against not in ALONG_CONSENSUS:
        factor_CEG, verdict = resolve(block.gram(), weights_CE, against)
        return block.weighted(factor_CEG), verdict
    consensus_EGD = block.weighted(weights_CE[..., None])
    scale_EG, verdict = scaled(block.dots(consensus_EGD), block.squared, weights_CE, against)
    return scale_EG[..., None].astype(np.float32) * consensus_EGD, verdict


def step_products(
    received: Arrays, trained: Sequence[Arrays], weigh: Weigh, conflict: ConflictConfig
) -> tuple[dict[str, NDArray[np.floating]], dict[str, NDArray[np.float64]]]:
    """As ``step_factors``, but on the products: B A + sum_i factor_i (B_i A_i - B A), truncated to the rank of A.

    ``lost_energy`` (E,): largest share of a projection's squared norm that the truncation dropped.
    """
    prefixes = low_rank.lora_prefixes(received)
    before = [low_rank.factors_of(received, prefix) for prefix in prefixes]
    after = [[low_rank.factors_of(arrays, prefix) for arrays in trained] for prefix in prefixes]
    gram_EPCC = np.stack([changes_of(*pair).gram() for pair in zip(before, after, strict=True)], axis=1)
    norms_CE = np.sqrt(np.maximum(np.einsum("epcc->ce", gram_EPCC), 0.0))
    weights_CE = weigh(norms_CE)
    by_matrix = conflict.granularity is Granularity.matrix
    gram_EGCC = gram_EPCC if by_matrix else gram_EPCC.sum(axis=1, keepdims=True)
    factor_CEG, verdict = resolve(gram_EGCC, weights_CE, conflict.against)
    used_E = weights_CE.sum(axis=0) > 0
    stepped: dict[str, NDArray[np.floating]] = {}
    lost = []
    for p, prefix in enumerate(prefixes):
        new, lost_E = _step_along(before[p], after[p], factor_CEG[..., p if by_matrix else 0])
        for end, factor, kept in zip((".lora_A", ".lora_B"), new, before[p], strict=True):
            stepped[prefix + end] = np.where(used_E[:, None, None], factor, kept)
        lost.append(lost_E)
    lost_E = np.where(used_E, np.max(lost, axis=0), np.nan)
    return stepped, {"weight": weights_CE} | measures([verdict], weights_CE, norms_CE) | {"lost_energy": lost_E}


def _step_along(
    before: Factors, after: Sequence[Factors], factor_CE: NDArray[np.float64]
) -> tuple[Factors, NDArray[np.float64]]:
    """``B A + sum_i factor_i (B_i A_i - B A)`` at the rank of A, and (E,) the share of its squared norm so lost."""
    weights = np.vstack([1.0 - factor_CE.sum(axis=0), factor_CE])
    total = low_rank.weighted_sum([before, *after], weights)
    kept, lost_E = low_rank.truncate(total, before.A.shape[-2])
    return low_rank.turned_towards(kept, before.A), lost_E
