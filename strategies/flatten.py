"""Matrices with a flatter spectrum: every direction of a step counts alike, or nearly so.

Shapes: I inputs, O outputs, S singular values; "..." any leading axes, such as experts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.quotient import divided

_NOTHING = 1e-5
"""Singular values below this share of the largest are nothing."""


def flattened(
    matrices: NDArray[np.floating],
    amount: NDArray[np.floating] | float,
    leading: int | None = None,
    rounding: NDArray[np.floating] | float = 0.0,
) -> NDArray[np.float64]:
    """(..., O, I) matrices with singular values s^(1 - amount), at the Frobenius norm they had.

    An ``amount``, (...) or one for all, of 1 gives the polar factor, as Muon's steps (Jordan et al., 2024,
    https://kellerjordan.github.io/posts/muon) and isotropic merging (Marczak et al., 2025,
    https://arxiv.org/abs/2502.04959) have it; 0 for all changes nothing.

    With ``leading``, only so many of the largest are flattened, at the norm they have together; the rest stay as they
    are, and below them. Singular values up to ``rounding``, (...), are what a difference of far larger numbers leaves
    of itself: raised to the others' size, they would be the most of what few examples taught an expert.
    """
    wide: NDArray[np.float64] = matrices.astype(np.float64)
    if not np.any(amount):
        return wide
    left, sizes, right = np.linalg.svd(wide, full_matrices=False)
    sizes[..., :leading] = _flat(sizes[..., :leading], np.asarray(amount)[..., None], np.asarray(rounding)[..., None])
    return np.asarray((left * sizes[..., None, :]) @ right)


def _flat(
    sizes: NDArray[np.float64], amount: NDArray[np.floating], rounding: NDArray[np.floating]
) -> NDArray[np.float64]:
    """(..., S) ``sizes^(1 - amount)``, 0 where there is nothing, rescaled to the length they had."""
    is_something = sizes > np.maximum(_NOTHING * sizes[..., :1], rounding)
    flat = np.where(is_something, np.where(is_something, sizes, 1.0) ** (1.0 - amount), 0.0)
    before, after = (np.sqrt((s**2).sum(axis=-1, keepdims=True)) for s in (sizes, flat))
    return np.asarray(flat * divided(before, after, 0.0))
