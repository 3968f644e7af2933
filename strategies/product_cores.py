"""Products B A of several sites in coordinates as small as their factors, where all lengths and angles are the same.

Shapes: K sites, R rank, I inputs, O outputs; G = K (K - 1) / 2 pairs of sites; M coordinates of rows, N of columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from strategies.low_rank import Factors

# Below this share of the largest eigenvalue, a Gram matrix in float64 holds rounding only. The factors are float32.
_NOTHING = 1e-14


@dataclass(frozen=True, kw_only=True)
class Side:
    """Vectors of a common space, in orthonormal coordinates of the span of all."""

    coordinates: NDArray[np.float64]
    """(..., M) the vectors, one a row, with the leading axes they were given with."""
    _lift: NDArray[np.float64] | None
    """(space, M) orthonormal basis; None stands for the identity."""

    def lift(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """(..., space) the vectors with the given (..., M) coordinates."""
        return rows if self._lift is None else rows @ self._lift.T

    def project(self, columns: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M, S) coordinates of (space, S) vectors, of what lies in the span."""
        return columns if self._lift is None else self._lift.T @ columns


def side_of(vectors: NDArray[np.floating]) -> Side:
    """Coordinates of (..., space) vectors; through the Gram matrix where they are fewer than the space is wide."""
    flat = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
    if len(flat) >= flat.shape[1]:
        return Side(coordinates=vectors.astype(np.float64), _lift=None)
    root, inverse = _roots(flat @ flat.T)
    return Side(coordinates=root.reshape(*vectors.shape[:-1], -1), _lift=flat.T @ inverse)


def _roots(gram: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """X and Y with X X^T = ``gram`` and Y^T ``gram`` Y = 1, both of as many columns as its rank."""
    squares, vectors = np.linalg.eigh(gram)
    kept = squares > _NOTHING * max(squares[-1], 0.0)
    sizes = np.sqrt(squares[kept])
    return vectors[:, kept] * sizes, vectors[:, kept] / sizes


def pairs_of(num_sites: int) -> NDArray[np.intp]:
    """(G, 2) all pairs j < k of sites."""
    return np.array(list(combinations(range(num_sites), 2)), np.intp).reshape(-1, 2)


def difference_blocks(products: Factors, rows: Side) -> NDArray[np.float64]:
    """(G, min(2R, O), M) ``B_j A_j - B_k A_k`` of all pairs, in coordinates of rows and a basis of columns each.

    A difference is [B_j, -B_k] [A_j; A_k]. Singular value and block thresholds commute with an orthonormal basis of
    the rows of all A and with one of the columns of each pair, so CLAIR's program has the same solution here.

    Args:
        products: The sites' factors, (K, R, I) and (K, O, R).
        rows: ``side_of(products.A)``.
    """
    j, k = pairs_of(len(products.A)).T
    columns = _pair_columns(products.B.astype(np.float64), j, k)
    return np.asarray(columns @ np.concatenate([rows.coordinates[j], rows.coordinates[k]], axis=1))


def _pair_columns(B_KOR: NDArray[np.float64], j: NDArray[np.intp], k: NDArray[np.intp]) -> NDArray[np.float64]:
    """(G, min(2R, O), 2R) matrices with the Gram matrices of [B_j, -B_k]."""
    _, outputs, rank = B_KOR.shape
    if outputs <= 2 * rank:
        return np.concatenate([B_KOR[j], -B_KOR[k]], axis=2)
    stacked = np.concatenate(B_KOR, axis=1)
    gram = (stacked.T @ stacked).reshape(len(B_KOR), rank, len(B_KOR), rank).transpose(0, 2, 1, 3)
    cross = -gram[j, k]
    of_pairs = np.block([[gram[j, j], cross], [cross.transpose(0, 2, 1), gram[k, k]]])
    squares, vectors = np.linalg.eigh(of_pairs)
    return np.asarray(np.sqrt(np.maximum(squares, 0.0))[:, :, None] * vectors.transpose(0, 2, 1))
