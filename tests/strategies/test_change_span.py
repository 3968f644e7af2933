"""Changes of products through inner products, against the dense products they stand for."""

import numpy as np
import pytest

from strategies.change_span import changed_factor, changes_of
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


def projector(columns):
    return columns @ np.linalg.pinv(columns, rcond=1e-5)


@CASES
def test_weighted_sum_is_the_dense_one_within_its_span(name):
    received, sites = case(name)
    weights = np.random.default_rng(2).normal(size=(SITES, EXPERTS))
    total = changes_of(received, sites).weighted_sum(weights)
    lifted = dense(total.lift(Factors(np.broadcast_to(np.eye(2 * RANK), total.change.shape), total.change)))
    for e in range(EXPERTS):
        changes = [(site.A[e] - received.A[e], site.B[e] - received.B[e]) for site in sites]
        rows = np.vstack([received.A[e], sum(w * a for w, (a, _) in zip(weights[:, e], changes, strict=True))])
        columns = np.hstack([received.B[e], sum(w * b for w, (_, b) in zip(weights[:, e], changes, strict=True))])
        change = sum(w * (dense(site)[e] - dense(received)[e]) for w, site in zip(weights[:, e], sites, strict=True))
        expected = projector(columns) @ change @ projector(rows.T)
        np.testing.assert_allclose(lifted[e], expected, atol=2e-4 * np.abs(change).max())
        assert np.linalg.norm(total.change[e]) == pytest.approx(np.linalg.norm(expected), rel=1e-3)


@CASES
def test_single_sites_change_is_all_there(name):
    received, sites = case(name)
    weights = np.zeros((SITES, EXPERTS))
    weights[2] = 1.0
    total = changes_of(received, sites).weighted_sum(weights)
    lifted = dense(total.lift(Factors(np.broadcast_to(np.eye(2 * RANK), total.change.shape), total.change)))
    expected = dense(sites[2]) - dense(received)
    np.testing.assert_allclose(lifted, expected, atol=1e-4 * np.abs(expected).max())


@CASES
def test_received_product_is_all_there(name):
    received, sites = case(name)
    total = changes_of(received, sites).weighted_sum(np.ones((SITES, EXPERTS)))
    expected = dense(received)
    lifted = dense(total.lift(Factors(total.received_A, total.received_B)))
    np.testing.assert_allclose(lifted, expected, atol=1e-4 * max(1, np.abs(expected).max()))


def test_basis_is_orthonormal_or_zero():
    """Of one change, none, and two that cancel but for less than a thousandth."""
    rng = np.random.default_rng(0)
    before, change = rng.normal(size=(2, 1, 2, 50)).astype(np.float32)
    after, back = before + change, before - np.float32(0.9995) * change
    for trained, rank in (([after, before], 4), ([before, before], 2), ([after, back], 2)):
        coordinates = changed_factor(before, trained).coordinates(np.full((2, 1), 100.0))
        lifted = coordinates.lift(np.eye(4)[None])[0]
        np.testing.assert_allclose(lifted[-rank:] @ lifted[-rank:].T, np.eye(rank), atol=1e-5)
        np.testing.assert_array_equal(lifted[:-rank], 0)
