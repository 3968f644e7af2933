"""The convex program against the paper's algorithm, its optimality conditions and its symmetries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.block_sparse import decompose
from tests.strategies.naive_clair import naive_objective, naive_program

PENALTIES = {"low_rank_penalty": 4.0, "block_penalty": 2.0}
seeds = st.integers(0, 2**32 - 1)


def random_blocks(seed, num_blocks=10, rows=4, columns=6):
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(num_blocks * rows, 2)) @ rng.normal(size=(2, columns))
    blocks = common.reshape(num_blocks, rows, columns) + 0.1 * rng.normal(size=(num_blocks, rows, columns))
    blocks[:3] += rng.normal(size=(3, rows, columns))
    return blocks


@settings(deadline=None, max_examples=3)
@given(seed=seeds)
def test_same_minimum_as_the_papers_algorithm(seed):
    blocks = random_blocks(seed)
    fast = decompose(blocks, **PENALTIES, tolerance=1e-12, max_iterations=5000)
    low_rank, sparse = naive_program(blocks, 4.0, 2.0, 1500)
    np.testing.assert_allclose(fast.objective, naive_objective(blocks, low_rank, sparse, 4.0, 2.0), rtol=1e-9)
    np.testing.assert_allclose(fast.low_rank, low_rank, atol=1e-4)
    np.testing.assert_allclose(fast.sparse, sparse, atol=1e-4)
    assert naive_objective(blocks, fast.low_rank, fast.sparse, 4.0, 2.0) == pytest.approx(fast.objective, rel=1e-9)


def test_residual_certifies_the_minimum():
    """D - L - S lies in both subdifferentials: its singular values <= 4 and = 4 on L, its blocks <= 2 and = 2 on S."""
    blocks = random_blocks(0)
    fast = decompose(blocks, **PENALTIES, tolerance=1e-13, max_iterations=5000)
    residual = blocks - fast.low_rank - fast.sparse
    lengths = np.linalg.norm(residual, axis=(1, 2))
    is_sparse = np.linalg.norm(fast.sparse, axis=(1, 2)) > 0
    assert 0 < is_sparse.sum() < 10
    np.testing.assert_allclose(lengths[is_sparse], 2.0, rtol=1e-6)
    assert lengths.max() <= 2 + 1e-6
    tall = residual.reshape(-1, 6)
    assert np.linalg.norm(tall, 2) <= 4 + 1e-5
    np.testing.assert_allclose(np.linalg.norm(tall @ fast.directions, axis=0), 4.0, rtol=1e-4)


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_the_gap_bounds_the_distance_to_the_minimum(seed):
    blocks = random_blocks(seed)
    exact = decompose(blocks, **PENALTIES, tolerance=1e-12, max_iterations=5000).objective
    for iterations in (1, 2, 5, 20):
        early = decompose(blocks, **PENALTIES, tolerance=1e-15, max_iterations=iterations)
        assert -1e-12 <= (early.objective - exact) / early.objective <= early.relative_gap + 1e-12


def test_stops_at_the_tolerance():
    solved = decompose(random_blocks(1), **PENALTIES, tolerance=1e-3)
    assert solved.relative_gap <= 1e-3
    assert 1 < solved.iterations < 100
    finer = decompose(random_blocks(1), **PENALTIES, tolerance=1e-8)
    assert finer.relative_gap <= 1e-8
    assert finer.iterations > solved.iterations


@settings(deadline=None, max_examples=10)
@given(seed=seeds, scale=st.floats(1e-3, 1e3))
def test_scaling_blocks_and_penalties_scales_the_parts(seed, scale):
    blocks = random_blocks(seed)
    plain = decompose(blocks, **PENALTIES)
    scaled = decompose(scale * blocks, **{key: scale * value for key, value in PENALTIES.items()})
    np.testing.assert_allclose(scaled.low_rank, scale * plain.low_rank, atol=1e-9 * scale, rtol=1e-9)
    assert scaled.iterations == plain.iterations


@settings(deadline=None, max_examples=10)
@given(seed=seeds)
def test_bases_of_rows_and_columns_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    blocks = random_blocks(seed)
    rows = np.linalg.qr(rng.normal(size=(9, 6)))[0]
    columns = np.linalg.qr(rng.normal(size=(10, 7, 4)))[0]
    plain = decompose(blocks, **PENALTIES)
    turned = decompose(columns @ blocks @ rows.T, **PENALTIES)
    np.testing.assert_allclose(turned.low_rank, columns @ plain.low_rank @ rows.T, atol=1e-9)
    np.testing.assert_allclose(turned.sizes, plain.sizes, atol=1e-9)


def test_penalties_beyond_the_data_leave_nothing_in_a_part():
    blocks = random_blocks(0)
    assert not decompose(blocks, low_rank_penalty=4.0, block_penalty=1e6).sparse.any()
    assert not decompose(blocks, low_rank_penalty=1e6, block_penalty=1.0).low_rank.any()


def test_blocks_of_zeros_have_neither_part():
    solved = decompose(np.zeros((3, 2, 4)), low_rank_penalty=1.0, block_penalty=1.0)
    assert (solved.relative_gap, solved.directions.shape) == (0.0, (4, 0))
