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
    rows, columns = side_of(products.A), side_of(np.swapaxes(products.B, -1, -2))
    cores = np.swapaxes(columns.coordinates[accepted_K], -1, -2) @ rows.coordinates[accepted_K]
    mean = cores.mean(axis=0)
    shared = rows.project(directions)
    refined = mean + ((cores - mean) @ shared) @ shared.T
    # All right vectors: a direction that nothing was learnt in has B = 0, but A != 0, as in fresh LoRA.
    left, sizes, right = np.linalg.svd(np.concatenate([mean[None], refined]), full_matrices=True)
    left = left[..., : sizes.shape[-1]]
    if rank is None:
        rank = max(1, int((sizes > _NOTHING * sizes.max(initial=0.0)).sum(axis=-1).max()))
    energy, lost = (sizes**2).sum(axis=-1), (sizes[:, rank:] ** 2).sum(axis=-1)
    A = _padded(rows.lift(right[:, :rank]), rank)
    B = _padded(columns.lift(np.swapaxes(left * sizes[:, None], -1, -2)[:, :rank]), rank)
    B = np.swapaxes(B, -1, -2)
    return Refined(Factors(A[0], B[0]), Factors(A[1:], B[1:]), divided(lost, energy, 0.0)[1:])


def _padded(vectors: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Zero vectors added on the second axis until there are ``count``."""
    missing = count - vectors.shape[1]
    return np.pad(vectors, ((0, 0), (0, missing), (0, 0))) if missing > 0 else vectors
