"""What CLAIR gives each accepted site: its own part inside the shared row space, the mean of all outside it.

Shapes: K sites, R rank, I inputs, O outputs, S shared directions; C accepted sites.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from strategies.low_rank import Factors
from strategies.product_cores import side_of
from strategies.quotient import divided

# Singular values below this share of the largest are rounding of float32 factors.
_NOTHING = 1e-7


class Refined(NamedTuple):
    """Products of one matrix after refinement, at one common rank."""

    mean: Factors
    """The mean of the accepted sites."""
    own: Factors
    """(C, ...) the refined products, one an accepted site."""
    lost_energy: NDArray[np.float64]
    """(C,) share of the squared norm that truncating a site's product dropped."""


def refine(
    products: Factors, accepted_K: NDArray[np.bool_], directions: NDArray[np.float64], rank: int | None
) -> Refined:
    """``mean_C(B A) (1 - P) + B_k A_k P`` of each accepted site k.

    CLAIR, 2026, Eq. 9, https://arxiv.org/abs/2605.21217, in closed form: inside the shared row space the paper's mean
    of differences leaves a site exactly its own part.

    Args:
        products: The sites' factors, (K, R, I) and (K, O, R).
        accepted_K: The collaborative set C, not empty.
        directions: (I, S) orthonormal basis of the shared row space, inside the span of the rows of all A.
        rank: Rank to truncate to; None keeps every product exactly, at the largest rank that one of them has.
    """
    # Of the accepted alone: beside the vectors of a rejected site, however long, theirs would be rounding.
    A, B = products.A[accepted_K], products.B[accepted_K]
    columns = side_of(np.swapaxes(B, -1, -2))
    rows_of_A = A.reshape(-1, A.shape[-1])
    rows = side_of(np.concatenate([rows_of_A, directions.T * np.linalg.norm(rows_of_A, axis=1).mean()]))
    cores = np.swapaxes(columns.coordinates, -1, -2) @ rows.coordinates[: len(rows_of_A)].reshape(*A.shape[:2], -1)
    mean = cores.mean(axis=0)
    shared = rows.project(directions)
    refined = mean + ((cores - mean) @ shared) @ shared.T
    # All right vectors: a direction that nothing was learnt in has B = 0, but A != 0, as in fresh LoRA.
    left, sizes, right = np.linalg.svd(np.concatenate([mean[None], refined]), full_matrices=True)
    left = left[..., : sizes.shape[-1]]
    if rank is None:
        rank = max(1, int((sizes > _NOTHING * sizes.max(initial=0.0)).sum(axis=-1).max()))
    energy, lost = (sizes**2).sum(axis=-1), (sizes[:, rank:] ** 2).sum(axis=-1)
    new_A = _padded(rows.lift(right[:, :rank]), rank)
    new_B = _padded(columns.lift(np.swapaxes(left * sizes[:, None], -1, -2)[:, :rank]), rank)
    new_B = np.swapaxes(new_B, -1, -2)
    return Refined(Factors(new_A[0], new_B[0]), Factors(new_A[1:], new_B[1:]), divided(lost, energy, 0.0)[1:])


def _padded(vectors: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Zero vectors added on the second axis until there are ``count``."""
    missing = count - vectors.shape[1]
    return np.pad(vectors, ((0, 0), (0, missing), (0, 0))) if missing > 0 else vectors
