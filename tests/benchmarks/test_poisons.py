"""What attackers send, against plain loops over coordinates and what the attack is defined by."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import poisons
from benchmarks.poisons import POISONS

SHAPES = {"l.q.lora_A": (2, 6), "l.q.lora_B": (5, 2), "l.mlp.experts.w.lora_A": (3, 2, 4), "l.gate.weight": (4, 3)}


@pytest.fixture(scope="module")
def round_of():
    """The received adapter, the attacker's own and five benign ones."""
    rng = np.random.default_rng(0)
    received = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}

    def trained():
        return {name: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32) for name, a in received.items()}

    return received, trained(), [trained() for _ in range(5)]


def flat(arrays):
    return np.concatenate([arrays[name].ravel() for name in SHAPES]).astype(float)


def sent(poison, round_of):
    received, own, benign = round_of
    return poison(received, own, benign, np.random.default_rng(1))


def change(arrays, round_of):
    return flat(arrays) - flat(round_of[0])


@pytest.mark.parametrize(("poison", "factor"), [("sign flip", -4.0), ("scaling", 10.0), ("free rider", 0.0)])
def test_own_update_is_taken_so_many_times(poison, factor, round_of):
    got = sent(POISONS[poison], round_of)
    before, after = flat(round_of[0]), flat(round_of[1])
    expected = [x + factor * (y - x) for x, y in zip(before, after, strict=True)]
    np.testing.assert_allclose(flat(got), expected, atol=1e-5)


def test_noise_is_five_times_as_long_as_the_update_and_points_anywhere():
    rng = np.random.default_rng(0)
    received = {"w": rng.normal(size=(100, 100)).astype(np.float32)}
    own = {"w": received["w"] + 0.1}
    noise = poisons.gaussian_noise(received, own, [], rng)["w"] - received["w"]
    assert np.linalg.norm(noise) == pytest.approx(5 * 0.1 * 100, rel=0.02)
    assert abs(noise.mean()) < 0.02


def test_alie_is_the_mean_minus_a_share_of_the_spread_of_each_coordinate(round_of):
    got = flat(sent(POISONS["ALIE"], round_of))
    for i, values in enumerate(zip(*(flat(arrays) for arrays in round_of[2]), strict=True)):
        mean = sum(values) / 5
        spread = math.sqrt(sum((value - mean) ** 2 for value in values) / 5)
        assert got[i] == pytest.approx(mean - 0.8416 * spread, abs=1e-5)


def test_inner_product_points_against_the_benign_mean(round_of):
    got = change(sent(POISONS["inner product"], round_of), round_of)
    mean = sum(change(arrays, round_of) for arrays in round_of[2]) / 5
    np.testing.assert_allclose(got, -4 * mean, atol=1e-5)


def test_min_max_goes_as_far_as_the_benign_are_apart(round_of):
    got, benign = flat(sent(POISONS["min-max"], round_of)), [flat(arrays) for arrays in round_of[2]]
    apart = max(np.linalg.norm(one - other) for one in benign for other in benign)
    assert max(np.linalg.norm(got - one) for one in benign) == pytest.approx(apart, rel=1e-4)
    along = got - sum(benign) / 5
    spread = np.std(benign, axis=0)
    assert along @ spread == pytest.approx(-np.linalg.norm(along) * np.linalg.norm(spread), rel=1e-5)


def test_router_poison_changes_routers_alone(round_of):
    received, own, _ = round_of
    got = sent(POISONS["router"], round_of)
    for name in SHAPES:
        expected = -20 * received[name] if name == "l.gate.weight" else own[name]
        np.testing.assert_allclose(got[name], expected, atol=1e-6)


def test_one_expert_is_turned_around_where_most_was_learnt(round_of):
    received, own, _ = round_of
    name = "l.mlp.experts.w.lora_A"
    got = sent(POISONS["one expert"], round_of)
    lengths = [np.linalg.norm(own[name][e] - received[name][e]) for e in range(3)]
    farthest = lengths.index(max(lengths))
    for e in range(3):
        factor = -10.0 if e == farthest else 1.0
        expected = received[name][e] + factor * (own[name][e] - received[name][e])
        np.testing.assert_allclose(got[name][e], expected, atol=1e-5)
    for other in SHAPES.keys() - {name}:
        np.testing.assert_allclose(got[other], own[other], atol=1e-6)


@pytest.mark.parametrize("name", POISONS)
def test_what_is_sent_passes_for_an_update_and_nothing_else_changes(name, round_of):
    before = [flat(arrays) for arrays in (*round_of[:2], *round_of[2])]
    got = sent(POISONS[name], round_of)
    assert {key: (array.shape, array.dtype) for key, array in got.items()} == {
        key: (shape, np.float32) for key, shape in SHAPES.items()
    }
    assert all(np.isfinite(array).all() for array in got.values())
    for kept, arrays in zip(before, (*round_of[:2], *round_of[2]), strict=True):
        np.testing.assert_array_equal(kept, flat(arrays))
