"""The sites' changes of one LoRA projection: their inner products, and weighted sums in few coordinates.

A site's product is (B + b_i)(A + a_i), its change b_i (A + a_i) + B a_i. Neither is formed: all that is needed are the
inner products of the rows of A and every a_i, and of the columns of B and every b_i.

Shapes: E experts, C sites, R rank, V = (1 + C) R vectors of A or B, N width of the space, M = 2 R coordinates, K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.low_rank import Factors
from strategies.quotient import CANCELLED, divided

_NOTHING = 1e-5
"""Eigenvalues below it, of inner products of unit vectors in float32, are rounding. Vectors that nearly depend on each
other lose by it what they differ in: 3e-3 of their length. Sums formed and multiplied in float64 would keep that, in a
quarter more time of a whole aggregation."""


@dataclass(frozen=True, kw_only=True)
class ChangedFactor:
    """A by its rows, or B by its columns, as received and as every site changed it, for each expert."""

    vectors: NDArray[np.float32]
    """(E, V, N) R received vectors, then R changes of each site."""
    gram: NDArray[np.float32]
    """(E, V, V) their inner products."""

    def coordinates(self, weights_CE: NDArray[np.float64]) -> Coordinates:
        """In an orthonormal basis of the received vectors and the weighted sum of their changes.

        Where these depend on each other, as many basis vectors are 0 as are too many. A sum in which the changes cancel
        has no direction.
        """
        sums_EVM = _received_and_summed(weights_CE, rank=self.gram.shape[-1] // (1 + len(weights_CE)))
        products_EVM = self.gram @ sums_EVM
        gram_EMM = np.asarray(np.swapaxes(sums_EVM, -1, -2) @ products_EVM, np.float64)
        squared_EM = np.diagonal(gram_EMM, axis1=-2, axis2=-1)
        length_EV = np.sqrt(np.diagonal(self.gram, axis1=-2, axis2=-1))
        uncancelled_EM = ((sums_EVM * length_EV[..., None]) ** 2).sum(axis=-2)
        length_EM = np.sqrt(np.where(squared_EM > CANCELLED * uncancelled_EM, squared_EM, 0.0))
        inverse_EM = divided(1.0, length_EM, 0.0)
        squares_EM, turned_EMM = np.linalg.eigh(gram_EMM * inverse_EM[:, :, None] * inverse_EM[:, None, :])
        is_something = squares_EM > _NOTHING
        stretch_EM = np.where(is_something, 1.0 / np.sqrt(np.where(is_something, squares_EM, 1.0)), 0.0)
        basis_EMM = inverse_EM[:, :, None] * turned_EMM * stretch_EM[:, None, :]
        return Coordinates(factor=self, weights=weights_CE, basis=basis_EMM, vectors=products_EVM @ basis_EMM)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """The vectors of one factor in a basis of M vectors."""

    factor: ChangedFactor
    weights: NDArray[np.float64]
    """(C, E) of the sites in the sum."""
    basis: NDArray[np.float64]
    """(E, M, M) the basis vectors, one a column, as sums of the received vectors and the weighted sums of changes."""
    vectors: NDArray[np.float64]
    """(E, V, M) coordinates of the factor's vectors, projected on the span of the basis."""

    def lift(self, rows_EKM: NDArray[np.floating]) -> NDArray[np.float32]:
        """(E, K, N) the vectors with these coordinates."""
        rank = self.basis.shape[-1] // 2
        received_ERN, changes_EVN = self.factor.vectors[:, :rank], self.factor.vectors[:, rank:]
        # Summed over the sites first: then a row costs a sum of 2 R vectors, not of V.
        by_site = changes_EVN.reshape(len(changes_EVN), len(self.weights), -1)
        weights_E1C = self.weights.T[:, None].astype(np.float32)
        summed_ERN = (weights_E1C @ by_site).reshape(received_ERN.shape)
        of_received, of_summed = np.split((rows_EKM @ np.swapaxes(self.basis, -1, -2)).astype(np.float32), 2, axis=-1)
        return np.asarray(of_received @ received_ERN + of_summed @ summed_ERN)


def _received_and_summed(weights_CE: NDArray[np.float64], rank: int) -> NDArray[np.float32]:
    """(E, V, M) the sums that a factor's vectors make: those received, then the sites' changes with their weights."""
    num_sites, num_experts = weights_CE.shape
    sums_EURM = np.zeros((num_experts, 1 + num_sites, rank, 2 * rank), np.float32)
    vector_R = np.arange(rank)
    sums_EURM[:, 0, vector_R, vector_R] = 1.0
    sums_EURM[:, 1:, vector_R, rank + vector_R] = weights_CE.T[..., None]
    return sums_EURM.reshape(num_experts, -1, 2 * rank)


def changed_factor(received_ERN: NDArray[np.floating], trained: Sequence[NDArray[np.floating]]) -> ChangedFactor:
    """The received vectors (E, R, N) and their changes at each site.

    Changes, not trained values: their inner products lose no digits to what all have in common.
    """
    num_experts, rank, width = received_ERN.shape
    vectors = np.empty((num_experts, (1 + len(trained)) * rank, width), np.float32)
    vectors[:, :rank] = received_ERN
    for site, after_ERN in enumerate(trained, start=1):
        np.subtract(after_ERN, vectors[:, :rank], out=vectors[:, site * rank : (site + 1) * rank])
    return ChangedFactor(vectors=vectors, gram=vectors @ np.swapaxes(vectors, -1, -2))


@dataclass(frozen=True, kw_only=True)
class Changes:
    """The changes of one projection at every site."""

    of_A: ChangedFactor
    of_B: ChangedFactor
    """Of B transposed."""
    rank: int

    def gram(self) -> NDArray[np.float64]:
        """(E, C, C) inner products of the sites' changes: four terms, each a sum of R x R blocks, multiplied."""
        A, B, R = self.of_A.gram, self.of_B.gram, self.rank
        # Repeats an R x R block for every site, by products: numpy is slow where so few values follow each other.
        spread: NDArray[np.float32] = np.tile(np.eye(R, dtype=np.float32), A.shape[-1] // R - 1)
        a, b = A[:, R:, R:], B[:, R:, R:]
        # In place, since a new array for every sum takes longer than the sum.
        after_a = spread.T @ A[:, :R, R:]
        after_a += a
        symmetric = (A[:, R:, :R] + spread.T @ A[:, :R, :R]) @ spread
        symmetric += after_a
        symmetric *= b
        of_received = spread.T @ B[:, :R, :R] @ spread
        of_received *= a
        symmetric += of_received
        # Half of a symmetric matrix: its blocks are summed once.
        half = B[:, R:, :R] @ spread
        half *= after_a
        half += 0.5 * symmetric
        found = _block_sums(half, R)
        return np.asarray(found + np.swapaxes(found, -1, -2), np.float64)

    def weighted_sum(self, weights_CE: NDArray[np.float64]) -> WeightedSum:
        """``sum_i w_i change_i``, in the span of A and ``sum_i w_i a_i``, of B and ``sum_i w_i b_i``.

        That is all of it to first order in the changes, and all of a single site's. What is left out of
        ``sum_i w_i b_i a_i`` is where the sites' changes of A and of B belong to no common direction.
        """
        rows, columns = self.of_A.coordinates(weights_CE), self.of_B.coordinates(weights_CE)
        weights_EV = np.repeat(weights_CE.T, self.rank, axis=-1)[..., None]
        A, B = rows.vectors[:, : self.rank], columns.vectors[:, : self.rank]
        a, b = weights_EV * rows.vectors[:, self.rank :], columns.vectors[:, self.rank :]
        by_site = (len(a), -1, *A.shape[1:])
        after = a + (weights_EV.reshape(*by_site[:2], self.rank, 1) * A[:, None]).reshape(a.shape)
        summed = np.swapaxes(b, -1, -2) @ after + np.swapaxes(B, -1, -2) @ a.reshape(by_site).sum(axis=1)
        return WeightedSum(rows=rows, columns=columns, received_A=A, received_B=np.swapaxes(B, -1, -2), change=summed)


def _block_sums(matrices_EVV: NDArray[np.floating], rank: int) -> NDArray[np.floating]:
    """(E, C, C) sums of the R x R blocks of (E, C R, C R) matrices."""
    ones = np.repeat(np.eye(matrices_EVV.shape[-1] // rank, dtype=np.float32), rank, axis=1)
    return np.asarray(ones @ matrices_EVV @ ones.T)


@dataclass(frozen=True, kw_only=True)
class WeightedSum:
    """A weighted sum of changes beside what was received, in coordinates of rows and of columns."""

    rows: Coordinates
    columns: Coordinates
    received_A: NDArray[np.float64]
    """(E, R, M)"""
    received_B: NDArray[np.float64]
    """(E, M, R)"""
    change: NDArray[np.float64]
    """(E, M, M)"""

    def lift(self, product: Factors) -> Factors:
        """The factors (E, R, I) and (E, O, R) of the product with these coordinates."""
        columns = self.columns.lift(np.swapaxes(product.B, -1, -2))
        return Factors(self.rows.lift(product.A), np.swapaxes(columns, -1, -2))


def changes_of(received: Factors, trained: Sequence[Factors]) -> Changes:
    """The changes of every site's product, from factors (E, R, I) and (E, O, R)."""
    return Changes(
        of_A=changed_factor(received.A, [after.A for after in trained]),
        of_B=changed_factor(np.swapaxes(received.B, -1, -2), [np.swapaxes(after.B, -1, -2) for after in trained]),
        rank=received.A.shape[-2],
    )
