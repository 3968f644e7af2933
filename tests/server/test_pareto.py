"""Hypervolumes against inclusion and exclusion and against a count of random points; fronts by their definition."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest

from server.pareto import hypervolume, non_dominated


def by_inclusion_and_exclusion(points, reference):
    """Boxes overlap in boxes."""
    gains = np.maximum(points - reference, 0)
    subsets = chain.from_iterable(combinations(gains, size) for size in range(1, len(gains) + 1))
    return sum((-1) ** (len(subset) + 1) * np.min(subset, axis=0).prod() for subset in subsets)


def test_two_steps_by_hand():
    """(2, 1) and (1, 3) above the origin: 2 * 1 + 1 * (3 - 1)."""
    assert hypervolume(np.array([[2.0, 1.0], [1.0, 3.0]]), np.zeros(2)) == 4


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
def test_volume_is_that_of_overlapping_boxes(num_objectives):
    rng = np.random.default_rng(num_objectives)
    for _ in range(10):
        points = rng.normal(size=(7, num_objectives)).round(1)  # some values are equal
        reference = rng.normal(size=num_objectives) - 1
        assert hypervolume(points, reference) == pytest.approx(by_inclusion_and_exclusion(points, reference))


def test_volume_is_the_share_of_random_points_that_are_dominated():
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(12, 3))
    drawn = rng.uniform(size=(20000, 3))
    share = (points[:, None] >= drawn).all(axis=2).any(axis=0).mean()
    assert hypervolume(points, np.zeros(3)) == pytest.approx(share, abs=0.015)


def test_only_the_front_counts():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(30, 3))
    on_front = non_dominated(points)
    assert 0 < on_front.sum() < len(points)
    reference = np.full(3, -2.0)
    assert hypervolume(points, reference) == pytest.approx(hypervolume(points[on_front], reference))
    for index in np.flatnonzero(on_front):  # without any point of the front it is less
        if (points[index] > reference).all():
            assert hypervolume(np.delete(points, index, axis=0), reference) < hypervolume(points, reference)


def test_equal_points_do_not_beat_each_other():
    np.testing.assert_array_equal(non_dominated(np.array([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])), [True, True, False])


def test_points_below_the_reference_dominate_nothing():
    assert hypervolume(np.array([[2.0, -1.0]]), np.zeros(2)) == 0
    assert hypervolume(np.empty((0, 2)), np.zeros(2)) == 0


@pytest.mark.parametrize(
    ("points", "reference", "message"),
    [(np.ones((2, 3)), np.zeros(2), r"\(2, 3\) and reference \(2,\)"), (np.full((1, 2), np.nan), np.zeros(2), "fin")],
)
def test_what_has_no_volume_is_refused(points, reference, message):
    with pytest.raises(ValueError, match=message):
        hypervolume(points, reference)
