"""Flattened spectra: by hand, one singular value at a time, and by their properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.flatten import flattened

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


def test_each_matrix_has_its_own_amount():
    matrices, amounts = np.random.default_rng(0).normal(size=(3, 4, 6)), np.array([1.0, 0.25, 0.7])
    apart = [flattened(matrix, amount) for matrix, amount in zip(matrices, amounts, strict=True)]
    np.testing.assert_allclose(flattened(matrices, amounts), apart, atol=1e-12)
    assert abs(flattened(matrices, 0.25) - apart).max() > 0.01


def test_directions_that_hold_nothing_stay_empty():
    matrix = np.outer([1.0, 2.0, 2.0], [3.0, 4.0])
    np.testing.assert_allclose(flattened(matrix, 1.0), matrix, atol=1e-12)
    np.testing.assert_array_equal(flattened(np.zeros((2, 3)), 1.0), 0)


def test_rounding_is_not_raised():
    """A row space of one direction, and another of 1e-4 of its size that rounding is known to leave."""
    matrices = np.stack([np.diag([3.0, 3e-4]), np.diag([4.0, 3e-4])])
    ours = flattened(matrices, 1.0, rounding=np.array([1e-3, 1e-5]))
    np.testing.assert_allclose(ours[0], np.diag([3, 0]), atol=1e-6)
    np.testing.assert_allclose(ours[1], np.eye(2) * 4 / np.sqrt(2), atol=1e-6)


def dense_flattened(matrix, amount, leading):
    """The same of one matrix, value by value."""
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    powers = [size ** (1 - amount) if size > 0 else 0 for size in sizes[:leading]]
    if any(powers):
        sizes[:leading] = np.array(powers) * np.linalg.norm(sizes[:leading]) / np.linalg.norm(powers)
    return sum((size * np.outer(u, v) for size, u, v in zip(sizes, left.T, right, strict=True)), 0 * matrix)


@settings(deadline=None, max_examples=20)
@given(seed=seeds, amount=st.sampled_from([0.0, 0.5, 1.0]), leading=st.integers(1, 6))
def test_leading_directions_alone_are_flattened(seed, amount, leading):
    matrices = np.random.default_rng(seed).normal(size=(2, 5, 7))
    ours = flattened(matrices, amount, leading)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=(1, 2)), np.linalg.norm(matrices, axis=(1, 2)))
    for e in range(2):
        np.testing.assert_allclose(ours[e], dense_flattened(matrices[e], amount, leading), atol=1e-9)
    sizes = np.linalg.svd(ours, compute_uv=False)
    behind = np.linalg.svd(matrices, compute_uv=False)[:, leading:]
    np.testing.assert_allclose(sizes[:, leading:], behind)
    if amount == 1:
        np.testing.assert_allclose(sizes[:, :leading], sizes[:, :1] * np.ones(min(leading, 5)))
