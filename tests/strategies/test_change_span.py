"""Changes of products in small coordinates, against the dense products they stand for."""

import numpy as np
import pytest

from strategies.change_span import changes_of, span_of
from strategies.low_rank import Factors

RANK, INPUTS, OUTPUTS, EXPERTS, SITES = 2, 40, 30, 3, 4


def random_factors(rng, num_in=INPUTS, num_out=OUTPUTS):
    shapes = (EXPERTS, RANK, num_in), (EXPERTS, num_out, RANK)
    return Factors(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def near(rng, factors, size=0.1):
    return Factors(*(f + (size * rng.normal(size=f.shape)).astype(np.float32) for f in factors))


def dense(factors):
    return factors.B.astype(np.float64) @ factors.A.astype(np.float64)


def case(name):
    """The received factors and every site's: (E, R, I) and (E, O, R)."""
    rng = np.random.default_rng(1)
    if name == "narrow":
        received = random_factors(rng, 5, 7)
        return received, [near(rng, received) for _ in range(SITES)]
    received = random_factors(rng)
    if name == "fresh":
        received = Factors(received.A, np.zeros_like(received.B))
    sites = [near(rng, received) for _ in range(SITES)]
    if name == "idle":
        sites[1] = received
    if name == "copies":
        sites[1] = sites[0]
    if name == "tiny":
        sites = [near(rng, received, 1e-4) for _ in range(SITES)]
    return received, sites


CASES = pytest.mark.parametrize("name", ["random", "fresh", "idle", "copies", "tiny", "narrow"])


@CASES
def test_inner_products_are_the_dense_ones(name):
    received, sites = case(name)
    changes = [dense(site) - dense(received) for site in sites]
    expected = np.einsum("ceoi,deoi->ecd", changes, changes)
    scale = np.einsum("ecc->e", expected)[:, None, None]
    np.testing.assert_allclose(changes_of(received, sites).gram() / scale, expected / scale, atol=3e-6)


@CASES
def test_weighted_sum_is_the_dense_one(name):
    received, sites = case(name)
    weights = np.random.default_rng(2).normal(size=(SITES, EXPERTS))
    changes = changes_of(received, sites)
    expected = sum(w[:, None, None] * (dense(site) - dense(received)) for w, site in zip(weights, sites, strict=True))
    ours = dense(changes.lift(changes.weighted_sum(weights)))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


@CASES
def test_coordinates_keep_lengths_and_singular_values(name):
    received, sites = case(name)
    changes = changes_of(received, sites)
    total = changes.weighted_sum(np.ones((SITES, EXPERTS)))
    expected = sum(dense(site) - dense(received) for site in sites)
    for e in range(EXPERTS):
        sizes = np.linalg.svd(expected[e], compute_uv=False)
        ours = np.linalg.svd(total.B[e] @ total.A[e], compute_uv=False)
        count = min(len(sizes), len(ours))
        np.testing.assert_allclose(ours[:count] / sizes[0], sizes[:count] / sizes[0], atol=1e-3)
    np.testing.assert_allclose(dense(changes.lift(changes.received())), dense(received), atol=1e-4)


def test_number_of_coordinates_does_not_depend_on_the_width():
    for width in (20, 2000):
        vectors = np.random.default_rng(0).normal(size=(4, 1, 3, width)).astype(np.float32)
        assert span_of(vectors[0], list(vectors[1:])).coordinates.shape == (1, 12, 12)
    narrow = np.ones((1, 3, 5), np.float32)
    assert span_of(narrow, [narrow] * 3).coordinates.shape == (1, 12, 5)


def test_basis_is_orthonormal():
    """Of vectors that depend on each other as well, but for what they lack to a basis, which lifts to 0."""
    rng = np.random.default_rng(0)
    before = rng.normal(size=(1, 2, 50)).astype(np.float32)
    after = (before + rng.normal(size=(1, 2, 50))).astype(np.float32)
    span = span_of(before, [after, after, before])
    lifted = span.lift(np.eye(8)[None])[0]
    np.testing.assert_allclose(lifted[:4] @ lifted[:4].T, np.eye(4), atol=1e-4)
    np.testing.assert_allclose(lifted[4:], 0, atol=2e-2)
