"""FedCMOO: one set of weights for all sites, from compressed gradients of every objective."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strategies.simplex import Weights, projection

_STEPS = 1000
_STEP = 1e-3


def next_weights(gram_MM: NDArray[np.floating], last_M: Weights) -> Weights:
    """The weights after 1000 steps of projected gradient on the normalised Gram matrix, from the last round's.

    As the authors' code: Q over the square of the mean of sqrt(Q_jj + 1e-4), and steps of 1e-3, so that weights move
    towards the min-norm ones over several rounds.
    """
    gram = np.asarray(gram_MM, np.float64)
    normalised = gram / np.sqrt(np.diag(gram) + 1e-4).mean() ** 2
    weights = last_M
    for _ in range(_STEPS):
        weights = projection(weights - _STEP * normalised @ weights)
    return weights


def truncated(gradients_MD: NDArray[np.floating], rank: int) -> NDArray[np.float64]:
    """The nearest M gradients of the given rank: rank * (M + D) numbers to send.

    The authors draw a randomised singular value decomposition; of so few rows the exact one costs less.
    """
    left, values, right = np.linalg.svd(gradients_MD.astype(np.float64), full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def sparsified(gradients_MD: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """All but the ``count`` entries largest in size set to zero: as many values, and their places, to send."""
    flat = gradients_MD.astype(np.float64).ravel()
    kept = np.zeros_like(flat)
    largest = np.argpartition(-np.abs(flat), count - 1)[:count]
    kept[largest] = flat[largest]
    return kept.reshape(gradients_MD.shape)
