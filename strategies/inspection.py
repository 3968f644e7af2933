"""Every LoRA matrix of a round examined: what CLAIR and the screen judge sites by.

Shapes: K sites, E experts, R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies import experts, low_rank
from strategies.adapters import Arrays
from strategies.base import ClientUpdate
from strategies.collaborative_set import MIN_SITES, Verdict, Vote, decide
from strategies.expert_exclusion import Expert
from strategies.low_rank import Factors
from strategies.product_cores import pairs_of
from strategies.shared_subspace import Finding, SubspaceConfig, examine
from strategies.threads import each


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One matrix: a dense LoRA pair, or that of one expert."""

    prefix: str
    """Name of the LoRA pair without ``.lora_A``."""
    expert: int | None
    """Index on the expert axis; None for a dense pair."""
    present: NDArray[np.intp]
    """Updates that take part, by position: for an expert, of the sites that routed tokens to it."""
    finding: Finding | None
    """None if fewer than two sites take part."""

    @property
    def verdict(self) -> Verdict | None:
        """What it says of the sites present; None if they are fewer than ``MIN_SITES``."""
        enough = self.finding is not None and len(self.present) >= MIN_SITES
        return self.finding.verdict if self.finding is not None and enough else None

    @property
    def of_expert(self) -> Expert | None:
        """The expert it belongs to; None for a dense pair."""
        return None if self.expert is None else (experts.layer_of(self.prefix), self.expert)

    @property
    def label(self) -> str:
        """The matrix' name for people: ``model.layers.0.mlp.experts.down_proj[3]``."""
        return self.prefix if self.expert is None else f"{self.prefix}[{self.expert}]"

    def report(self, sites: Sequence[str]) -> dict[str, Any]:
        """What was found, as JSON values; None for a threshold or gap that there is not."""
        present = [sites[i] for i in self.present]
        if self.finding is None:
            return {"sites": present, "judged": False}
        verdict = self.finding.verdict
        return {
            "sites": present,
            "judged": self.verdict is not None,
            "distance": verdict.distances.tolist(),
            "block_norm": _median_of_pairs(self.finding.block_norms, len(present)),
            "threshold": verdict.threshold if math.isfinite(verdict.threshold) else None,
            "gap": None if math.isnan(verdict.gap) else verdict.gap,
            "rejected": [site for site, ok in zip(present, verdict.accepted, strict=True) if not ok],
            "subspace_rank": self.finding.directions.shape[1],
            "iterations": self.finding.iterations,
            "relative_gap": self.finding.relative_gap,
        }


def _median_of_pairs(values_G: NDArray[np.float64], num_sites: int) -> list[float]:
    """Of each site, the median over the pairs that it is in."""
    pairs = pairs_of(num_sites)
    return [float(np.median(values_G[(pairs == k).any(axis=1)])) for k in range(num_sites)]


def vote(sites: Sequence[str], inspected: Sequence[Inspected], config: SubspaceConfig) -> dict[str, Vote]:
    """Site -> vote of the matrices that had enough sites to judge."""
    verdicts = [([sites[i] for i in matrix.present], matrix.verdict) for matrix in inspected if matrix.verdict]
    return decide(sites, verdicts, config.verdict, agreement=config.agreement, min_gap=config.min_gap)


def rejected_experts(
    sites: Sequence[str], inspected: Sequence[Inspected], config: SubspaceConfig
) -> dict[str, dict[Expert, Vote]]:
    """Site -> experts whose matrices reject it, with their votes.

    An expert that too few sites used to be judged is trusted.
    """
    matrices: dict[Expert, list[Inspected]] = {}
    for matrix in inspected:
        if matrix.of_expert is not None:
            matrices.setdefault(matrix.of_expert, []).append(matrix)
    votes = {expert: vote(sites, of_expert, config) for expert, of_expert in matrices.items()}
    return {site: {expert: of[site] for expert, of in votes.items() if of[site].rejected} for site in sites}


def report_experts(rejected: Mapping[Expert, Vote]) -> dict[str, str]:
    """Expert (``model.layers.0.mlp[3]``) -> why it is rejected, as JSON values."""
    return {f"{layer}[{expert}]": found.reason for (layer, expert), found in rejected.items()}


def inspect(adapter: Arrays, updates: Sequence[ClientUpdate], config: SubspaceConfig) -> list[Inspected]:
    """Every LoRA matrix of the updates, in the order of their names and experts.

    An expert is judged by the sites that used it, by their own count. With fewer than ``MIN_SITES`` of those it is
    examined, but nobody is judged.
    """
    if not updates:
        return []

    def inspected(matrix: tuple[str, int | None, NDArray[np.intp]]) -> Inspected:
        # One matrix at a time in a thread: of all of them together float64 would be twice what the sites sent.
        prefix, expert, present = matrix
        finding = examine(products_of(prefix, expert, present, updates), config) if len(present) >= 2 else None
        return Inspected(prefix=prefix, expert=expert, present=present, finding=finding)

    prefixes = low_rank.lora_prefixes(adapter)
    return each(inspected, [(prefix, *users) for prefix in prefixes for users in _users(prefix, updates)])


def products_of(prefix: str, expert: int | None, present: NDArray[np.intp], updates: Sequence[ClientUpdate]) -> Factors:
    """Factors (len(present), R, I) and (len(present), O, R) of one matrix, float64."""
    at = ... if expert is None else expert
    return Factors(
        *(
            np.stack([updates[i].adapter[prefix + end][at] for i in present]).astype(np.float64)
            for end in (".lora_A", ".lora_B")
        )
    )


def _users(prefix: str, updates: Sequence[ClientUpdate]) -> list[tuple[int | None, NDArray[np.intp]]]:
    """Expert (None for a dense pair) and positions of the updates that take part, for each matrix called ``prefix``."""
    if not experts.is_expert_array(prefix):
        return [(None, np.arange(len(updates)))]
    tokens_KE = np.stack([update.expert_tokens[experts.layer_of(prefix)] for update in updates])
    return [(expert, np.flatnonzero(used_K)) for expert, used_K in enumerate(tokens_KE.T > 0)]
