"""Arithmetic on named arrays: the few functions every strategy computes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.floating]]
"""Array name -> array. A LoRA adapter, a difference of two, or an optimiser moment."""

_PIECE = 2**14
"""Values summed at a time."""
LARGEST = 1e6
"""No weight is larger; squares of products of factors of that size still fit into float32."""


class NotFiniteError(ValueError):
    """A loss, gradient or array is NaN, infinite or out of all bounds: training has diverged."""


def weighted_mean(terms: Sequence[Arrays], weights: Sequence[float]) -> dict[str, NDArray[np.float32]]:
    """Mean of each array over ``terms``, summed in float64 and returned in float32.

    Raises:
        ValueError: If there is nothing to average, if a weight is negative or not finite,
            if all are zero, or if two terms differ in their names or shapes.
    """
    if not terms or len(terms) != len(weights):
        raise ValueError(f"{len(terms)} terms but {len(weights)} weights")
    total = float(np.sum(weights))
    if not (np.isfinite(total) and total > 0 and min(weights) >= 0):
        raise ValueError(f"weights must be finite, >= 0 and not all 0, got {list(weights)}")
    for term in terms[1:]:
        check_same_layout(terms[0], term)
    shares = [weight / total for weight in weights]
    return {name: _mean([term[name] for term in terms], shares) for name in terms[0]}


def _mean(arrays: Sequence[NDArray[np.floating]], shares: Sequence[float]) -> NDArray[np.float32]:
    """Sum of the arrays times their shares, a piece at a time, so that float64 sums stay in the processor's cache."""
    mean = np.empty(arrays[0].shape, np.float32)
    flat, summed = [array.reshape(-1) for array in arrays], mean.reshape(-1)
    for start in range(0, mean.size, _PIECE):
        piece = slice(start, start + _PIECE)
        accumulated = np.zeros(summed[piece].shape, np.float64)
        term = np.empty_like(accumulated)
        for values, share in zip(flat, shares, strict=True):
            accumulated += np.multiply(values[piece], share, out=term, dtype=np.float64)
        summed[piece] = accumulated
    return mean


def difference(left: Arrays, right: Arrays) -> dict[str, NDArray[np.floating]]:
    """``left - right``, array by array.

    Raises:
        ValueError: If the two differ in their names or shapes.
    """
    check_same_layout(left, right)
    return {name: left[name] - right[name] for name in left}


def dot(left: Arrays, right: Arrays) -> float:
    """Inner product of the two as one flat vector, in float64."""
    check_same_layout(left, right)
    return float(sum(np.vdot(left[name].astype(np.float64), right[name].astype(np.float64)) for name in left))


def norm(arrays: Arrays) -> float:
    """Euclidean length of all arrays as one flat vector."""
    return float(np.sqrt(dot(arrays, arrays)))


def spread(terms: Sequence[Arrays]) -> float:
    """Mean squared distance of the terms, each as one flat vector, to their plain mean, in float64.

    Raises:
        ValueError: If two terms differ in their names or shapes.
    """
    for term in terms[1:]:
        check_same_layout(terms[0], term)
    total = 0.0
    for name in terms[0]:
        mean = sum(term[name].astype(np.float64) for term in terms) / len(terms)
        total += sum(float(((term[name] - mean) ** 2).sum()) for term in terms)
    return total / len(terms)


def check_same_layout(left: Arrays, right: Arrays) -> None:
    """Raise ``ValueError`` unless both hold the same names with the same shapes.

    NumPy would broadcast a rank-1 LoRA matrix over a rank-8 one without a word.
    """
    if left.keys() != right.keys():
        raise ValueError(f"array names differ: {sorted(left.keys() ^ right.keys())[:4]}")
    for name in left:
        if left[name].shape != right[name].shape:
            raise ValueError(f"shapes of {name} differ: {left[name].shape} and {right[name].shape}")


def check_finite(arrays: Arrays) -> None:
    """Raise ``NotFiniteError`` naming the first array that holds NaN or infinity."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise NotFiniteError(f"{name} holds NaN or infinity")


def check_size(adapter: Arrays) -> None:
    """Raise ``NotFiniteError`` naming the first array with a value that is not finite, or beyond ``LARGEST``."""
    for name, array in adapter.items():
        low, high = array.min(initial=0.0), array.max(initial=0.0)
        if not (low >= -LARGEST and high <= LARGEST):
            check_finite({name: array})
            raise NotFiniteError(f"{name} holds {max(high, -low):.3g}; weights must be at most {LARGEST:g}")
