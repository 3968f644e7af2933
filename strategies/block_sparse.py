"""A stack of blocks as a low-rank part plus a part in which few blocks are not zero: CLAIR's convex program.

Shapes: G blocks, C rows of a block, M columns that all blocks share, S singular vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROOM = 8
"""Directions beyond the last step's that one step of subspace iteration looks at."""
_CHECK_EVERY = 3
"""Iterations between looks at the gap, which costs a fifth of one."""


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """The minimiser of ``decompose``'s program."""

    low_rank: NDArray[np.float64]
    """(G, C, M) the part L."""
    sparse: NDArray[np.float64]
    """(G, C, M) the part S."""
    directions: NDArray[np.float64]
    """(M, S) right singular vectors of L, stacked over its blocks; the largest first."""
    sizes: NDArray[np.float64]
    """(S,) singular values of L, all > 0, falling."""
    objective: float
    relative_gap: float
    """How far the objective may lie above the minimum, as a share of itself; <= ``tolerance`` if it converged."""
    iterations: int


def decompose(
    blocks_GCM: NDArray[np.float64],
    *,
    low_rank_penalty: float,
    block_penalty: float,
    start: NDArray[np.float64] | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 500,
) -> Decomposition:
    """Minimise ``1/2 ||D - L - S||^2 + low_rank_penalty ||L||_* + block_penalty sum_g ||S_g||`` over L and S.

    CLAIR, 2026, Eq. 7, https://arxiv.org/abs/2605.21217, with the same weight omega for all pairs: divide by it, so the
    penalties are lambda_L / omega and lambda_S / omega.

    Differs from the paper's Algorithm 1. The best S for a given L is known, which leaves a Huber loss of each block's
    residual, with slope 1 at most: a step of 1 in L alone, twice the paper's in L and S, and accelerated (Beck and
    Teboulle, 2009, with the restart of O'Donoghue and Candes, 2015). Each step has a dual point to itself: the part
    that the singular value threshold cut off, shortened until no block exceeds ``block_penalty``. The gap
    between the two objectives bounds the distance to the minimum.

    ``start`` is where L starts, zero by default.
    """
    low_rank = ahead = np.zeros_like(blocks_GCM) if start is None else start
    directions: NDArray[np.float64] | None = None
    momentum, penalties = 1.0, (low_rank_penalty, block_penalty)
    for iteration in range(1, max_iterations + 1):
        stepped = blocks_GCM - ahead
        stepped *= _clipping(block_norms(stepped), block_penalty)
        stepped += ahead
        last, (low_rank, directions, sizes) = low_rank, _threshold(stepped, low_rank_penalty, directions)
        is_last = iteration == max_iterations
        if is_last or iteration % _CHECK_EVERY == 0:
            objective, gap = _gap(blocks_GCM, stepped, low_rank, sizes, penalties)
            if is_last or gap <= tolerance * objective:
                # Only the exact threshold makes the dual point feasible, and so the gap a bound.
                low_rank, directions, sizes = _threshold(stepped, low_rank_penalty)
                objective, gap = _gap(blocks_GCM, stepped, low_rank, sizes, penalties)
            if is_last or gap <= tolerance * objective:
                break
        change = low_rank - last
        if np.vdot(ahead - low_rank, change) > 0:
            momentum = 1.0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        change *= (momentum - 1) / following
        ahead = low_rank + change
        momentum = following
    assert directions is not None
    sparse = blocks_GCM - low_rank
    return Decomposition(
        low_rank=low_rank,
        sparse=sparse * (1 - _clipping(block_norms(sparse), block_penalty)),
        directions=directions,
        sizes=sizes,
        objective=objective,
        relative_gap=gap / objective if objective > 0 else 0.0,
        iterations=iteration,
    )


def _threshold(
    stacked_GCM: NDArray[np.float64], penalty: float, guess_MS: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Singular values of the stack lowered by ``penalty``; with the directions and values that are left.

    Exact through the M x M Gram matrix, since the stack is much taller than wide; the values that count are those
    above the penalty, where the lost digits do no harm. From the last step's directions as a guess, by one step of
    subspace iteration with room for more, in a fraction of the time; exact again where the room does not suffice.
    """
    tall = stacked_GCM.reshape(-1, stacked_GCM.shape[-1])
    basis = None if guess_MS is None else _improved(tall, guess_MS)
    seen = tall if basis is None else tall @ basis
    squares, vectors = np.linalg.eigh(_gram(seen))
    if basis is not None and squares[0] > penalty**2:
        basis, seen = None, tall
        squares, vectors = np.linalg.eigh(_gram(tall))
    kept = np.flatnonzero(squares > penalty**2)[::-1]
    sizes, directions = np.sqrt(squares[kept]), vectors[:, kept]
    lengths = seen @ directions
    if basis is not None:
        directions = basis @ directions
    lowered = (lengths * (1 - penalty / sizes)) @ directions.T
    return lowered.reshape(stacked_GCM.shape), directions, sizes - penalty


def _improved(tall: NDArray[np.float64], guess_MS: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """(M, S + 8) orthonormal basis nearer to the main right singular vectors; None where that is no saving.

    What is added to the guess are the coordinate axes that it covers least.
    """
    width, count = guess_MS.shape
    if 3 * (count + _ROOM) > width:
        return None
    axes = np.argsort((guess_MS**2).sum(axis=1), kind="stable")[:_ROOM]
    wider = np.concatenate([guess_MS, np.eye(width)[:, axes]], axis=1)
    return np.asarray(np.linalg.qr(tall.T @ (tall @ wider))[0])


def _gram(tall: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(tall.T @ tall)


def _gap(
    blocks_GCM: NDArray[np.float64],
    stepped_GCM: NDArray[np.float64],
    low_rank_GCM: NDArray[np.float64],
    sizes_S: NDArray[np.float64],
    penalties: tuple[float, float],
) -> tuple[float, float]:
    """The objective at L with the best S, and how far it may lie above the minimum."""
    low_rank_penalty, block_penalty = penalties
    objective = _huber(block_norms(blocks_GCM - low_rank_GCM), block_penalty) + low_rank_penalty * float(sizes_S.sum())
    return objective, objective - _dual_objective(stepped_GCM - low_rank_GCM, blocks_GCM, block_penalty)


def _dual_objective(cut_GCM: NDArray[np.float64], blocks_GCM: NDArray[np.float64], block_penalty: float) -> float:
    """The best ``<U, D> - 1/2 ||U||^2`` over multiples U of ``cut_GCM`` with no block above ``block_penalty``.

    The largest singular value of ``cut_GCM`` is at most ``low_rank_penalty``, so U is feasible.
    """
    longest = float(block_norms(cut_GCM).max())
    along, square = float(np.vdot(cut_GCM, blocks_GCM)), float(np.vdot(cut_GCM, cut_GCM))
    if square == 0:
        return 0.0
    scale = min(1.0, block_penalty / longest, along / square)
    return float(scale * along - scale**2 * square / 2)


def _huber(norms_G: NDArray[np.float64], limit: float) -> float:
    """``1/2 ||R_g - S_g||^2 + limit ||S_g||`` at the best S, summed over the blocks."""
    inner = np.minimum(norms_G, limit)
    return float((inner * (norms_G - inner / 2)).sum())


def _clipping(norms_G: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """(G, 1, 1) factors that shorten each block to at most ``limit``."""
    return np.asarray(limit / np.maximum(norms_G, limit))[:, None, None]


def block_norms(blocks_GCM: NDArray[np.float64]) -> NDArray[np.float64]:
    """(G,) Frobenius norms."""
    return np.asarray(np.sqrt(np.einsum("gcm,gcm->g", blocks_GCM, blocks_GCM)))
