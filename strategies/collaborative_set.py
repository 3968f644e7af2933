"""Who belongs together: from distances between sites to verdicts, of one matrix and of a site.

Shapes: K sites; G pairs of sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.product_cores import pairs_of

_SPREAD = 0.04
"""Added to the spread of the accepted sites' log distances: even equally good sites differ by a few percent."""
_CHANCE = 5.0
"""Sites at which a gap has to be twice as wide as among many."""
_RESOLUTION = 1e-6
"""Distances below this share of what is usual among the sites are rounding of float32 factors."""

MIN_SITES = 5
"""With fewer there is no spread of the accepted sites to measure a gap against."""


class VerdictRule(Enum):
    """How the matrices' verdicts on a site become one."""

    majority = "majority"
    """More than half of the matrices leave it out."""
    pooled = "pooled"
    """A gap among the sites' distances, pooled over the matrices: finds what no single matrix sees clearly."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one matrix says of the sites, or all of them pooled."""

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
    distance_G: NDArray[np.float64],
    num_sites: int,
    *,
    agreement: float,
    min_gap: float,
    threshold: float | None = None,
    length_G: NDArray[np.float64] | None = None,
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
        length_G: Length of what each distance is the rest of; None: the distances themselves. A millionth of what is
            usual among them is rounding: of their lower quartile, since one site sets the largest as it likes.
    """
    pair_KK = np.zeros((num_sites, num_sites))
    j, k = pairs_of(num_sites).T
    pair_KK[j, k] = pair_KK[k, j] = distance_G
    # A site's distance to itself, 0, comes first.
    distance_K = np.sort(pair_KK, axis=1)[:, _needed(num_sites, agreement)]
    if threshold is not None:
        return Verdict(distances=distance_K, threshold=threshold, gap=math.nan)
    floor = _RESOLUTION * _usual(distance_G if length_G is None else length_G)
    return _separated(np.maximum(distance_K, floor), agreement, min_gap)


def _usual(length_G: NDArray[np.float64]) -> float:
    """The lower quartile of those that are not 0; 0 if all are."""
    lengths = length_G[length_G > 0]
    return float(np.quantile(lengths, 0.25)) if len(lengths) else 0.0


def _needed(num_sites: int, agreement: float) -> int:
    """Other sites that a site must agree with."""
    return max(1, math.ceil(agreement * (num_sites - 1)))


def _separated(distance_K: NDArray[np.float64], agreement: float, min_gap: float) -> Verdict:
    """The verdict by the best gap among distances of which none or all are 0."""
    num_sites = len(distance_K)
    needed = _needed(num_sites, agreement)
    ordered = np.sort(distance_K)
    if num_sites < max(MIN_SITES, needed + 2) or ordered[0] == 0:
        return Verdict(distances=distance_K, threshold=math.inf, gap=math.nan)
    logs = np.log(ordered)
    scores = np.diff(logs)[needed:] / (_SPREAD + logs[needed:-1] - logs[0]) / (1 + _CHANCE / num_sites)
    best = int(scores.argmax())
    gap = float(scores[best])
    within = float(ordered[needed + best]) if gap >= min_gap else math.inf
    return Verdict(distances=distance_K, threshold=within, gap=gap)


def pool(
    sites: Sequence[str], verdicts: Sequence[tuple[Sequence[str], Verdict]], *, agreement: float, min_gap: float
) -> Verdict:
    """One verdict from those of all matrices, each given with the sites that it judged.

    A site's distance is the geometric mean over its matrices, each in units of the matrix's median. What lies
    apart a little everywhere adds up, while the others' differences average out. A site that no matrix judged has
    distance 1. Differs from the paper, which judges matrix by matrix.

    Args:
        sites: K names, the order of the verdict.
        verdicts: Of the matrices, in the order of their sites; of ``judge`` without a fixed threshold.
        agreement: alpha, in [0.5, 1).
        min_gap: Smallest score of a gap, see ``judge``.
    """
    logs: dict[str, list[float]] = {site: [] for site in sites}
    for present, verdict in verdicts:
        if verdict.distances.all():
            relative = np.log(verdict.distances / np.median(verdict.distances))
            for site, log in zip(present, relative.tolist(), strict=True):
                logs[site].append(log)
    distance_K = np.exp([float(np.mean(found)) if found else 0.0 for found in logs.values()])
    return _separated(distance_K, agreement, min_gap)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What all matrices together say of one site."""

    judged: int
    """Matrices that judged it."""
    against: int
    """Those among them that left it out of their collaborative set."""
    ratio: float = math.nan
    """Median over those of its distance in units of the threshold; nan if there are none."""
    pooled: float | None = None
    """Its distance pooled over the matrices, in units of that threshold; 0 without a gap. None: the majority counts."""

    @property
    def margin(self) -> float:
        """Share of the matrices against it beyond one half: in [-0.5, 0.5]; -0.5 if none judged it."""
        return self.against / self.judged - 0.5 if self.judged else -0.5

    @property
    def rejected(self) -> bool:
        """Whether it is beyond the pooled threshold or, without one, most matrices are against it; a tie accepts."""
        return self.margin > 0 if self.pooled is None else self.pooled > 1

    @property
    def reason(self) -> str:
        """The count and the distance, for people."""
        told = f"outside the collaborative set of {self.against} of {self.judged} matrices"
        if self.against:
            told += f", there at {self.ratio:.1f} times the distance of the others"
        if self.pooled:
            told += f"; pooled over all at {self.pooled:.2f} times the distance of the farthest that is accepted"
        return told

    def report(self) -> dict[str, Any]:
        """The vote as JSON values."""
        return {
            "rejected": self.rejected,
            "reason": self.reason,
            "margin": self.margin,
            "judged": self.judged,
            "against": self.against,
            "distance_ratio": self.ratio if self.against else None,
            "pooled_ratio": self.pooled,
        }


def decide(
    sites: Sequence[str],
    verdicts: Sequence[tuple[Sequence[str], Verdict]],
    rule: VerdictRule,
    *,
    agreement: float,
    min_gap: float,
) -> dict[str, Vote]:
    """Site -> vote by a rule; arguments as those of ``pool``."""
    votes = count_votes(sites, verdicts)
    if rule is VerdictRule.majority:
        return votes
    pooled = pool(sites, verdicts, agreement=agreement, min_gap=min_gap)
    ratios = dict(zip(sites, (pooled.distances / pooled.threshold).tolist(), strict=True))
    return {site: replace(found, pooled=ratios[site]) for site, found in votes.items()}


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
