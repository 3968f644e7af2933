"""Rounds of FIRM and its rivals: cases in which they are one another, and what they send."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import firm_analytic
from benchmarks.firm_analytic import BEDS, Front, of_seed, preferences, tables
from benchmarks.firm_methods import Schedule, fedcmoo, firm, fsmgda, scalarised, sparsified, spread, truncated
from benchmarks.firm_problems import Quadratics, distance_to_pareto_set

EXACT = replace(Quadratics.drawn(np.random.default_rng(0), 2, num_sites=4, size=6), noise=0.0)
ALIKE = replace(EXACT, centres_CMD=np.broadcast_to(EXACT.optima, EXACT.centres_CMD.shape))
EQUAL = np.array([0.5, 0.5])


def played(method, problem=EXACT, rounds=1):
    point, weights, rng = problem.start, EQUAL, np.random.default_rng(0)
    for _ in range(rounds):
        last = method(problem, point, weights, rng)
        point, weights = last.point_D, last.weights_CM.mean(axis=0)
    return last


def test_spread_is_the_mean_squared_distance_to_the_mean():
    assert spread(np.array([[0.0, 0.0], [2.0, 0.0]])) == 1


@pytest.mark.parametrize("regulariser", ["anchor", "weighted"])
def test_a_strong_regulariser_is_linear_scalarisation(regulariser):
    preference = np.array([0.3, 0.7])
    ours, theirs = played(firm(regulariser, 1e9, preference)), played(scalarised(preference))
    np.testing.assert_allclose(ours.point_D, theirs.point_D, atol=1e-6)


def test_scalarisation_ends_at_the_weighted_sums_optimum():
    """Sites agree on steepness, so that FedAvg has no drift to speak of."""
    preference = np.array([0.3, 0.7])
    np.testing.assert_allclose(played(scalarised(preference), rounds=80).point_D, EXACT.best(preference), atol=1e-3)


def test_sites_that_are_alike_agree_and_reach_the_pareto_set():
    last = played(firm("ridge", 0.0), ALIKE, rounds=80)
    assert spread(last.weights_CM) == last.drift == 0
    assert distance_to_pareto_set(ALIKE, last.point_D) < 1e-3


def test_with_one_local_step_and_sites_alike_mgda_is_fsmgda():
    """Up to the normalisation of the Gram matrix, which changes no weights."""
    schedule = Schedule(local_steps=1)
    ours, theirs = played(firm("ridge", 0.0, None, schedule), ALIKE), played(fsmgda(schedule), ALIKE)
    np.testing.assert_allclose(ours.point_D, theirs.point_D, atol=1e-12)


def test_fedcmoo_moves_its_weights_towards_the_min_norm_ones():
    """Sites that are alike, gradients that are parallel enough for rank 1: the steeper objective loses weight."""
    rounds = [played(fedcmoo("svd"), ALIKE, rounds=count).weights_CM[0] for count in (1, 3)]
    assert 0.5 < rounds[0][0] < rounds[1][0]


@pytest.mark.parametrize(
    ("method", "numbers"),
    [
        (firm("ridge", 1.0), 6),
        (scalarised(EQUAL), 6),
        (fsmgda(), 12),
        (fedcmoo("svd"), 14),
        (fedcmoo("topk"), 12),
        (fedcmoo("none"), 18),
    ],
)
def test_what_a_site_sends_is_counted(method, numbers):
    """Six parameters, two objectives: FedCMOO adds 2 + 6 for rank 1, three entries and places, or both gradients."""
    assert played(method).numbers_up == numbers


def test_disagreement_falls_with_beta_and_keeps_the_bound():
    rounds = [played(firm("ridge", beta), rounds=12) for beta in (0.0, 0.1, 1.0, 10.0)]
    assert np.all(np.diff([spread(one.weights_CM) for one in rounds]) < 0)
    assert all(0 < one.bound <= 1 for one in rounds[1:])


def test_exact_optima_dominate_nearly_the_whole_front():
    front = Front(EXACT)
    many = [EXACT.losses(EXACT.best(np.array([share, 1 - share]))) for share in np.linspace(0, 1, 60)]
    assert 0.95 < front.share(many) <= 1 + 1e-9
    assert front.share([EXACT.losses(optimum) for optimum in EXACT.optima]) == 0


def test_preferences_sum_to_one():
    for num in (2, 3):
        assert all(one.sum() == pytest.approx(1) for one in preferences(num))


@pytest.mark.slow
def test_tables_have_a_row_for_every_method(monkeypatch):
    monkeypatch.setattr(firm_analytic, "ROUNDS", 2)
    found = {
        table: {row: {key: [value, value] for key, value in measures.items()} for row, measures in rows.items()}
        for table, rows in of_seed(BEDS["quadratics_2"], 0).items()
    }
    page = tables({"beds": {"quadratics_2": found}})
    names = {**firm_analytic.with_preference(1.0), **firm_analytic.without_preference(1.0)}
    for name in (*names, "optima of the weighted sums"):
        assert page.count(f"| {name} |") == (2 if name in firm_analytic.SWEPT[1:] else 1)
    assert page.count("| linear scalarisation, 19 preferences |") == 2
    many, few = (found["methods"][f"FIRM, anchor{title}"] for title in (", 19 preferences", ""))
    assert many["hypervolume"] > few["hypervolume"]
    assert many["equal"] == few["equal"]
    assert "| linear scalarisation | +" in page or "| linear scalarisation | -" in page  # the difference to it
    for name in ("2, FIRM, anchor", "16, local MGDA", "20, linear scalarisation"):
        assert f"| {name} |" in page
    assert found["sites"]["8, FIRM, anchor"] == found["steps"]["5, FIRM, anchor"] != found["sites"]["2, FIRM, anchor"]
    assert found["steps"]["5, FIRM, anchor"]["equal"] == found["methods"]["FIRM, anchor"]["equal"]
    mgda = found["methods"]["local MGDA"]
    assert mgda["equal"] == mgda["hypervolume"] == found["betas"]["0"]["equal"]


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
