"""Minimisers and projections on the simplex: against scipy, by hand and by optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from strategies.simplex import minimiser, projection


def problems(num, kind, draws):
    """Random H and c: of full rank; gradients that are linearly dependent, some of them equal; or badly scaled."""
    rng = np.random.default_rng([num, len(kind)])
    for draw in range(draws):
        factor = rng.normal(size=(num, num + 2 if kind == "full" else rng.integers(1, num + 1)))
        if kind == "dependent" and draw % 2:
            factor[-1] = factor[0]
        if kind == "scaled":
            factor *= 10.0 ** rng.uniform(-4, 4, (num, 1))
        linear = rng.normal(size=num) if kind == "full" and draw % 2 else np.zeros(num)
        yield factor @ factor.T, linear


def by_scipy(hessian, linear):
    """Sequential least squares on the simplex."""
    num = len(linear)
    return minimize(
        lambda x: x @ hessian @ x / 2 + linear @ x,
        np.full(num, 1 / num),
        jac=lambda x: hessian @ x + linear,
        method="SLSQP",
        bounds=[(0, 1)] * num,
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1, "jac": np.ones_like},
        options={"ftol": 1e-14, "maxiter": 500},
    ).x


@pytest.mark.parametrize("kind", ["full", "dependent", "scaled"])
@pytest.mark.parametrize("num", [2, 3, 7])
def test_minimum_satisfies_the_optimality_conditions(num, kind):
    """No slope is below the common slope of the positive weights, up to rounding."""
    for hessian, linear in problems(num, kind, 50):
        x = minimiser(hessian, linear)
        assert x.min() >= 0
        assert x.sum() == pytest.approx(1, abs=1e-12)
        slope = hessian @ x + linear
        assert slope.min() >= x @ slope - 1e-10 * (np.abs(hessian).max() + np.abs(linear).max())


@pytest.mark.parametrize("kind", ["full", "dependent"])
@pytest.mark.parametrize("num", [2, 3, 7])
def test_minimum_is_scipys(num, kind):
    for hessian, linear in problems(num, kind, 8):
        ours, theirs = minimiser(hessian, linear), by_scipy(hessian, linear)
        value, best = (x @ hessian @ x / 2 + linear @ x for x in (ours, theirs))
        assert value == pytest.approx(best, abs=1e-7 * np.abs(hessian).max())
        if kind == "full":  # else several points may be least
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_tiny_gradients_beside_a_large_one_share_by_their_own_lengths():
    """Orthogonal gradients get weights in proportion to 1 / ||g||^2: here 1e-12 : 1 / 4 : 1, up to scale."""
    x = minimiser(np.diag([1.0, 4e-12, 1e-12]), np.zeros(3))
    np.testing.assert_allclose(x, [0.8e-12, 0.2, 0.8], rtol=1e-3)


def test_where_all_points_are_equal_the_centre_is_taken():
    np.testing.assert_array_equal(minimiser(np.zeros((3, 3)), np.zeros(3)), [1 / 3] * 3)
    np.testing.assert_array_equal(minimiser(np.ones((2, 2)), np.zeros(2)), [0.5, 0.5])


def test_without_curvature_the_lower_end_is_taken():
    """g2 = 2 g1: the shorter one."""
    np.testing.assert_array_equal(minimiser(np.array([[1.0, 2.0], [2.0, 4.0]]), np.zeros(2)), [1, 0])
    np.testing.assert_array_equal(minimiser(np.zeros((2, 2)), np.array([1.0, 0.0])), [0, 1])


def test_projection_is_the_nearest_point():
    """As the minimiser of ||x - point||^2; a point of the simplex stays."""
    rng = np.random.default_rng(0)
    for num in (1, 2, 6):
        for point in rng.normal(size=(20, num)):
            nearest = projection(point)
            assert nearest.sum() == pytest.approx(1)
            np.testing.assert_allclose(nearest, minimiser(np.eye(num), -point), atol=1e-12)
            np.testing.assert_allclose(projection(nearest), nearest, atol=1e-15)
