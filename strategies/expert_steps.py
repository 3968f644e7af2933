"""One step of every expert of a layer, from the adapters of all sites: in the space of factors or of products.

Shapes: C sites, E experts, G groups of an expert, D values of a group, P LoRA pairs of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies import low_rank
from strategies.adapters import Arrays
from strategies.conflicts import (
    Against,
    ConflictConfig,
    Granularity,
    Verdict,
    gram,
    join,
    measures,
    resolve,
    split,
    step_scale,
    weighted,
)
from strategies.low_rank import Factors

Weigh = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""(C, E) norms of the updates -> (C, E) weights of the sites in each expert."""


def step_factors(
    received: Arrays, trained: Sequence[Arrays], weigh: Weigh, conflict: ConflictConfig
) -> tuple[dict[str, NDArray[np.floating]], dict[str, NDArray[np.float64]]]:
    """The next expert arrays (E, ...) from those of each site, as vectors of what is exchanged."""
    blocks = split(received, trained, conflict.granularity)
    grams = {names: gram(updates_EGCD) for names, updates_EGCD in blocks.items()}
    squared_EC = sum(np.einsum("egcc->ec", gram_EGCC) for gram_EGCC in grams.values())
    norms_CE = np.sqrt(np.transpose(squared_EC))
    weights_CE = weigh(norms_CE)
    stepped: dict[str, NDArray[np.floating]] = {}
    verdicts = []
    for names, updates_EGCD in blocks.items():
        factor_CEG, verdict = resolve(grams[names], weights_CE, conflict.against)
        steps = join(names, weighted(updates_EGCD, factor_CEG), received, conflict.granularity)
        stepped |= {name: received[name] + step for name, step in steps.items()}
        verdicts.append(verdict)
    return stepped, {"weight": weights_CE} | measures(verdicts, weights_CE, norms_CE)


def step_products(
    received: Arrays, trained: Sequence[Arrays], weigh: Weigh, conflict: ConflictConfig
) -> tuple[dict[str, NDArray[np.floating]], dict[str, NDArray[np.float64]]]:
    """As ``step_factors``, but on the products: B A + (1 + s) (sum_i w_i B_i A_i - B A), truncated to the rank of A.

    ``lost_energy`` (E,): largest share of a projection's squared norm that the truncation dropped.
    """
    prefixes = low_rank.lora_prefixes(received)
    before = [low_rank.factors_of(received, prefix) for prefix in prefixes]
    after = [low_rank.stacked([low_rank.factors_of(arrays, prefix) for arrays in trained]) for prefix in prefixes]
    changes = [low_rank.change(*pair) for pair in zip(after, before, strict=True)]
    norms_CE = np.sqrt(np.sum([low_rank.squared_norm(change) for change in changes], axis=0))
    weights_CE = weigh(norms_CE)
    used_E = weights_CE.sum(axis=0) > 0
    verdict, scale_EP = _judge_products(changes, weights_CE, conflict)
    stepped: dict[str, NDArray[np.floating]] = {}
    lost_EP = np.zeros_like(scale_EP)
    for p, prefix in enumerate(prefixes):
        new, lost_EP[:, p] = _step_along(before[p], after[p], weights_CE * scale_EP[:, p])
        for end, factor, kept in zip((".lora_A", ".lora_B"), new, before[p], strict=True):
            stepped[prefix + end] = np.where(used_E[:, None, None], factor, kept)
    lost_E = np.where(used_E, lost_EP.max(axis=-1), np.nan)
    return stepped, {"weight": weights_CE} | measures([verdict], weights_CE, norms_CE) | {"lost_energy": lost_E}


def _judge_products(
    changes: Sequence[Factors], weights_CE: NDArray[np.float64], conflict: ConflictConfig
) -> tuple[Verdict, NDArray[np.float64]]:
    """What was found, and (E, P) factor 1 + s of each product, from the sites' changes (C, E) of each."""
    means = [low_rank.weighted_sum(_per_site(change), weights_CE) for change in changes]
    dots_CEG = np.stack([low_rank.inner_product(*pair) for pair in zip(changes, means, strict=True)], axis=-1)
    squared_EG = np.stack([low_rank.squared_norm(mean) for mean in means], axis=-1)
    if conflict.granularity is Granularity.expert:
        dots_CEG, squared_EG = dots_CEG.sum(axis=-1, keepdims=True), squared_EG.sum(axis=-1, keepdims=True)
    is_projected = conflict.against is Against.consensus
    scale_EG = step_scale(dots_CEG, squared_EG, weights_CE) if is_projected else np.ones_like(squared_EG)
    verdict = Verdict(
        dots=dots_CEG.sum(axis=-1),
        squared=squared_EG.sum(axis=-1),
        along=(scale_EG * squared_EG).sum(axis=-1),
        conflict=(dots_CEG < 0) & (weights_CE > 0)[..., None],
    )
    return verdict, np.broadcast_to(scale_EG, (weights_CE.shape[1], len(changes)))


def _step_along(before: Factors, after: Factors, scaled_CE: NDArray[np.float64]) -> tuple[Factors, NDArray[np.float64]]:
    """``B A + sum_i w_i (B_i A_i - B A)`` at the rank of A, and (E,) the share of its squared norm that was lost."""
    weights = np.vstack([1.0 - scaled_CE.sum(axis=0), scaled_CE])
    total = low_rank.weighted_sum([before, *_per_site(after)], weights)
    kept, lost_E = low_rank.truncate(total, before.A.shape[-2])
    return low_rank.turned_towards(kept, before.A), lost_E


def _per_site(stacked: Factors) -> list[Factors]:
    return [Factors(*pair) for pair in zip(*stacked, strict=True)]
