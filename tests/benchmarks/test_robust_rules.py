"""Robust rules against loops over coordinates and sites, and what each of them promises."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from benchmarks.robust_rules import RULES, behind_clair
from strategies.base import ClientUpdate
from tests.strategies.naive_clair import random_sites

SHAPES = {"l.q.lora_A": (2, 6), "l.q.lora_B": (5, 2)}
ROBUST = {"median", "trimmed mean", "norm clipping", "Krum", "Multi-Krum", "Bulyan"}


def drawn(count, seed=0):
    """The received adapter, and so many updates around a common direction."""
    rng = np.random.default_rng(seed)
    received = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    common = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    updates = []
    for i in range(count):
        adapter = {
            name: (a + common[name] + 0.3 * rng.normal(size=a.shape)).astype(np.float32) for name, a in received.items()
        }
        updates.append(ClientUpdate(site=f"site-{i}", adapter=adapter, num_examples=4))
    return received, updates


def flat(arrays):
    return np.concatenate([arrays[name].ravel() for name in SHAPES]).astype(float)


def values(updates):
    """Coordinate -> its value at every site."""
    return list(zip(*(flat(update.adapter) for update in updates), strict=True))


def krum_scores(updates, contaminated):
    vectors = [flat(update.adapter) for update in updates]
    near = max(1, len(updates) - contaminated - 2)
    return [
        sum(sorted(sum((one - other) ** 2) for j, other in enumerate(vectors) if j != i)[:near])
        for i, one in enumerate(vectors)
    ]


def test_median_of_every_coordinate():
    received, updates = drawn(6)
    got, left_out = RULES["median"](received, updates, 2)
    np.testing.assert_allclose(flat(got), [statistics.median(v) for v in values(updates)], atol=1e-6)
    assert left_out is None


def test_trimmed_mean_of_every_coordinate():
    received, updates = drawn(7)
    got, _ = RULES["trimmed mean"](received, updates, 2)
    np.testing.assert_allclose(flat(got), [statistics.mean(sorted(v)[2:5]) for v in values(updates)], atol=1e-6)


def test_krum_takes_the_update_with_the_nearest_neighbours():
    received, updates = drawn(8)
    scores = krum_scores(updates, 2)
    best = scores.index(min(scores))
    got, left_out = RULES["Krum"](received, updates, 2)
    np.testing.assert_allclose(flat(got), flat(updates[best].adapter), atol=1e-6)
    assert left_out == set(range(8)) - {best}


def test_multi_krum_averages_all_but_the_worst():
    received, updates = drawn(8)
    scores = krum_scores(updates, 3)
    kept = sorted(range(8), key=scores.__getitem__)[:5]
    got, left_out = RULES["Multi-Krum"](received, updates, 3)
    np.testing.assert_allclose(flat(got), sum(flat(updates[i].adapter) for i in kept) / 5, atol=1e-6)
    assert left_out == set(range(8)) - set(kept)


def test_bulyan_averages_around_the_median_of_what_krum_chose():
    """11 sites, 2 contaminated: 7 are chosen one after the other, the 3 values nearest to their median averaged."""
    received, updates = drawn(11)
    rest, chosen = list(range(11)), []
    for _ in range(7):
        scores = krum_scores([updates[i] for i in rest], 2)
        chosen.append(rest.pop(scores.index(min(scores))))
    expected = []
    for of_coordinate in values([updates[i] for i in chosen]):
        middle = statistics.median(of_coordinate)
        expected.append(statistics.mean(sorted(of_coordinate, key=lambda value: abs(value - middle))[:3]))
    got, left_out = RULES["Bulyan"](received, updates, 2)
    np.testing.assert_allclose(flat(got), expected, atol=1e-6)
    assert left_out == set(rest)


def test_norm_clipping_shortens_what_is_longer_than_the_median():
    received, updates = drawn(5)
    before = flat(received)
    steps = [flat(update.adapter) - before for update in updates]
    limit = statistics.median(np.linalg.norm(step) for step in steps)
    mean = sum(step * min(1, limit / np.linalg.norm(step)) for step in steps) / 5
    got, _ = RULES["norm clipping"](received, updates, 0)
    np.testing.assert_allclose(flat(got), before + mean, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ROBUST))
def test_updates_that_agree_are_taken_as_they_are(name):
    received, updates = drawn(11)
    same = [ClientUpdate(site=f"site-{i}", adapter=updates[0].adapter, num_examples=4) for i in range(11)]
    got, _ = RULES[name](received, same, 2)
    np.testing.assert_allclose(flat(got), flat(updates[0].adapter), atol=1e-5)


@pytest.mark.parametrize("name", sorted(ROBUST))
def test_two_of_eleven_cannot_drag_it_away(name):
    """Undefended they move the mean by 2/11 of what they send. Bulyan may choose them: the median disposes of them."""
    received, updates = drawn(11)
    huge = {n: a + 1000 * np.ones_like(a) for n, a in received.items()}
    attacked = [*updates[:9], *(ClientUpdate(site=f"bad-{i}", adapter=huge, num_examples=4) for i in range(2))]
    honest = flat(RULES["none"](received, updates[:9], 0)[0])
    got, left_out = RULES[name](received, attacked, 2)
    step = np.linalg.norm(honest - flat(received))
    assert np.linalg.norm(flat(got) - honest) < step
    assert np.linalg.norm(flat(RULES["none"](received, attacked, 2)[0]) - honest) > 100 * step
    if "Krum" in name:
        assert {9, 10} <= left_out


@pytest.mark.parametrize("name", sorted(ROBUST - {"Bulyan"}))
def test_order_of_sites_changes_nothing_but_rounding(name):
    """Not of Bulyan: where few are left to choose from, the nearest two have the same score."""
    received, updates = drawn(11)
    got, _ = RULES[name](received, updates, 2)
    again, _ = RULES[name](received, updates[::-1], 2)
    np.testing.assert_allclose(flat(got), flat(again), atol=1e-6)


def test_behind_clair_every_strategy_works_on_the_sites_that_pass():
    received, updates = random_sites(0)
    found = behind_clair(received, updates)
    assert [left_out for _, left_out in found.values()] == [{4, 5}] * 3
    honest, _ = RULES["none"](received, updates[:4], 0)
    for name in ("CLAIR", "CLAIR, whole sites"):
        np.testing.assert_array_equal(found[name][0]["l.q.lora_B"], honest["l.q.lora_B"])
