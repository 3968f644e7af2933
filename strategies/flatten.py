"""Matrices with a flatter spectrum: every direction of a step counts alike, or nearly so.

Shapes: R rank, I inputs, O outputs, S singular values; "..." any leading axes, such as experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.low_rank import Factors

_NOTHING = 1e-5
"""Singular values below this share of the largest are rounding of float32 values, and become 0."""


def flattened(matrices: NDArray[np.floating], amount: float) -> NDArray[np.float64]:
    """(..., O, I) matrices with singular values s^(1 - amount), at the Frobenius norm they had.

    An ``amount`` of 1 gives the polar factor, as Muon's steps (Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon) and isotropic merging (Marczak et al., 2025,
    https://arxiv.org/abs/2502.04959) have it; 0 changes nothing.
    """
    matrices = matrices.astype(np.float64)
    if amount == 0:
        return matrices
    left, sizes, right = np.linalg.svd(matrices, full_matrices=False)
    norms = np.sqrt((sizes**2).sum(axis=-1))
    return np.asarray((left * _flat(sizes, norms, amount)[..., None, :]) @ right)


def flattened_leading(matrices: NDArray[np.floating], amount: float, rank: int) -> Factors:
    """The 2 ``rank`` leading directions of (..., O, I), the first ``rank`` of them flattened at their common norm.

    A sum over sites has the rank of all their adapters together, and its last directions are noise: to give them as
    much weight as the first would drown these. ``rank`` is what the next adapter has room for; 2 ``rank`` directions
    are what a product of that rank can change in, so that the change of a single site is all there. Those behind
    the first stay smaller, and count where they agree with the adapter that the step is added to.
    """
    _, vectors = np.linalg.eigh(np.swapaxes(matrices, -1, -2) @ matrices)
    right = vectors[..., : -2 * rank - 1 : -1]
    parts = matrices @ right
    sizes = np.sqrt((parts**2).sum(axis=-2))
    leading = sizes[..., :rank]
    ratio = np.ones_like(sizes)
    flat = _flat(leading, np.sqrt((leading**2).sum(axis=-1)), amount)
    np.divide(flat, leading, out=ratio[..., :rank], where=leading > 0)
    return Factors(np.swapaxes(right, -1, -2), parts * ratio[..., None, :])


def _flat(sizes: NDArray[np.float64], norms: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """(..., S) ``sizes^(1 - amount)``, 0 where there is nothing, such that their squares sum to ``norms**2``."""
    is_something = sizes > _NOTHING * sizes.max(axis=-1, keepdims=True)
    flat = np.where(is_something, np.where(is_something, sizes, 1.0) ** (1.0 - amount), 0.0)
    length = np.sqrt((flat**2).sum(axis=-1))
    return np.asarray(flat * np.divide(norms, length, out=np.zeros_like(length), where=length > 0)[..., None])
