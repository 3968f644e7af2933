"""The problems' gradients, optima and Pareto sets against differences and random trials."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.firm_problems import Bandit, Bumps, Quadratics, distance_to_pareto_set

PROBLEMS = {
    "quadratics": lambda: replace(Quadratics.drawn(np.random.default_rng(0), 3, num_sites=4, size=6), noise=0.0),
    "bumps": lambda: replace(Bumps.drawn(np.random.default_rng(0), num_sites=4, size=6), noise=0.0),
    "bandit": lambda: replace(Bandit.drawn(np.random.default_rng(0), num_sites=3), samples=2_000_000),
}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


def test_mean_gradient_is_that_of_the_global_losses(problem):
    """Central differences; two million draws leave the bandit's gradients a noise of about 1e-3."""
    rng = np.random.default_rng(1)
    point = problem.start + problem.optima[0] / 3
    mean = problem.gradients(np.tile(point, (problem.num_sites, 1)), rng).mean(axis=0)
    for index in range(0, len(point), 3):
        step = 1e-5 * np.eye(len(point))[index]
        slope = (problem.losses(point + step) - problem.losses(point - step)) / 2e-5
        np.testing.assert_allclose(mean[:, index], slope, atol=3e-3)


def test_few_draws_are_right_on_average():
    """The baseline out of the same draws does not shrink the gradient."""
    exact, noisy = PROBLEMS["bandit"](), replace(PROBLEMS["bandit"](), samples=3)
    rng, points = np.random.default_rng(2), np.tile(exact.optima[0] / 2, (exact.num_sites, 1))
    mean = np.mean([noisy.gradients(points, rng) for _ in range(3000)], axis=0)
    np.testing.assert_allclose(mean, exact.gradients(points, rng), atol=0.03)


def test_best_point_of_a_weighted_sum_is_on_the_pareto_set(problem):
    rng = np.random.default_rng(3)
    for preference in rng.dirichlet(np.ones(len(problem.optima)), 5):
        best = problem.best(preference)
        assert distance_to_pareto_set(problem, best) == pytest.approx(0, abs=1e-6)
        least = preference @ problem.losses(best)
        away = rng.normal(size=(50, len(best)))
        assert all(preference @ problem.losses(best + step) > least for step in away - away.mean(axis=1)[:, None])


def test_distance_is_that_to_the_nearest_mixture_of_optima(problem):
    rng = np.random.default_rng(4)
    point = problem.start
    mixtures = rng.dirichlet(np.ones(len(problem.optima)), 3000) @ problem.optima
    nearest = np.linalg.norm(mixtures - point, axis=1).min()
    assert distance_to_pareto_set(problem, point) == pytest.approx(nearest, rel=0.02)


def test_front_of_the_bumps_is_concave_where_no_weighted_sum_is_least():
    """At equal preference the middle of the Pareto set is worse than its ends, and lies above the line between them."""
    problem = Bumps.drawn(np.random.default_rng(0), num_sites=4, size=6)
    first, last, middle = (problem.losses(point) for point in (*problem.optima, problem.optima.mean(axis=0)))
    assert middle.sum() > first.sum() == pytest.approx(last.sum())
    assert np.linalg.norm(problem.best(np.array([0.5, 0.5])) - problem.optima.mean(axis=0)) > 0.9
