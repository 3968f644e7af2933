"""Who belongs together: from distances between sites to verdicts, of one matrix and of a site.

Shapes: K sites; G pairs of sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.product_cores import pairs_of

_SPREAD = 0.04
"""Added to the spread of the accepted sites' log distances: even equally good sites differ by a few percent."""
_CHANCE = 5.0
"""Sites at which a gap has to be twice as wide as among many."""
_RESOLUTION = 1e-6
"""Distances below this share of the largest one are rounding of float32 factors."""

MIN_SITES = 5
"""With fewer there is no spread of the accepted sites to measure a gap against."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one matrix says of the sites."""

    distances: NDArray[np.float64]
    """(K,) the smallest radius within which a site has ``agreement`` of the other sites."""
    threshold: float
    """Sites with a larger distance are outside the collaborative set; ``inf`` if there is no gap."""
    gap: float
    """Score of the best gap, see ``judge``; nan if none was looked for."""

    @property
    def accepted(self) -> NDArray[np.bool_]:
        """(K,) whether a site is in the collaborative set."""
        return np.asarray(self.distances <= self.threshold)


def judge(
    distance_G: NDArray[np.float64], num_sites: int, *, agreement: float, min_gap: float, threshold: float | None = None
) -> Verdict:
    """The collaborative set from the distances of all pairs of at least 2 sites.

    CLAIR, 2026, Eq. 8, https://arxiv.org/abs/2605.21217: a site belongs to it if its distances to at least
    ``agreement`` of the others are within the threshold; which is to say, if the quantile returned here is.

    Differs from the paper's largest gap, which is sought among the distances of all pairs: those between
    contaminated sites spread as widely as contamination does, and the largest gap is often among them. Here gaps are
    sought among the sites' quantiles, above as many sites as ``agreement`` needs, and measured in logarithms
    against the spread of the sites below. Among few sites wide gaps appear by chance, so the score is

        log(above / below) / (0.04 + log(below / smallest)) / (1 + 5 / K)

    In the paper's simulation without contamination 2 of 300 draws of 5 sites reach 1, and none of 600 of 10 or 20 sites
    (benchmarks/clair_linear.py). Without a gap nobody is expelled.

    Args:
        distance_G: Distance of each pair, in the order of ``pairs_of``.
        num_sites: K.
        agreement: alpha, in [0.5, 1).
        min_gap: Smallest score of a gap.
        threshold: tau_n, in the units of the distances; None looks for the gap.
    """
    pair_KK = np.zeros((num_sites, num_sites))
    j, k = pairs_of(num_sites).T
    pair_KK[j, k] = pair_KK[k, j] = distance_G
    needed = max(1, math.ceil(agreement * (num_sites - 1)))
    # A site's distance to itself, 0, comes first.
    distance_K = np.sort(pair_KK, axis=1)[:, needed]
    if threshold is not None:
        return Verdict(distances=distance_K, threshold=threshold, gap=math.nan)
    largest = float(distance_G.max(initial=0.0))
    if num_sites < MIN_SITES or largest == 0:
        return Verdict(distances=distance_K, threshold=math.inf, gap=math.nan)
    ordered = np.sort(distance_K)
    logs = np.log(np.maximum(ordered, _RESOLUTION * largest))
    scores = np.diff(logs)[needed:] / (_SPREAD + logs[needed:-1] - logs[0]) / (1 + _CHANCE / num_sites)
    if not len(scores):
        return Verdict(distances=distance_K, threshold=math.inf, gap=math.nan)
    best = int(scores.argmax())
    gap = float(scores[best])
    within = float(ordered[needed + best]) if gap >= min_gap else math.inf
    return Verdict(distances=distance_K, threshold=within, gap=gap)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What all matrices together say of one site."""

    judged: int
    """Matrices that judged it."""
    against: int
    """Those among them that left it out of their collaborative set."""
    ratio: float = math.nan
    """Median over those of its distance in units of the threshold; nan if there are none."""

    @property
    def margin(self) -> float:
        """Share of the matrices against it beyond one half: in [-0.5, 0.5]; -0.5 if none judged it."""
        return self.against / self.judged - 0.5 if self.judged else -0.5

    @property
    def rejected(self) -> bool:
        """Whether more than half of the matrices are against it; a tie accepts."""
        return self.margin > 0

    @property
    def reason(self) -> str:
        """The count and the distance, for people."""
        told = f"outside the collaborative set of {self.against} of {self.judged} matrices"
        return f"{told}, there at {self.ratio:.1f} times the distance of the others" if self.against else told

    def report(self) -> dict[str, Any]:
        """The vote as JSON values."""
        return {
            "rejected": self.rejected,
            "reason": self.reason,
            "margin": self.margin,
            "judged": self.judged,
            "against": self.against,
            "distance_ratio": self.ratio if self.against else None,
        }


def count_votes(sites: Sequence[str], verdicts: Sequence[tuple[Sequence[str], Verdict]]) -> dict[str, Vote]:
    """Site -> vote over matrices, each given with the sites that it judged, in the order of its verdict.

    The paper applies its method matrix by matrix and leaves open how they make one verdict: here by majority.
    """
    judged = dict.fromkeys(sites, 0)
    ratios: dict[str, list[float]] = {site: [] for site in sites}
    for present, verdict in verdicts:
        for site, distance, accepted in zip(present, verdict.distances, verdict.accepted, strict=True):
            judged[site] += 1
            if not accepted:
                ratios[site].append(float(distance) / verdict.threshold)
    return {
        site: Vote(judged=judged[site], against=len(found), ratio=float(np.median(found)) if found else math.nan)
        for site, found in ratios.items()
    }
