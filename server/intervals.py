"""A mean over seeds and how far to trust it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# 0.975 quantile of Student's t for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval (Student's t); the latter NaN for a single value."""
    count = len(values)
    half = _T[min(count - 1, len(_T)) - 1] * np.std(values, ddof=1) / np.sqrt(count) if count > 1 else np.nan
    return float(np.mean(values)), float(half)


def with_interval(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± half the interval; a single value alone."""
    mean, half = interval(values)
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def rounded_with_interval(values: Sequence[float], digits: int = 3) -> str:
    """As ``with_interval``, the mean to so many significant digits and half the interval to two."""
    mean, half = interval(values)
    return f"{mean:.{digits}g}" + (f" ± {half:.2g}" if len(values) > 1 else "")
