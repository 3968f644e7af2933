"""Flattened spectra: of matrices against the singular value decomposition by hand, of products against matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.flatten import flattened, flattened_product
from strategies.low_rank import Factors

seeds = st.integers(0, 2**32 - 1)


def test_diagonal_matrix_by_hand():
    """diag(3, 4) has norm 5: flat, both are 5 / sqrt(2); halfway, sqrt(3) and sqrt(4) times 5 / sqrt(7)."""
    matrix = np.diag([3.0, 4.0])
    np.testing.assert_allclose(flattened(matrix, 1.0), np.eye(2) * 5 / np.sqrt(2), atol=1e-12)
    np.testing.assert_allclose(flattened(matrix, 0.5), np.diag(np.sqrt([3, 4])) * 5 / np.sqrt(7), atol=1e-12)
    np.testing.assert_array_equal(flattened(matrix, 0.0), matrix)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, shape=st.sampled_from([(3, 5), (5, 3), (4, 4), (1, 6)]))
def test_polar_factor_is_orthonormal_and_nearest(seed, shape):
    """M (M^T M)^-1/2 up to scale: flat, of the same norm, and of all such matrices most aligned with M."""
    matrices = np.random.default_rng(seed).normal(size=(2, *shape))
    flat = flattened(matrices, 1.0)
    np.testing.assert_allclose(np.linalg.norm(flat, axis=(1, 2)), np.linalg.norm(matrices, axis=(1, 2)))
    sizes = np.linalg.svd(flat, compute_uv=False)
    np.testing.assert_allclose(sizes, sizes[:, :1] * np.ones(min(shape)), rtol=1e-9)
    nuclear = np.linalg.svd(matrices, compute_uv=False).sum(axis=-1)
    np.testing.assert_allclose((flat * matrices).sum(axis=(1, 2)), nuclear * sizes[:, 0], rtol=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, amount=st.floats(0, 1))
def test_any_amount_keeps_norm_and_directions(seed, amount):
    matrix = np.random.default_rng(seed).normal(size=(4, 6))
    flat = flattened(matrix, amount)
    assert np.linalg.norm(flat) == pytest.approx(np.linalg.norm(matrix))
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    core = left.T @ flat @ right.T
    np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-9)
    expected = sizes ** (1 - amount)
    np.testing.assert_allclose(np.diag(core) / np.diag(core)[0], expected / expected[0])


def test_directions_that_hold_nothing_stay_empty():
    matrix = np.outer([1.0, 2.0, 2.0], [3.0, 4.0])
    np.testing.assert_allclose(flattened(matrix, 1.0), matrix, atol=1e-12)
    np.testing.assert_array_equal(flattened(np.zeros((2, 3)), 1.0), 0)


def dense_flattened(matrix, amount, rank):
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    leading = sizes[:rank] ** (1 - amount)
    sizes[:rank] = leading * np.linalg.norm(sizes[:rank]) / np.linalg.norm(leading)
    sizes[2 * rank :] = 0
    return (left * sizes) @ right


@settings(deadline=None, max_examples=20)
@given(seed=seeds, amount=st.sampled_from([0.0, 0.5, 1.0]), rank=st.integers(1, 3))
def test_product_is_flattened_as_the_dense_matrix_is(seed, amount, rank):
    rng = np.random.default_rng(seed)
    product = Factors(rng.normal(size=(2, 4, 7)), rng.normal(size=(2, 6, 4)))
    ours = flattened_product(product, amount, rank)
    for e in range(2):
        expected = dense_flattened(product.B[e] @ product.A[e], amount, rank)
        np.testing.assert_allclose(ours.B[e] @ ours.A[e], expected, atol=1e-9)


def test_product_of_nothing_is_nothing_and_of_lower_rank_keeps_to_it():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(1, 4, 7)), np.zeros((1, 6, 4))
    np.testing.assert_array_equal(np.matmul(*flattened_product(Factors(A, B), 1.0, 3)[::-1]), 0)
    B[..., 0] = 1.0
    flat = flattened_product(Factors(A, B), 1.0, 3)
    np.testing.assert_allclose(flat.B @ flat.A, B @ A, atol=1e-12)
