"""Convex problems over the probability simplex, as small as the number of objectives.

Shapes: M objectives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float64]
Matrix = NDArray[np.float64]


def minimiser(hessian_MM: Matrix, linear_M: Weights) -> Weights:
    """The point of the simplex where ``x' H x / 2 + c' x`` is least, exact up to rounding.

    H is symmetric and positive definite, or only semidefinite where c = 0 (linearly dependent gradients). Where
    several points are least it is one of them, and the centre if all are.

    Two weights come in closed form. More come by active sets, as Wolfe's algorithm for the point of least norm in a
    polytope (Mathematical Programming 11, 1976): from a vertex on, the weight whose slope is lowest enters,
    the minimiser over the free weights is taken or walked towards, and a weight that reaches zero leaves.
    """
    num = len(linear_M)
    centre = np.full(num, 1 / num)
    slope = hessian_MM @ centre + linear_M
    if np.ptp(slope) == 0:
        return centre
    if num == 2:
        curvature = hessian_MM[0, 0] - 2 * hessian_MM[0, 1] + hessian_MM[1, 1]
        # At the centre the slope along (1, -1) is known; with no curvature the better end is least.
        fall = slope[1] - slope[0]
        first = 0.5 + fall / curvature if curvature > 0 else float(fall > 0)
        first = float(np.clip(first, 0, 1))
        return np.array([first, 1 - first])
    return _by_active_sets(hessian_MM, linear_M)


def projection(point_M: Weights) -> Weights:
    """The point of the simplex nearest to ``point_M`` (Held, Wolfe & Crowder 1974): a common shift, cut at zero."""
    falling = np.sort(point_M)[::-1]
    shifts = (np.cumsum(falling) - 1) / np.arange(1, len(falling) + 1)
    return np.asarray(np.maximum(point_M - shifts[falling > shifts][-1], 0))


def _by_active_sets(hessian: Matrix, linear: Weights) -> Weights:
    x = np.zeros(len(linear))
    x[np.argmin(np.diag(hessian) / 2 + linear)] = 1
    while True:
        slope = hessian @ x + linear
        level = x @ slope
        # Slopes nearer to the free weights' common level than this differ by rounding only.
        rounding = 4 * len(x) * np.finfo(np.float64).eps * (np.abs(hessian) @ x + np.abs(linear))
        entering = int(np.argmin(slope + rounding))
        if slope[entering] + rounding[entering] >= level:
            return x
        following = _entered(hessian, linear, x, entering)
        step = following - x
        if (slope - level) @ step + step @ hessian @ step / 2 >= 0:
            return x
        x = following


def _entered(hessian: Matrix, linear: Weights, x: Weights, entering: int) -> Weights:
    """The minimiser over a face of the simplex that lies lower than ``x``, with one more weight set free."""
    free = x > 0
    free[entering] = True
    while True:
        target = _stationary(hessian, linear, free)
        blocking = np.flatnonzero(target < 0)
        if not len(blocking):
            return target
        shares = x[blocking] / (x[blocking] - target[blocking])
        x = np.maximum(x + shares.min() * (target - x), 0)
        leaving = blocking[np.argmin(shares)]
        x[leaving] = 0
        free[leaving] = False


def _stationary(hessian: Matrix, linear: Weights, free: NDArray[np.bool_]) -> Weights:
    """Least point of the plane in which the free weights sum to 1 and the others are 0; its weights may be negative."""
    size = int(free.sum())
    lengths = np.sqrt(np.diag(hessian)[free])
    lengths[lengths == 0] = 1
    # In x * lengths the Hessian has a unit diagonal: gradients may be of very different lengths.
    shares = lengths.min() / lengths
    system = np.block(
        [[hessian[np.ix_(free, free)] / np.outer(lengths, lengths), shares[:, None]], [shares, np.zeros(1)]]
    )
    # Least squares, since gradients may be linearly dependent.
    solution = np.linalg.lstsq(system, np.append(-linear[free] / lengths, lengths.min()))[0]
    x = np.zeros(len(linear))
    x[free] = solution[:size] / lengths
    return x
