"""Points that no other beats, and how much they dominate; more is better in every objective.

Shapes: N points, M objectives.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def non_dominated(points_NM: Points) -> NDArray[np.bool_]:
    """(N,): no other point is at least as good in every objective and better in one."""
    as_good = (points_NM[:, None] >= points_NM).all(axis=2)
    better = (points_NM[:, None] > points_NM).any(axis=2)
    return np.asarray(~(as_good & better).any(axis=0))


def hypervolume(points_NM: Points, reference_M: NDArray[np.float64]) -> float:
    """Volume of what the points dominate above the reference point, exact.

    Slice by slice along the last objective, recursively (While et al. 2006, "A Faster Algorithm for Calculating
    Hypervolume", HSO): for the few points of a front, in two, three or a few more objectives.

    Raises:
        ValueError: If the shapes do not fit, or a value is not finite.
    """
    if points_NM.ndim != 2 or points_NM.shape[1:] != reference_M.shape or not reference_M.size:
        raise ValueError(f"points {points_NM.shape} and reference {reference_M.shape} must be (N, M) and (M,)")
    if not (np.isfinite(points_NM).all() and np.isfinite(reference_M).all()):
        raise ValueError("a hypervolume needs finite points and a finite reference")
    gains = points_NM - reference_M
    return _volume(gains[(gains > 0).all(axis=1)])


def _volume(gains: Points) -> float:
    if not len(gains):
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    falling = gains[np.argsort(-gains[:, -1])]
    depths = -np.diff(falling[:, -1], append=0.0)
    return float(sum(depth * _volume(falling[: index + 1, :-1]) for index, depth in enumerate(depths) if depth > 0))
