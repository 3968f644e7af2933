"""From distances to verdicts, by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.collaborative_set import Verdict, VerdictRule, count_votes, decide, judge, pool
from strategies.product_cores import pairs_of
from strategies.shared_subspace import SubspaceConfig

RULE = {"agreement": 0.5, "min_gap": 1.0}


def distances(errors):
    """Of sites whose errors are orthogonal: sqrt(e_j^2 + e_k^2) for each pair."""
    errors = np.asarray(errors, float)
    j, k = pairs_of(len(errors)).T
    return np.hypot(errors[j], errors[k])


def test_threshold_lies_at_the_gap():
    """Errors 1 1 1 5 7: each benign site has 2 of 4 others at sqrt 2, a contaminated one at >= sqrt 26."""
    verdict = judge(distances([1, 1, 1, 5, 7]), 5, **RULE)
    np.testing.assert_allclose(verdict.distances, np.sqrt([2, 2, 2, 26, 50]))
    assert verdict.threshold == pytest.approx(math.sqrt(2))
    # log(sqrt 26 / sqrt 2) over (0.04 + 0) (1 + 5/5)
    assert verdict.gap == pytest.approx(math.log(13) / 2 / 0.08)
    assert verdict.accepted.tolist() == [True, True, True, False, False]


def test_the_gap_nearest_to_the_benign_wins_over_wider_ones_above():
    """Absolute gaps: 2.4 below and 34 among the contaminated, where the paper's largest gap would cut."""
    verdict = judge(distances([1, 1.05, 0.95, 1, 1, 1, 4, 5, 40]), 9, **RULE)
    assert verdict.accepted.tolist() == [True] * 6 + [False] * 3


def test_without_a_gap_nobody_is_expelled():
    verdict = judge(distances([1, 1.1, 1.2, 1.3, 1.4, 1.5]), 6, **RULE)
    assert verdict.threshold == math.inf
    assert 0 < verdict.gap < 1
    assert verdict.accepted.all()
    assert not judge(distances([1, 1.1, 1.2, 1.3, 1.4, 1.5]), 6, agreement=0.5, min_gap=0.01).accepted.all()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), num_sites=st.sampled_from([5, 10, 20]))
def test_equally_good_sites_stay(seed, num_sites):
    """Errors of the linear model with p = q = 20: lengths of Gaussian vectors of 360 dimensions."""
    errors = np.random.default_rng(seed).normal(size=(num_sites, 360))
    j, k = pairs_of(num_sites).T
    verdict = judge(np.linalg.norm(errors[j] - errors[k], axis=1), num_sites, agreement=0.5, min_gap=1.5)
    assert verdict.accepted.all()


def test_a_minority_of_identical_outsiders_does_not_pass_for_the_majority():
    """Four of ten sites at one place: only 3 of 9 others are close to each, less than half."""
    rng = np.random.default_rng(0)
    places = np.concatenate([rng.normal(size=(6, 100)), np.full((4, 100), 3.0)])
    j, k = pairs_of(10).T
    verdict = judge(np.linalg.norm(places[j] - places[k], axis=1), 10, **RULE)
    assert verdict.accepted.tolist() == [True] * 6 + [False] * 4


def test_agreement_asks_for_more_of_the_others():
    half = judge(distances([1, 1, 1, 1, 9, 9]), 6, **RULE)
    most = judge(distances([1, 1, 1, 1, 9, 9]), 6, agreement=0.8, min_gap=1.0)
    assert half.accepted.tolist() == [True] * 4 + [False] * 2
    assert math.isnan(most.gap) or most.accepted.all()


def test_fixed_threshold_is_equation_8():
    found = distances([1, 2, 3, 4])
    verdict = judge(found, 4, agreement=0.5, min_gap=1.0, threshold=3.7)
    close = np.zeros((4, 4), bool)
    for (j, k), value in zip(pairs_of(4), found, strict=True):
        close[j, k] = close[k, j] = value <= 3.7
    assert verdict.accepted.tolist() == (close.sum(axis=1) / 3 >= 0.5).tolist() == [True, True, True, False]


@pytest.mark.parametrize("errors", [[0, 0, 0, 0, 0], [1, 1, 1, 9]])
def test_no_verdict_on_equal_or_too_few_sites(errors):
    verdict = judge(distances(errors), len(errors), **RULE)
    assert math.isnan(verdict.gap)
    assert verdict.accepted.all()


def test_rounding_among_exact_sites_is_no_gap():
    found = distances([1e-12, 3e-9, 1e-10, 1e-9, 1e-11, 1.0])
    assert judge(found, 6, **RULE, length_G=np.ones(15)).accepted.tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("largest", [1e2, 1e5, 1e9, 1e30])
def test_one_site_however_far_out_hides_no_other(largest):
    verdict = judge(distances([1, 1.1, 0.9, 1, 1, 1.05, 1, 0.95, 30, largest]), 10, **RULE)
    assert verdict.accepted.tolist() == [True] * 8 + [False] * 2


def test_sites_that_agree_exactly_have_a_threshold_to_be_measured_by():
    """Most users of an expert may have trained nothing: zero distances, which no distance can be divided by."""
    verdict = judge(distances([0, 0, 0, 0, 1.0]), 5, **RULE)
    assert 0 < verdict.threshold < 1
    assert verdict.accepted.tolist() == [True] * 4 + [False]
    votes = count_votes("abcde", [("abcde", verdict)])
    assert votes["e"].rejected
    assert np.isfinite(votes["e"].ratio)


def test_rounding_of_what_was_taken_away_is_no_gap():
    """The only site that trained spans the shared row space itself: beside its length what is left is nothing."""
    verdict = judge(distances([0, 0, 0, 0, 1e-17]), 5, **RULE, length_G=np.ones(10))
    assert verdict.accepted.all()
    assert pool("abcde", [("abcde", verdict)] * 8, **RULE).accepted.all()


def test_majority_of_the_matrices_that_judged_a_site_rejects_it():
    def verdict(*accepted):
        return Verdict(distances=np.where(accepted, 1.0, 3.0), threshold=2.0, gap=5.0)

    everyone = ("a", "b", "c")
    matrices = [
        (everyone, verdict(1, 0, 0)),
        (everyone, verdict(1, 0, 1)),
        (("a", "b"), verdict(0, 1)),
        (("a", "c"), verdict(1, 0)),
    ]
    votes = count_votes((*everyone, "absent"), matrices)
    assert {site: (vote.against, vote.judged, vote.rejected) for site, vote in votes.items()} == {
        "a": (1, 4, False),
        "b": (2, 3, True),
        "c": (2, 3, True),
        "absent": (0, 0, False),
    }
    assert [votes[site].margin for site in ("a", "b", "absent")] == pytest.approx([-0.25, 1 / 6, -0.5])
    tie = count_votes(["a", "b"], [(("a", "b"), verdict(1, 0)), (("a", "b"), verdict(1, 1))])["b"]
    assert (tie.margin, tie.rejected) == (0, False)


def noisy_matrices(lengths, *, num_matrices=8, seed=0):
    """Verdicts of matrices in each of which every site's distance is its length times chance and the matrix' scale."""
    rng = np.random.default_rng(seed)
    drawn = np.asarray(lengths) * np.exp(rng.normal(scale=0.25, size=(num_matrices, len(lengths))))
    verdicts = [
        judge(distances(scale * row), len(row), **RULE) for scale, row in zip(rng.random(8), drawn, strict=True)
    ]
    return [(list(range(len(lengths))), verdict) for verdict in verdicts]


def test_pooling_finds_what_most_matrices_miss():
    matrices = noisy_matrices([1] * 9 + [2.2])
    assert not count_votes(range(10), matrices)[9].rejected
    votes = decide(range(10), matrices, VerdictRule.pooled, **RULE)
    assert [vote.rejected for vote in votes.values()] == [False] * 9 + [True]
    assert votes[9].margin <= 0
    assert "pooled over all at" in votes[9].reason


def test_pooled_distance_is_the_geometric_mean_whatever_the_scales_of_matrices():
    matrices = noisy_matrices([1, 1, 1, 1, 1, 1.5, 5])
    pooled = pool(range(7), matrices, **RULE)
    product = np.prod([verdict.distances / np.median(verdict.distances) for _, verdict in matrices], axis=0)
    np.testing.assert_allclose(pooled.distances, product ** (1 / 8))
    scaled = [
        (sites, Verdict(distances=10.0**i * verdict.distances, threshold=math.inf, gap=math.nan))
        for i, (sites, verdict) in enumerate(matrices)
    ]
    np.testing.assert_allclose(pool(range(7), scaled, **RULE).distances, pooled.distances)


def test_pooling_one_matrix_is_its_own_verdict():
    alone = judge(distances([1, 1, 1, 5, 7]), 5, **RULE)
    pooled = pool(range(5), [(range(5), alone)], **RULE)
    assert pooled.gap == pytest.approx(alone.gap)
    assert pooled.accepted.tolist() == alone.accepted.tolist()


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_pooling_expels_nobody_where_sites_differ_by_chance(seed):
    votes = decide(range(10), noisy_matrices([1] * 10, seed=seed), VerdictRule.pooled, agreement=0.5, min_gap=1.5)
    assert not any(vote.rejected or vote.pooled for vote in votes.values())


def test_a_site_that_no_matrix_judged_is_pooled_as_an_average_one():
    matrices = [(sites[:-1], Verdict(distances=verdict.distances[:-1], threshold=math.inf, gap=math.nan))
                for sites, verdict in noisy_matrices([1] * 5 + [9, 1])]  # fmt: skip
    pooled = pool(range(7), matrices, **RULE)
    assert pooled.distances[6] == 1
    assert pooled.accepted.tolist() == [True] * 5 + [False, True]
    assert pool(range(7), [], **RULE).accepted.all()


def test_pooled_distances_have_no_fixed_threshold():
    with pytest.raises(ValueError, match="subspace.threshold must be null with subspace.verdict=pooled, got 1.0"):
        SubspaceConfig(threshold=1.0, verdict=VerdictRule.pooled)
