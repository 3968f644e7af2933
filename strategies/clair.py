"""CLAIR: contaminated sites are found by their row space; the others share what is outside and keep what is inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies import low_rank
from strategies.adapters import Arrays, weighted_mean
from strategies.base import Aggregation, ClientUpdate, Strategy
from strategies.collaborative_set import Vote
from strategies.expert_exclusion import Expert
from strategies.expert_rounds import check_expert_tokens
from strategies.inspection import Inspected, inspect, products_of, rejected_experts, report_experts, vote
from strategies.low_rank import Factors
from strategies.refinement import refine
from strategies.shared_subspace import SubspaceConfig
from strategies.threads import each

Named = dict[str, NDArray[np.floating]]


class RefinedRank(Enum):
    """What becomes of a refined product, whose rank exceeds that of the adapter."""

    truncated = "truncated"
    """Truncated to the adapter's rank; the share of its squared norm that is lost is reported."""
    exact = "exact"
    """Kept: the sites' own adapters have the rank that all accepted sites' factors add up to. For one round."""


@dataclass(kw_only=True)
class Clair(Strategy):
    """Each accepted site gets its own part inside the shared row space and the accepted sites' mean outside it.

    "CLAIR", 2026, Algorithm 1 and Eq. 5-9, https://arxiv.org/abs/2605.21217. Run for one round it is the
    paper's one-shot method; each further round starts from every site's refined adapter.

    The paper judges each matrix by itself. Here a site is rejected as a whole (``subspace.verdict``); it keeps its own
    adapter and no other site gets any of it. The global adapter, for sites that were not there, is the mean product of
    the accepted sites, truncated. As in the paper all accepted sites count the same. Of an expert, the sites that used
    it are the sites; the others get the mean. An accepted site that an expert's matrices reject keeps its own of that
    expert, and no other site gets any of it. Arrays without a LoRA pair are averaged over the accepted sites by
    examples.

    A site that is not asked in a round keeps the adapter it was last given (``Aggregation.personal``).
    """

    name: ClassVar[str] = "clair"
    methods: ClassVar[frozenset[str]] = frozenset({"sft"})

    subspace: SubspaceConfig = field(default_factory=SubspaceConfig)
    refined_rank: RefinedRank = RefinedRank.truncated

    def init_state(self, adapter: Arrays) -> Arrays:
        """Nothing to remember.

        Raises:
            ValueError: If there is no LoRA pair to judge sites by.
        """
        if not any(name.endswith(".lora_A") for name in adapter):
            raise ValueError("strategy=clair needs LoRA: set model.experts=lora or lora.attention=true")
        return {}

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, or does not count the tokens of every expert."""
        super().check_update(adapter, update)
        check_expert_tokens(adapter, update)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """Refined adapters of all sites, and the mean of the accepted ones.

        Diagnostics: ``verdicts`` -> of each site, see ``Vote.report``, with its rejected ``experts``; ``matrices`` ->
        what each of them says, see ``Inspected.report``, with ``lost_energy``: the largest share of a squared norm
        that was truncated.

        Raises:
            ValueError: If every site is rejected, which only a fixed ``subspace.threshold`` can bring about.
        """
        sites = [update.site for update in updates]
        inspected = inspect(adapter, updates, self.subspace)
        votes = vote(sites, inspected, self.subspace)
        accepted = np.array([not votes[site].rejected for site in sites])
        if not accepted.any():
            raise ValueError(
                f"all sites are rejected at strategy.subspace.threshold={self.subspace.threshold}: raise it"
            )
        rejected = rejected_experts(sites, inspected, self.subspace)
        shared, personal, lost = self._refined(adapter, updates, inspected, accepted, rejected)
        matrices = {matrix.label: matrix.report(sites) | {"lost_energy": lost[matrix.label]} for matrix in inspected}
        verdicts = {site: found.report() | {"experts": report_experts(rejected[site])} for site, found in votes.items()}
        return Aggregation(
            adapter=shared,
            state=state,
            personal=personal,
            diagnostics={"verdicts": verdicts, "matrices": matrices},
        )

    def _refined(
        self,
        adapter: Arrays,
        updates: Sequence[ClientUpdate],
        inspected: Sequence[Inspected],
        accepted: NDArray[np.bool_],
        rejected: Mapping[str, Mapping[Expert, Vote]],
    ) -> tuple[Named, dict[str, Named], dict[str, float]]:
        """The global adapter, each site's own, and the energy that each matrix lost."""
        shared = _averaged(adapter, updates, accepted)
        grown = 1 if self.refined_rank is RefinedRank.truncated else int(accepted.sum())
        own = {int(i): _with_rank(shared, grown) for i in np.flatnonzero(accepted)}

        def step(matrix: Inspected) -> float:
            """Refine one matrix, in its own places of all adapters."""
            trusted = np.array([matrix.of_expert not in rejected[updates[i].site] for i in matrix.present], bool)
            members = accepted[matrix.present] & trusted
            received = _read(adapter, matrix)
            mean, refined, lost = _refine_matrix(matrix, updates, members, received, grown)
            _write(shared, matrix, low_rank.turned_towards(mean, received.A))
            given = dict.fromkeys(own, mean) | dict(zip(matrix.present[members].tolist(), refined, strict=True))
            for i, product in given.items():
                before = _read(updates[i].adapter, matrix).A
                _write(own[i], matrix, low_rank.turned_towards(product, before) if grown == 1 else product)
            for i in matrix.present[accepted[matrix.present] & ~trusted]:
                _write(own[i], matrix, _read(updates[i].adapter, matrix))
            return lost

        lost = dict(zip([matrix.label for matrix in inspected], each(step, inspected), strict=True))
        personal = {update.site: own[i] if i in own else dict(update.adapter) for i, update in enumerate(updates)}
        return shared, personal, lost


def _refine_matrix(
    matrix: Inspected, updates: Sequence[ClientUpdate], members: NDArray[np.bool_], received: Factors, grown: int
) -> tuple[Factors, list[Factors], float]:
    """Mean at the adapter's rank, the accepted sites' refined products, and the largest share of energy lost."""
    if not members.any():
        return received, [], 0.0
    rank = len(received.A)
    products = products_of(matrix.prefix, matrix.expert, matrix.present, updates)
    if matrix.finding is None:
        alone = Factors(products.A[0], products.B[0])
        return alone, [alone], 0.0
    refined = refine(products, members, matrix.finding.directions, rank * grown)
    mean = Factors(refined.mean.A[:rank], refined.mean.B[:, :rank])
    lost = float(refined.lost_energy.max())
    return mean, [Factors(*pair) for pair in zip(*refined.own, strict=True)], lost


def _averaged(adapter: Arrays, updates: Sequence[ClientUpdate], accepted: NDArray[np.bool_]) -> Named:
    """A new adapter with the arrays that have no LoRA pair averaged by examples, and room for those that have."""
    kept = [update for update, ok in zip(updates, accepted, strict=True) if ok]
    whole = [name for name in adapter if not name.endswith((".lora_A", ".lora_B"))]
    means = weighted_mean(
        [{name: update.adapter[name] for name in whole} for update in kept], [update.num_examples for update in kept]
    )
    return {name: means.get(name, np.zeros(array.shape, np.float32)) for name, array in adapter.items()}


def _with_rank(adapter: Named, times: int) -> Named:
    """A copy whose LoRA pairs have room for so many times the rank; what they hold is to be overwritten."""
    axis = {"lora_A": -2, "lora_B": -1}
    return {
        name: np.repeat(array, times, axis=axis[name[-6:]]) if name[-6:] in axis else array
        for name, array in adapter.items()
    }


def _read(adapter: Arrays, matrix: Inspected) -> Factors:
    return Factors(*(adapter[matrix.prefix + end][_at(matrix)] for end in (".lora_A", ".lora_B")))


def _write(adapter: Named, matrix: Inspected, product: Factors) -> None:
    """Put the product in its place; where there is room for a higher rank, zeros fill it."""
    for end, factor in zip((".lora_A", ".lora_B"), product, strict=True):
        place = adapter[matrix.prefix + end][_at(matrix)]
        place[...] = 0.0
        place[tuple(slice(size) for size in factor.shape)] = factor


def _at(matrix: Inspected) -> Any:
    """Index of the matrix in its arrays; a view, so that it can be written to."""
    return ... if matrix.expert is None else matrix.expert
