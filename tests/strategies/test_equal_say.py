"""The equal say against explicit vectors, by hand, and by its properties."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.conflicts import Block
from strategies.equal_say import common_share, equal_say

seeds = st.integers(0, 2**32 - 1)


def say(updates, examples=None, ridge=0.3, step=2.0):
    """``equal_say`` of one expert whose updates are the rows, and the step that it makes of them."""
    updates = np.asarray(updates, np.float64)
    examples = np.ones(len(updates)) if examples is None else np.asarray(examples, np.float64)
    found = equal_say((updates @ updates.T)[None], examples[:, None], ridge=ridge, step=step)
    return found, found.coefficients[:, 0] @ updates


def naive_coefficients(vectors, examples, ridge, step):
    """The formula, vector by vector, over the sites that have a say: how often each vector is in the step."""
    users = [i for i, vector in enumerate(vectors) if examples[i] > 0 and np.linalg.norm(vector) > 0]
    units = np.array([vectors[i] / np.linalg.norm(vectors[i]) for i in users])
    if ridge is None:
        return naive_mean_coefficients(vectors, examples, users, step)
    a = np.maximum(0, np.linalg.inv(units @ units.T + ridge * np.eye(len(users))) @ np.ones(len(users)))
    mean = sum(a[k] * units[k] for k in range(len(users))) / a.sum()
    total = sum(examples[i] for i in users)
    length = sum(examples[i] / total * np.linalg.norm(vectors[i]) for i in users)
    coefficients = np.zeros(len(vectors))
    for k, i in enumerate(users):
        coefficients[i] = min(step, 1 / np.linalg.norm(mean)) * length * a[k] / a.sum() / np.linalg.norm(vectors[i])
    return coefficients


def naive_mean_coefficients(vectors, examples, users, step):
    """The mean by examples times the step, or as long as the sites went on average."""
    share = np.array([examples[i] * (i in users) for i in range(len(vectors))]) / sum(examples[i] for i in users)
    mean = sum(p * vector for p, vector in zip(share, vectors, strict=True))
    length = sum(p * np.linalg.norm(vector) for p, vector in zip(share, vectors, strict=True))
    return min(step, length / np.linalg.norm(mean)) * share


def naive_step(vectors, examples, ridge, step):
    return sum(c * v for c, v in zip(naive_coefficients(vectors, examples, ridge, step), vectors, strict=True))


@settings(deadline=None, max_examples=50)
@given(
    seed=seeds,
    ridge=st.sampled_from([0.01, 0.3, 10.0, None]),
    step=st.sampled_from([0.5, 2.0, 100.0]),
    num_sites=st.integers(1, 6),
)
def test_step_is_the_naive_one(seed, ridge, step, num_sites):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_sites, 5)) * rng.uniform(0.1, 10, (num_sites, 1))
    examples = rng.integers(0, 5, num_sites).astype(float)
    examples[0] = 3
    _, ours = say(vectors, examples, ridge, step)
    np.testing.assert_allclose(ours, naive_step(vectors, examples, ridge, step), rtol=1e-9, atol=1e-9)


def test_two_sites_by_hand():
    """(3, 0) and (0, 4) with 3 and 1 examples: unit directions are orthogonal, so each has half of the say.

    u = (1/2, 1/2), ||u|| = 1 / sqrt(2); m = (3 * 3 + 4) / 4 = 3.25. A step of 1 is m u; one of 2 would be
    sqrt(2) m long and is cut to m. The mean by examples, (9/4, 1), has the length sqrt(97) / 4.
    """
    found, step = say([[3, 0], [0, 4]], [3, 1], step=1.0)
    np.testing.assert_allclose(step, [1.625, 1.625])
    np.testing.assert_allclose(found.weight, [[0.5], [0.5]])
    np.testing.assert_allclose(found.cosine, [[np.sqrt(0.5)], [np.sqrt(0.5)]])
    np.testing.assert_allclose(found.scale, [3.25 * np.sqrt(0.5) / (np.sqrt(97) / 4)])
    _, longer = say([[3, 0], [0, 4]], [3, 1], step=2.0)
    np.testing.assert_allclose(longer, 3.25 * np.sqrt([0.5, 0.5]))


def test_without_an_equal_say_it_is_the_mean_by_examples_at_the_same_step():
    """The same updates: their mean (9/4, 1) at a step of 1, and no longer than m = 3.25 at a step of 2.

    Of the sum of directions, scaled by m, the sites have 3/4 * 3 / m and 1/4 * 4 / m.
    """
    found, step = say([[3, 0], [0, 4]], [3, 1], ridge=None, step=1.0)
    np.testing.assert_allclose(step, [2.25, 1])
    np.testing.assert_allclose(found.weight, [[2.25 / 3.25], [1 / 3.25]])
    np.testing.assert_allclose(found.scale, 1)
    _, longer = say([[3, 0], [0, 4]], [3, 1], ridge=None, step=2.0)
    np.testing.assert_allclose(longer, 3.25 * np.array([2.25, 1]) / np.hypot(2.25, 1))


@pytest.mark.parametrize("num_sites", [1, 3])
def test_what_all_agree_on_is_taken_as_it_is_and_never_multiplied(num_sites):
    update = np.array([1.0, -2.0, 3.0])
    found, step = say([update] * num_sites, step=50.0)
    np.testing.assert_allclose(step, update)
    np.testing.assert_allclose(found.scale, 1)
    np.testing.assert_allclose(say([update] * num_sites, step=0.5)[1], update / 2)


def test_orthogonal_updates_of_one_length_get_the_step_that_was_asked_for():
    """The mean of 16 orthogonal updates has a quarter of their length, so a step of 2 is taken in full."""
    updates = 3 * np.eye(16)
    found, step = say(updates, step=2.0)
    np.testing.assert_allclose(step, 2 * updates.mean(axis=0))
    np.testing.assert_allclose(found.scale, 2)


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_length_of_an_update_changes_no_direction(seed):
    updates = np.random.default_rng(seed).normal(size=(4, 6))
    longer = updates * np.array([[1], [1000], [1], [1]])
    (found, step), (other, other_step) = say(updates), say(longer)
    np.testing.assert_allclose(other.weight, found.weight, rtol=1e-6, atol=1e-9)
    assert step @ other_step == pytest.approx(np.linalg.norm(step) * np.linalg.norm(other_step))


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_without_ridge_every_direction_gains_alike(seed):
    rng = np.random.default_rng(seed)
    updates = rng.normal(size=(3, 40)) + 0.5 * rng.normal(size=40)
    found, step = say(updates, ridge=1e-9)
    assert (found.weight > 0).all()
    gains = updates @ step / np.linalg.norm(updates, axis=1)
    np.testing.assert_allclose(gains, gains[0], rtol=1e-5)
    np.testing.assert_allclose(found.cosine, found.cosine[0, 0], rtol=1e-5)


def test_large_ridge_leaves_the_mean_of_the_directions():
    found, _ = say([[1, 0], [1, 1], [0, 5]], ridge=1e9)
    np.testing.assert_allclose(found.weight, 1 / 3, rtol=1e-6)


def test_sites_that_agree_share_one_say():
    """Two sites go the same way, one another: with a small ridge the two have half of the say together."""
    found, _ = say([[1, 0], [2, 0], [0, 1]], ridge=1e-6)
    np.testing.assert_allclose(found.weight[:, 0], [0.25, 0.25, 0.5], atol=1e-5)


def test_step_fades_with_cancellation():
    for angle in (3.0, 3.1, 3.14):
        _, step = say([[10, 0], [np.cos(angle), np.sin(angle)]])
        mean = np.array([1 + np.cos(angle), np.sin(angle)]) / 2
        np.testing.assert_allclose(step, 2 * 5.5 * mean, rtol=1e-6)
    found, step = say([[10, 0], [-1, 0]])
    np.testing.assert_allclose(step, 0, atol=1e-7)
    assert np.isfinite(found.coefficients).all()


def test_what_float32_leaves_of_opposite_updates_is_no_direction():
    update = np.random.default_rng(0).normal(size=(200, 1, 1, 1536)).astype(np.float32)
    gram = Block(np.concatenate([update, np.float32(-0.3) * update], axis=2)).gram()[:, 0]
    found = equal_say(gram, np.ones((2, 200)), ridge=0.3, step=2.0)
    assert np.isnan(found.cosine).all()
    np.testing.assert_allclose(found.scale, 0, atol=1e-6)


def test_site_without_examples_or_without_an_update_has_no_say():
    updates = np.array([[1.0, 2.0], [5.0, -1.0], [0.0, 0.0]])
    found, step = say(updates, [1, 0, 4])
    np.testing.assert_allclose(step, updates[0])
    np.testing.assert_array_equal(found.weight, [[1], [0], [0]])
    np.testing.assert_array_equal(found.conflict, [[0], [np.nan], [np.nan]])
    assert np.isnan(found.cosine[1:]).all()


def test_expert_without_any_say_has_no_step_and_nothing_to_report():
    found = equal_say(np.stack([np.eye(2), np.zeros((2, 2))]), np.array([[0, 1], [0, 1]]), ridge=0.3, step=2.0)
    np.testing.assert_array_equal(found.coefficients, 0)
    np.testing.assert_array_equal(found.weight, 0)
    assert np.isnan(found.cosine).all()
    assert np.isnan(found.scale).all()


@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_pair_cosine_is_the_mean_over_all_two_sites(seed):
    rng = np.random.default_rng(seed)
    updates, examples = rng.normal(size=(5, 7)) * rng.uniform(0.1, 9, (5, 1)), np.array([1, 0, 2, 3, 1])
    units = (updates / np.linalg.norm(updates, axis=1, keepdims=True))[examples > 0]
    expected = [a @ b for a, b in itertools.combinations(units, 2)]
    np.testing.assert_allclose(say(updates, examples)[0].pair_cosine, np.mean(expected))
    assert np.isnan(say(updates[:1])[0].pair_cosine)


def test_common_share_is_that_of_a_signal_under_noise():
    """Each of 8 sites goes along one direction by 3 and by chance by 4 along others: unit vectors with p = 0.36.

    The mean has 0.36 from what is common, and 0.64 / 8 from chance.
    """
    share = common_share(0.36, np.array([8]))
    np.testing.assert_allclose(share, 0.36 / (0.36 + 0.64 / 8))
    rng = np.random.default_rng(0)
    chance = rng.normal(size=(8, 20_000))
    chance[:, 0] = 0
    updates = 4 * chance / np.linalg.norm(chance, axis=1, keepdims=True)
    updates[:, 0] = 3
    found, _ = say(updates)
    np.testing.assert_allclose(found.pair_cosine, 0.36, atol=0.01)
    np.testing.assert_allclose(9 / np.linalg.norm(updates.mean(axis=0)) ** 2, share, rtol=0.02)


@pytest.mark.parametrize("num_sites", [1, 2, 7, 1000])
def test_common_share_is_all_where_sites_agree_and_nothing_where_they_do_not(num_sites):
    sites = np.array([num_sites])
    assert common_share(1.0, sites) == 1
    assert common_share(0.0, sites) == (num_sites == 1)
    assert common_share(-0.3, sites) == (num_sites == 1)
    shares = [common_share(p, sites).item() for p in np.linspace(0, 1, 11)]
    assert shares == sorted(shares)
    assert common_share(1.0, np.array([0, num_sites])).tolist() == [1, 1]  # nobody at all divides nothing by 0
