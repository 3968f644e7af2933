"""The row space that the sites' products share, and how far each pair of sites differs outside it.

Shapes: K sites, R rank, I inputs, O outputs, G pairs of sites, M coordinates of rows, S shared directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.base import require
from strategies.block_sparse import block_norms, decompose
from strategies.collaborative_set import Verdict, VerdictRule, judge
from strategies.low_rank import Factors
from strategies.product_cores import difference_blocks, side_of

_INCOHERENCE = 2.0
"""Automatic ratio of the two penalties, over sqrt(rank / pairs): how unequally the pairs share in the low-rank part.
At 1 every pair of a perfectly even low-rank part would be on the brink of being called sparse."""
_SMALLEST_PENALTY = 0.01
"""Automatic block penalty, as a share of the root mean square of the blocks, when sites agree exactly."""
_LONGEST = 2.0
"""Longest block the row space is sought in, over the lower quartile of all: benign pairs are at least a quarter."""


@dataclass(kw_only=True)
class SubspaceConfig:
    """How CLAIR finds the shared row space of one matrix and the sites that keep to it."""

    low_rank_penalty: float | None = None
    """lambda_L / omega, in units of the products' Frobenius norm; null: chosen with the block penalty."""
    block_penalty: float | None = None
    """lambda_S / omega, in the same units; null: chosen from the pairs' residuals."""
    rank: int | None = None
    """Dimension of the shared row space; null: the rank of the adapter."""
    agreement: float = 0.5
    """Alpha: share of the other sites that a site must agree with, in [0.5, 1)."""
    threshold: float | None = None
    """tau_n: largest distance at which two sites agree; null: at the largest gap."""
    min_gap: float = 1.0
    """Score from which on a gap counts as one: see ``collaborative_set.judge``."""
    verdict: VerdictRule = VerdictRule.majority
    """How the matrices' verdicts on a site become one."""
    tolerance: float = 1e-4
    """Relative duality gap at which the convex program stops."""
    max_iterations: int = 500

    def __post_init__(self) -> None:
        for key in ("low_rank_penalty", "block_penalty", "threshold"):
            value = getattr(self, key)
            require(value is None or value > 0, f"subspace.{key}", "null or > 0", value)
        both = (self.low_rank_penalty is None) == (self.block_penalty is None)
        require(both, "subspace.block_penalty", "given or null as subspace.low_rank_penalty is", self.block_penalty)
        require(self.rank is None or self.rank >= 1, "subspace.rank", "null or >= 1", self.rank)
        fixed = self.threshold is not None and self.verdict is VerdictRule.pooled
        require(not fixed, "subspace.threshold", "null with subspace.verdict=pooled", self.threshold)
        require(0.5 <= self.agreement < 1, "subspace.agreement", "in [0.5, 1)", self.agreement)
        require(self.min_gap > 0, "subspace.min_gap", "> 0", self.min_gap)
        require(0 < self.tolerance < 1, "subspace.tolerance", "in (0, 1)", self.tolerance)
        require(self.max_iterations >= 1, "subspace.max_iterations", ">= 1", self.max_iterations)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the products of one matrix have in common, and who does not keep to it."""

    directions: NDArray[np.float64]
    """(I, S) orthonormal basis of the shared row space."""
    distances: NDArray[np.float64]
    """(G,) ``||(B_j A_j - B_k A_k) (1 - P)||`` of each pair, in the order of ``pairs_of``."""
    block_norms: NDArray[np.float64]
    """(G,) length of each pair's block in the sparse part, 0 for most of them; of the tempered blocks."""
    verdict: Verdict
    iterations: int
    relative_gap: float


def examine(products: Factors, config: SubspaceConfig) -> Finding:
    """The shared row space of at least 2 sites' products (K, R, I) and (K, O, R), and the collaborative set.

    CLAIR, 2026, Algorithm 1 and Eq. 5-8, https://arxiv.org/abs/2605.21217. The products may leave out whatever all
    sites have in common, such as the base model.
    """
    rows = side_of(products.A)
    blocks = difference_blocks(products, rows)
    rank = config.rank or products.A.shape[-2]
    tempered = tempered_blocks(blocks)
    main = main_part(tempered, rank)
    low_rank_penalty, block_penalty = config.low_rank_penalty, config.block_penalty
    if low_rank_penalty is None or block_penalty is None:
        low_rank_penalty, block_penalty = automatic_penalties(tempered, main, rank)
    solved = decompose(
        tempered,
        start=main,
        low_rank_penalty=low_rank_penalty,
        block_penalty=block_penalty,
        tolerance=config.tolerance,
        max_iterations=config.max_iterations,
    )
    shared = solved.directions[:, :rank]
    distance_G = block_norms(blocks - (blocks @ shared) @ shared.T)
    return Finding(
        directions=rows.lift(shared.T).T,
        distances=distance_G,
        block_norms=block_norms(solved.sparse),
        verdict=judge(
            distance_G,
            len(products.A),
            agreement=config.agreement,
            min_gap=config.min_gap,
            threshold=config.threshold,
            length_G=block_norms(blocks),
        ),
        iterations=solved.iterations,
        relative_gap=float(solved.relative_gap),
    )


def tempered_blocks(blocks_GCM: NDArray[np.float64]) -> NDArray[np.float64]:
    """The blocks shortened to at most twice their lower quartile length: the row space is sought in these.

    One site's enormous update stands in all its pairs, the same row space every time. The program would call that
    part low-rank rather than sparse, since its nuclear norm grows with the square root of the number of pairs only.
    """
    norms_G = block_norms(blocks_GCM)
    limit = _LONGEST * float(np.quantile(norms_G, 0.25))
    if limit == 0:
        return blocks_GCM
    return np.asarray(blocks_GCM * (limit / np.maximum(norms_G, limit))[:, None, None])


def main_part(blocks_GCM: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    """(G, C, M) the blocks within the ``rank`` main row directions of all: where the convex program starts."""
    tall = blocks_GCM.reshape(-1, blocks_GCM.shape[-1])
    main = np.linalg.eigh(tall.T @ tall)[1][:, -rank:]
    return np.asarray((blocks_GCM @ main) @ main.T)


def automatic_penalties(
    blocks_GCM: NDArray[np.float64], main_GCM: NDArray[np.float64], rank: int
) -> tuple[float, float]:
    """(low-rank penalty, block penalty) for the program on these blocks, without knowing who is contaminated.

    The block penalty is half the lower quartile of the blocks' residuals behind ``main_part``:
    if more than half of the sites are benign, so are at least a quarter of the pairs, and the loss turns from
    quadratic to linear below all others. (At the quartile itself the program is done in half the iterations, but
    strong contamination in low noise still pulls the row space towards itself.) The low-rank penalty stands to it as
    the dual certificate of an evenly spread low-rank part does, with some slack: a block of it has the length
    sqrt(rank / pairs).

    Our own choice: the paper tunes both by hand. Both scale with the blocks.
    """
    residual_G = block_norms(blocks_GCM - main_GCM)
    typical = float(np.sqrt(np.mean(block_norms(blocks_GCM) ** 2)))
    block_penalty = max(float(np.quantile(residual_G, 0.25)) / 2, _SMALLEST_PENALTY * typical)
    # Blocks that are all zero need no penalty, but the program needs it positive.
    block_penalty = block_penalty or 1.0
    return block_penalty / (_INCOHERENCE * np.sqrt(rank / len(blocks_GCM))), block_penalty
