"""The sites' changes of one LoRA projection in coordinates as small as their factors, for many experts at once.

A site's product is (B + b_i)(A + a_i), its change b_i (A + a_i) + B a_i: all of it lies in the span of the rows of A
and every a_i, and of the columns of B and every b_i. In orthonormal coordinates of these, whose number does not depend
on the model's width, lengths and singular values are the same.

Shapes: E experts, C sites, R rank, V = (1 + C) R vectors of a span, N width of the space, M coordinates, K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies.low_rank import Factors

_RIDGE = 1e-5
"""Added to the inner products of unit vectors: far above their rounding in float32, far below what is learnt."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """The span of the received vectors of one side and of their changes at every site, for each expert."""

    vectors: NDArray[np.float32]
    """(E, V, N) R received vectors, then R changes of each site."""
    gram: NDArray[np.float64]
    """(E, V, V) their inner products."""
    coordinates: NDArray[np.float64]
    """(E, V, M) of each vector, in a basis that is orthonormal to ``_RIDGE``."""
    is_whole_space: bool
    """Whether the coordinates are those of the space, which is no wider than the vectors are many."""

    def lift(self, rows_EKM: NDArray[np.float64]) -> NDArray[np.float32]:
        """(E, K, N) the vectors with these coordinates."""
        if self.is_whole_space:
            return rows_EKM.astype(np.float32)
        # A vector's coordinates are its length times a row of a triangle, or all 0.
        diagonal = np.diagonal(self.coordinates, axis1=-2, axis2=-1)
        triangle = self.coordinates + (diagonal == 0)[..., None] * np.eye(self.coordinates.shape[-1])
        weights_EVK = np.linalg.solve(np.swapaxes(triangle, -1, -2), np.swapaxes(rows_EKM, -1, -2))
        return np.asarray(np.swapaxes(weights_EVK, -1, -2).astype(np.float32) @ self.vectors)


def span_of(received_ERN: NDArray[np.floating], trained: Sequence[NDArray[np.floating]]) -> Span:
    """Span of the received vectors (E, R, N) and their changes at each site.

    Changes, not trained values: their inner products lose no digits to what all have in common. A vector that depends
    on those before it, or is 0, gets a coordinate that nothing real has, which lifts to 0.
    """
    num_experts, rank, width = received_ERN.shape
    vectors = np.empty((num_experts, (1 + len(trained)) * rank, width), np.float32)
    vectors[:, :rank] = received_ERN
    for site, after_ERN in enumerate(trained):
        np.subtract(after_ERN, received_ERN, out=vectors[:, (1 + site) * rank : (2 + site) * rank])
    gram = (vectors @ np.swapaxes(vectors, -1, -2)).astype(np.float64)
    if vectors.shape[1] >= width:
        return Span(vectors=vectors, gram=gram, coordinates=vectors.astype(np.float64), is_whole_space=True)
    lengths_EV = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    inverse_EV = np.divide(1.0, lengths_EV, out=np.zeros_like(lengths_EV), where=lengths_EV > 0)
    unit = gram * inverse_EV[:, :, None] * inverse_EV[:, None, :]
    diagonal = np.arange(unit.shape[-1])
    unit[:, diagonal, diagonal] = 1.0 + _RIDGE
    triangle = np.linalg.cholesky(unit)
    return Span(vectors=vectors, gram=gram, coordinates=lengths_EV[:, :, None] * triangle, is_whole_space=False)


@dataclass(frozen=True, kw_only=True)
class Changes:
    """The changes of one projection at every site."""

    rows: Span
    """Of A."""
    columns: Span
    """Of B, transposed."""
    rank: int

    def gram(self) -> NDArray[np.float64]:
        """(E, C, C) inner products of the sites' changes."""
        of_A, of_B = (self._by_site(span) for span in (self.rows, self.columns))
        a, b = of_A[:, 1:, :, 1:], of_B[:, 1:, :, 1:]
        after_a = a + of_A[:, :1, :, 1:]
        after_after = after_a + of_A[:, 1:, :, :1] + of_A[:, :1, :, :1]
        mixed = np.einsum("ecrdq,ecrdq->ecd", np.broadcast_to(of_B[:, 1:, :, :1], b.shape), after_a)
        of_B_alone = np.broadcast_to(of_B[:, :1, :, :1], a.shape)
        plain = np.einsum("ecrdq,ecrdq->ecd", b, after_after) + np.einsum("ecrdq,ecrdq->ecd", of_B_alone, a)
        return np.asarray(plain + mixed + np.swapaxes(mixed, -1, -2))

    def received(self) -> Factors:
        """B A in coordinates."""
        return self._factors(self.rows.coordinates[:, : self.rank], self.columns.coordinates[:, : self.rank])

    def weighted_sum(self, weights_CE: NDArray[np.float64]) -> Factors:
        """``sum_i w_i change_i`` in coordinates: B (sum_i w_i a_i) + sum_i b_i w_i (A + a_i)."""
        weights_EV = np.repeat(weights_CE.T, self.rank, axis=-1)[..., None]
        A, a = np.split(self.rows.coordinates, [self.rank], axis=1)
        weighted_a = weights_EV * a
        by_site = weighted_a.reshape(len(a), -1, *A.shape[1:])
        after = weighted_a + weights_EV * np.tile(A, (1, by_site.shape[1], 1))
        return self._factors(np.concatenate([by_site.sum(axis=1), after], axis=1), self.columns.coordinates)

    def lift(self, product: Factors) -> Factors:
        """The factors with these coordinates, at the model's width."""
        return self._factors(self.rows.lift(product.A), self.columns.lift(np.swapaxes(product.B, -1, -2)))

    def _by_site(self, span: Span) -> NDArray[np.float64]:
        """(E, 1 + C, R, 1 + C, R) inner products."""
        blocks = (span.gram.shape[-1] // self.rank, self.rank)
        return span.gram.reshape(-1, *blocks, *blocks)

    @staticmethod
    def _factors(A: NDArray[np.floating], columns: NDArray[np.floating]) -> Factors:
        return Factors(A, np.swapaxes(columns, -1, -2))


def changes_of(received: Factors, trained: Sequence[Factors]) -> Changes:
    """The changes of every site's product, from factors (E, R, I) and (E, O, R)."""
    return Changes(
        rows=span_of(received.A, [after.A for after in trained]),
        columns=span_of(np.swapaxes(received.B, -1, -2), [np.swapaxes(after.B, -1, -2) for after in trained]),
        rank=received.A.shape[-2],
    )
