"""FedCMOO's weights and what it compresses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from strategies.base import ClientUpdate
from strategies.fedcmoo import GRADIENT, SHARES, WEIGHTS, FedCmoo, next_weights
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


def an_update(site, gradients_MD, num_examples):
    """What a site of one array with D values sends: its gradients at rank 1."""
    left, values, right = np.linalg.svd(gradients_MD)
    extras = {SHARES: left[:, 0], GRADIENT + "w": (values[0] * right[0])}
    extras = {name: array.astype(np.float32) for name, array in extras.items()}
    adapter = {"w": np.full(gradients_MD.shape[1], float(num_examples), np.float32)}
    return ClientUpdate(site=site, adapter=adapter, num_examples=num_examples, extras=extras)


ADAPTER = {"w": np.zeros(6, np.float32)}


def test_weights_come_from_the_mean_of_the_sites_gradients():
    """Against the dense mean of the truncated gradients."""
    rng = np.random.default_rng(2)
    gradients, examples = rng.normal(size=(3, 2, 6)), [1, 2, 5]
    updates = [an_update(str(i), gradients[i], examples[i]) for i in range(3)]
    strategy = FedCmoo()
    result = strategy.aggregate(ADAPTER, strategy.init_state(ADAPTER), updates)
    parts = [np.linalg.svd(one) for one in gradients]
    leading = [values[0] * np.outer(left[:, 0], right[0]) for left, values, right in parts]
    mean = np.average(leading, axis=0, weights=examples)
    expected = next_weights(mean @ mean.T, np.array([0.5, 0.5]))
    np.testing.assert_allclose(result.state[WEIGHTS], expected, atol=1e-6)
    np.testing.assert_allclose(result.adapter["w"], (1 + 4 + 25) / 8)
    again = strategy.aggregate(ADAPTER, result.state, updates)
    np.testing.assert_allclose(again.state[WEIGHTS], next_weights(mean @ mean.T, expected), atol=1e-6)


def test_weights_are_broadcast_and_none_before_the_first_round():
    strategy = FedCmoo()
    assert strategy.broadcast(strategy.init_state(ADAPTER))[WEIGHTS].shape == (0,)
    sent = strategy.broadcast({WEIGHTS: np.array([0.25, 0.75])})[WEIGHTS]
    assert sent.dtype == np.float32
    np.testing.assert_array_equal(sent, [0.25, 0.75])


def test_update_without_gradients_is_refused():
    strategy, update = FedCmoo(), an_update("a", np.ones((2, 6)), 1)
    strategy.check_update(ADAPTER, update)
    with pytest.raises(ValueError, match="names differ"):
        strategy.check_update(ADAPTER, replace(update, extras={}))
    without_shares = {name: array for name, array in update.extras.items() if name != SHARES}
    with pytest.raises(ValueError, match="one number for each objective"):
        strategy.check_update(ADAPTER, replace(update, extras=without_shares))


def test_a_site_with_other_objectives_is_left_out_and_named():
    strategy, rng = FedCmoo(), np.random.default_rng(3)
    good = [an_update(site, rng.normal(size=(2, 6)), 1) for site in "ab"]
    odd = an_update("c", rng.normal(size=(3, 6)), 1000)
    state = strategy.init_state(ADAPTER)
    result, without = (strategy.aggregate(ADAPTER, state, updates) for updates in ([*good, odd], good))
    np.testing.assert_array_equal(result.adapter["w"], without.adapter["w"])
    np.testing.assert_array_equal(result.state[WEIGHTS], without.state[WEIGHTS])
    assert without.diagnostics["verdicts"] == {}
    reason = "it has 3 objectives, the others 2: see method.rewards"
    assert result.diagnostics["verdicts"] == {"c": {"rejected": True, "reason": reason}}
    # Later the weights say how many there are, and two of a mind cannot change that.
    later = strategy.aggregate(ADAPTER, result.state, [good[0], odd, replace(odd, site="d")])
    assert sorted(later.diagnostics["verdicts"]) == ["c", "d"]
    assert later.state[WEIGHTS].size == 2


def test_who_is_right_about_the_number_of_objectives_must_be_clear():
    strategy, two = FedCmoo(), an_update("a", np.ones((2, 6)), 1)
    three = an_update("b", np.ones((3, 6)), 1)
    with pytest.raises(ValueError, match=r"sites have \[2, 3\] objectives: method.rewards must be the same"):
        strategy.aggregate(ADAPTER, strategy.init_state(ADAPTER), [two, three])
    with pytest.raises(ValueError, match=r"sites have \[3\] objectives, not 2 as before"):
        strategy.aggregate(ADAPTER, {WEIGHTS: np.array([0.5, 0.5], np.float32)}, [three])
