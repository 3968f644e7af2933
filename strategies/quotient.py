"""Quotients whose divisor may be a length of 0, or rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CANCELLED = 1e-6
"""Share of the squared length that a sum has if nothing cancels; of what keeps less, rounding of float32 is left, which
points nowhere."""


def divided(above: NDArray[np.float64] | float, below: NDArray[np.float64], otherwise: float) -> NDArray[np.float64]:
    """``above / below``, broadcast; ``otherwise`` where the divisor is not above 0."""
    shape = np.broadcast_shapes(np.shape(above), below.shape)
    return np.asarray(
        np.divide(above, below, out=np.full(shape, float(otherwise)), where=np.broadcast_to(below > 0, shape))
    )
