"""What runs with several objectives tell: by hand from rows, and fronts over runs."""

from __future__ import annotations

import numpy as np
import pytest

from server.alignment import GAUGES, alignment_of, fronts, settings_of


def site(name, number, **values):
    return {"type": "site", "site": name, "round": number} | {
        key.replace("__", "/"): value for key, value in values.items()
    }


ROWS = [
    site("a", 1, reward__x=1.0, reward__y=0.0, kl=0.2, lambda__x=0.2, lambda__y=0.8),
    site("b", 1, reward__x=3.0, reward__y=1.0, kl=0.4, lambda__x=0.6, lambda__y=0.4),
    {"type": "round", "round": 1, "drift": 0.5},
    site("a", 2, reward__x=2.0, reward__y=0.5, kl=0.6, lambda__x=0.5, lambda__y=0.5),
    {"type": "round", "round": 2, "drift": None},
]


def test_numbers_by_hand():
    """Weights (0.2, 0.8) and (0.6, 0.4) are each (0.2, 0.2) from their mean: 0.08."""
    found = alignment_of(ROWS, {"method": {"preference": [0.3, 0.7]}})
    assert found.objectives == ("x", "y")
    assert found.preference == "0.3 : 0.7"
    assert found.rewards == {"x": {1: 2.0, 2: 2.0}, "y": {1: 0.5, 2: 0.5}}
    assert found.kl == pytest.approx({1: 0.3, 2: 0.6})
    assert found.weights["a"] == {"x": {1: 0.2, 2: 0.5}, "y": {1: 0.8, 2: 0.5}}
    assert found.disagreement == pytest.approx({1: 0.08, 2: 0.0})
    assert found.drift == {1: 0.5}
    assert found.ends == (2.0, 0.5)
    assert found.gauge is GAUGES["reward"]


def test_what_was_measured_on_held_out_prompts_counts_more():
    rows = [*ROWS, site("a", 2, held_out_reward__x=7.0, held_out_reward__y=8.0, held_out_kl=9.0)]
    found = alignment_of(rows, {})
    assert (found.ends, found.kl, found.preference) == ((7.0, 8.0), {2: 9.0}, "equal")
    assert found.gauge is GAUGES["held_out_reward"]


def test_under_dpo_an_objective_is_met_as_far_as_its_pairs_are_ranked_right():
    pairs = [
        site(name, 1, held_out_accuracy__x=share, held_out_margin__x=4.0) for name, share in (("a", 1), ("b", 0.5))
    ]
    found = alignment_of(pairs, {"method": {"preference": [1.0]}})
    assert (found.objectives, found.ends, found.kl) == (("x",), (0.75,), {})
    assert fronts([({}, found), ({}, alignment_of([site("a", 1, reward__x=9.0)], {}))])[0].runs == (0,)


@pytest.mark.parametrize("method", [{"objectives": ["y", "x"]}, {"rewards": ["y:folder", "x"]}])
def test_objectives_stand_in_the_order_of_their_preferences(method):
    rows = [site("a", 1, held_out_accuracy__x=0.5, held_out_accuracy__y=0.75)]
    found = alignment_of(rows, {"method": method | {"preference": [0.9, 0.1]}})
    assert (found.objectives, found.ends) == (("y", "x"), (0.75, 0.5))


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"site_preferences": {"a": [1.0, 0.0]}}, "equal; 1 site otherwise"),
        ({"preference": [0.9, 0.1], "site_preferences": {"a": [1, 0], "b": [0, 1]}}, "0.9 : 0.1; 2 sites otherwise"),
        ({"preference": None, "site_preferences": {}}, "equal"),
    ],
)
def test_sites_with_preferences_of_their_own_are_told_of(method, told):
    found = alignment_of(ROWS, {"method": method})
    assert found.preference == told


def test_run_without_rewards_has_no_objectives():
    assert alignment_of([{"type": "site", "site": "a", "round": 1, "loss": 2.0}], {}) is None
    assert fronts([({}, None)]) == []


def test_sites_that_keep_their_weights_to_themselves_do_not_disagree():
    found = alignment_of([site("a", 1, reward__x=1.0)], {})
    assert (found.weights, found.disagreement) == ({}, {})


def ended(x, y):
    return alignment_of([site("a", 1, reward__x=x, reward__y=y)], {})


def test_rewards_of_training_samples_do_not_stand_beside_those_of_held_out_prompts():
    held_out = alignment_of([site("a", 1, held_out_reward__x=0.5, held_out_reward__y=0.5)], {})
    (front,) = fronts([({}, held_out), ({}, ended(0.9, 0.9))])
    assert front.runs == (0,)


def test_runs_that_differ_in_preference_are_one_front():
    """Range (2, 2), so the reference is (-0.2, -0.2); the steps (0, 2), (1, 1), (2, 0), and (1, 1) alone: 1.2 * 1.2."""
    settings = [{"seed": 0, "method": {"beta": 0.1, "preference": [i, 1 - i]}, "output": str(i)} for i in range(3)]
    other = {"seed": 0, "method": {"beta": 0, "preference": [0, 1]}, "output": "o"}
    runs = [
        (settings[0], ended(0.0, 2.0)), (other, ended(1.0, 1.0)), (settings[1], ended(1.0, 1.0)), (other, None),
        (settings[2], ended(2.0, 0.0)),
    ]  # fmt: skip
    first, second = fronts(runs)
    assert (first.runs, second.runs) == ((0, 2, 4), (1,))
    assert (first.label, second.label) == ("method.beta=0.1", "method.beta=0")
    assert first.hypervolumes == pytest.approx([0.2 * 2.2 + 1.0 * 1.2 + 1.0 * 0.2])
    assert second.hypervolumes == pytest.approx([1.44])
    assert (first.hypervolume, second.hypervolume) == ("1.84", "1.44")
    assert (first.num_preferences, second.num_preferences) == (3, 1)
    np.testing.assert_array_equal(first.points_NM, [[0, 2], [1, 1], [2, 0]])


def test_seeds_have_fronts_of_their_own_so_that_more_of_them_do_not_dominate_more():
    """Range (2, 2), reference (-0.2, -0.2). Seed 0: 2.2 * 0.2 + 0.2 * 2 = 0.84; seed 1 at (1, 1) twice: 1.44.

    Seed 2 lacks a preference: it is not in the mean of 1.14 +- 12.706 * 0.6 / 2 = 3.8.
    """
    points = {(0, 0): (0.0, 2.0), (0, 1): (2.0, 0.0), (1, 0): (1.0, 1.0), (1, 1): (1.0, 1.0), (2, 0): (2.0, 2.0)}
    runs = [({"seed": seed, "method": {"preference": [i, 1 - i]}}, ended(*at)) for (seed, i), at in points.items()]
    (front,) = fronts(runs)
    assert front.runs == (0, 1, 2, 3, 4)
    assert front.hypervolumes == pytest.approx([0.84, 1.44])
    assert front.hypervolume == "1.14 ± 3.8"
    np.testing.assert_array_equal(front.seeds_N, [0, 0, 1, 1, 2])


def test_a_run_that_was_repeated_counts_for_its_preference_once():
    """Seed 0 has three runs on two preferences, seed 1 two on the same, seed 2 two on others."""
    at = [(0, 0, (0.0, 2.0)), (0, 0, (0.0, 2.0)), (0, 1, (2.0, 0.0)), (1, 0, (1.0, 1.0)), (1, 1, (1.0, 1.0)),
          (2, 1, (2.0, 2.0)), (2, 2, (2.0, 2.0))]  # fmt: skip
    runs = [({"seed": seed, "method": {"preference": [i, 1 - i]}}, ended(*point)) for seed, i, point in at]
    (front,) = fronts(runs)
    assert front.hypervolumes == pytest.approx([0.84, 1.44])


def test_runs_with_other_objectives_are_left_out():
    other = alignment_of([site("a", 1, reward__z=1.0)], {})
    (front,) = fronts([({}, ended(1.0, 1.0)), ({}, other)])
    assert front.runs == (0,)
    assert front.label == ""


def test_settings_are_read_from_the_run_folders_text():
    assert settings_of("method:\n  preference: [0.1, 0.9]\n") == {"method": {"preference": [0.1, 0.9]}}
    assert settings_of("") == {}
