"""FedCMOO's weights and what it compresses."""

from __future__ import annotations

import numpy as np

from strategies.fedcmoo import next_weights, sparsified, truncated
from strategies.simplex import minimiser


def test_weights_end_at_the_min_norm_ones():
    """After many rounds, against the exact solver; one round goes part of the way."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(3, 8)) * np.array([[1.0], [1.5], [2.0]])
    gram = gradients @ gradients.T
    exact = minimiser(2 * gram, np.zeros(3))
    weights = [np.full(3, 1 / 3)]
    for _ in range(12):
        weights.append(next_weights(gram, weights[-1]))
    np.testing.assert_allclose(weights[-1], exact, atol=0.01)
    assert np.linalg.norm(weights[1] - exact) > 0.05


def test_one_round_by_hand():
    """Q = diag(1, 4), mean length 1.5, far from the faces: each step takes 1e-3 (Q' lambda minus its mean) away."""
    first = 0.5
    for _ in range(1000):
        slopes = np.array([1.0, 4.0]) / (np.sqrt(np.array([1.0, 4.0]) + 1e-4).mean() ** 2) * [first, 1 - first]
        first -= 1e-3 * (slopes[0] - slopes.mean())
    np.testing.assert_allclose(next_weights(np.diag([1.0, 4.0]), np.array([0.5, 0.5])), [first, 1 - first])


def test_truncation_is_the_nearest_of_its_rank():
    rng = np.random.default_rng(1)
    gradients = rng.normal(size=(3, 7))
    nearest = truncated(gradients, 2)
    assert np.linalg.matrix_rank(nearest) == 2
    lost = np.linalg.norm(gradients - nearest)
    np.testing.assert_allclose(lost, np.linalg.svd(gradients)[1][2])
    np.testing.assert_allclose(truncated(gradients, 3), gradients)


def test_the_largest_entries_stay():
    gradients = np.array([[3.0, -1.0, 0.5], [0.1, -4.0, 2.0]])
    np.testing.assert_array_equal(sparsified(gradients, 3), [[3, 0, 0], [0, -4, 2]])
    np.testing.assert_array_equal(sparsified(gradients, 6), gradients)
