"""FIRM's weights: closed forms, scipy, limits, and the bound on how far two sites' weights lie apart."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from client.alignment.min_norm import (
    REGULARISERS,
    gram_matrix,
    min_norm_weights,
    normalised_gram,
    positive_part,
)


def grams(num, draws, seed=0):
    """Normalised Gram matrices of random gradients, every third of rank 1."""
    rng = np.random.default_rng(seed)
    for draw in range(draws):
        yield normalised_gram(gram_matrix(rng.normal(size=(num, 5 if draw % 3 else 1))))


def regulariser_of(name, beta, weights, p):
    """The three forms as they are written in the docstring."""
    return {
        "ridge": beta / 2 * (weights**2).sum(),
        "anchor": beta / 2 * ((weights - p) ** 2).sum(),
        "weighted": beta / 2 * (weights**2 / p).sum(),
    }[name]


def test_gram_matrix_is_divided_by_the_mean_squared_length():
    """Lengths 3 and 4: (9 + 16) / 2 = 12.5."""
    gram = gram_matrix(np.array([[3.0, 0.0], [0.0, 4.0]], np.float32))
    np.testing.assert_allclose(normalised_gram(gram), [[0.72, 0], [0, 1.28]])
    assert gram.dtype == np.float64
    np.testing.assert_array_equal(normalised_gram(np.zeros((2, 2))), np.zeros((2, 2)))


def test_two_objectives_by_hand():
    """a = 0.72, b = 1.28, c = 0: ridge (b + beta / 2) / (a + b + beta) and so on, with beta = 2 and p = (1/4, 3/4)."""
    gram, p = np.diag([0.72, 1.28]), np.array([0.25, 0.75])
    expected = {
        "ridge": (1.28 + 1) / (2 + 2),
        "anchor": (1.28 + 2 * 0.25) / (2 + 2),
        "weighted": (1.28 + 1 / 0.75) / (2 + 1 * (1 / 0.25 + 1 / 0.75)),
    }
    for name, first in expected.items():
        preference = None if name == "ridge" else p
        weights = min_norm_weights(gram, regulariser=name, beta=2, preference=preference)
        np.testing.assert_allclose(weights, [first, 1 - first])


@pytest.mark.parametrize("name", REGULARISERS)
def test_two_objectives_are_scipys_minimum(name):
    p = np.array([0.5, 0.5]) if name == "ridge" else np.array([0.2, 0.8])
    for gram in grams(2, 12):
        for beta in (0.01, 1.0):

            def objective(first, gram=gram, beta=beta):
                weights = np.array([first, 1 - first])
                return weights @ gram @ weights + regulariser_of(name, beta, weights, p)

            best = minimize_scalar(objective, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).x
            weights = min_norm_weights(gram, regulariser=name, beta=beta, preference=p)
            assert weights[0] == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("name", REGULARISERS)
@pytest.mark.parametrize("num", [2, 4])
def test_no_other_weights_are_better(name, num):
    rng = np.random.default_rng(num)
    p = np.full(num, 1 / num) if name == "ridge" else rng.dirichlet(np.ones(num))
    others = rng.dirichlet(np.ones(num) / 2, 200)
    for gram in grams(num, 10):
        weights = min_norm_weights(gram, regulariser=name, beta=0.1, preference=p)
        values = [x @ gram @ x + regulariser_of(name, 0.1, x, p) for x in (weights, *others)]
        assert values[0] <= min(values) + 1e-12


@pytest.mark.parametrize("name", ["anchor", "weighted"])
def test_beta_leads_from_mgda_to_the_preference(name):
    p = np.array([0.2, 0.5, 0.3])
    for gram in grams(3, 6):
        mgda = min_norm_weights(gram, regulariser=name, beta=0, preference=p)
        np.testing.assert_array_equal(mgda, min_norm_weights(gram, regulariser="ridge", beta=0))
        np.testing.assert_allclose(min_norm_weights(gram, regulariser=name, beta=1e9, preference=p), p, atol=1e-6)


def test_ridge_is_the_anchor_at_equal_preferences():
    for gram in grams(4, 6):
        ridge = min_norm_weights(gram, regulariser="ridge", beta=0.3)
        np.testing.assert_allclose(ridge, min_norm_weights(gram, regulariser="anchor", beta=0.3), atol=1e-12)


@pytest.mark.parametrize("name", REGULARISERS)
@pytest.mark.parametrize("num", [2, 3, 6])
def test_weights_of_two_sites_differ_within_the_bound(name, num):
    """||lambda - lambda'|| <= (2 / beta) ||(Q - Q') lambda||, which plain MGDA breaks for any beta > 0."""
    for left, right in zip(grams(num, 30, seed=1), grams(num, 30, seed=2), strict=True):
        near = 0.9 * left + 0.1 * right
        for beta in (0.01, 0.3, 3.0):
            ours, theirs = (min_norm_weights(gram, regulariser=name, beta=beta) for gram in (left, near))
            bound = 2 / beta * np.linalg.norm((left - near) @ ours)
            assert np.linalg.norm(ours - theirs) <= bound + 1e-9


def test_without_regulariser_nearly_equal_gradients_may_end_in_opposite_corners():
    """g1 = (1, 0) and g2 = (1 +- e, 0): the shorter one takes all."""
    corners = [
        min_norm_weights(gram_matrix(np.array([[1.0], [1 + sign * 1e-6]])), regulariser="ridge", beta=0)
        for sign in (-1, 1)
    ]
    np.testing.assert_allclose(corners, [[0, 1], [1, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("gram", "settings", "message"),
    [
        (np.ones((2, 3)), {}, r"must be \(M, M\), got the shape \(2, 3\)"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), {}, "symmetric"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), {}, "NaN"),
        (np.eye(2), {"beta": -1.0}, "beta must be .* >= 0, got -1.0"),
        (np.eye(2), {"regulariser": "lasso"}, "one of .*, got 'lasso'"),
        (np.eye(2), {"preference": np.array([0.5, 0.6])}, "2 weights >= 0 that sum to 1"),
        (np.eye(2), {"preference": np.array([1.0])}, "2 weights >= 0 that sum to 1"),
        (np.eye(2), {"preference": np.array([0.4, 0.6])}, "ridge knows no preference"),
        (np.eye(2), {"regulariser": "weighted", "preference": np.array([0.0, 1.0])}, "preferences > 0"),
    ],
)
def test_what_cannot_be_solved_is_refused(gram, settings, message):
    with pytest.raises(ValueError, match=message):
        min_norm_weights(gram, **({"regulariser": "ridge", "beta": 0.1} | settings))


def test_positive_part_is_the_nearest_gram_matrix():
    """By hand, the rest has no positive eigenvalue; and no Gram matrix that is drawn is nearer."""
    np.testing.assert_allclose(positive_part(np.array([[1.0, 2.0], [2.0, 1.0]])), np.full((2, 2), 1.5))
    rng = np.random.default_rng(0)
    for _ in range(50):
        matrix = rng.normal(size=(3, 3))
        matrix += matrix.T
        found = positive_part(matrix)
        assert np.linalg.eigvalsh(found)[0] >= -1e-12
        assert np.linalg.eigvalsh(found - matrix)[0] >= -1e-12
        for _ in range(20):
            other = found + 0.1 * rng.normal(size=(3, 3))
            other = positive_part(other + other.T - found)
            assert np.linalg.norm(found - matrix) <= np.linalg.norm(other - matrix) + 1e-12
        np.testing.assert_allclose(positive_part(found), found, atol=1e-12)
