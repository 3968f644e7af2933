"""How far sites' updates lie from each other as plain vectors: what a shared row space cannot show.

CLAIR lets sites differ inside the shared row space as they like, and looks at LoRA pairs alone. An update that is
turned around inside that space, or a poisoned router, shows up here.

Shapes: K sites, G pairs of sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import Arrays
from strategies.base import ClientUpdate
from strategies.collaborative_set import MIN_SITES, Verdict, judge
from strategies.product_cores import pairs_of

_COPY = 0.01
"""Two updates are copies when their distance is below this share of the lower quartile of all pairs: with fewer than
half contaminated, at least a quarter of the pairs is benign, and less than a quarter is of colluders."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One kind of arrays, as one vector a site."""

    kind: str
    """``LoRA factors`` or ``whole weights``."""
    verdict: Verdict
    is_copy: NDArray[np.bool_]
    """(K,) whether another site sent the same."""


def compare(received: Arrays, updates: Sequence[ClientUpdate], *, agreement: float, min_gap: float) -> list[Compared]:
    """Verdicts on the changes (trained minus received) of LoRA factors, and of arrays trained as whole weights.

    The same rule as on distances outside the shared row space: ``judge``. Of copies, all are marked: honest training on
    different data never gives the same twice, colluding attackers may (as in FoolsGold, Fung et al., 2018,
    https://arxiv.org/abs/1808.04866). Noise on the copies hides them.
    """
    factors = [name for name in received if name.endswith((".lora_A", ".lora_B"))]
    kinds = {"LoRA factors": factors, "whole weights": [name for name in received if name not in set(factors)]}
    compared = []
    for kind, names in kinds.items():
        if names and len(updates) >= 2:
            distance_G, length_G = _distances(received, updates, names)
            verdict = judge(distance_G, len(updates), agreement=agreement, min_gap=min_gap, length_G=length_G)
            enough = len(updates) >= MIN_SITES
            is_copy = _copies(distance_G, len(updates)) if enough else np.zeros(len(updates), bool)
            compared.append(Compared(kind=kind, verdict=verdict, is_copy=is_copy))
    return compared


def _distances(
    received: Arrays, updates: Sequence[ClientUpdate], names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(G,) distances, and the longer update of each pair.

    Through inner products summed array by array, so that no site's update is ever held as one vector.
    """
    gram = np.zeros((len(updates), len(updates)))
    for name in names:
        changes = np.stack([(update.adapter[name] - received[name]).ravel() for update in updates]).astype(np.float64)
        gram += changes @ changes.T
    j, k = pairs_of(len(updates)).T
    squares = gram[j, j] + gram[k, k] - 2 * gram[j, k]
    return np.sqrt(np.maximum(squares, 0.0)), np.sqrt(np.maximum(gram[j, j], gram[k, k]))


def _copies(distance_G: NDArray[np.float64], num_sites: int) -> NDArray[np.bool_]:
    is_copy = np.zeros(num_sites, bool)
    close = distance_G < _COPY * np.quantile(distance_G, 0.25)
    is_copy[pairs_of(num_sites)[close].ravel()] = True
    return is_copy
