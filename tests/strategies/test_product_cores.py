"""Small cores against the wide matrices they stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.low_rank import Factors
from strategies.product_cores import difference_blocks, pairs_of, side_of


def random_products(seed, num_sites, rank, inputs, outputs):
    rng = np.random.default_rng(seed)
    return Factors(rng.normal(size=(num_sites, rank, inputs)), rng.normal(size=(num_sites, outputs, rank)))


@pytest.mark.parametrize(("inputs", "outputs"), [(40, 30), (5, 30), (40, 3), (5, 3), (6, 4)])
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_cores_have_the_inner_products_of_the_differences(inputs, outputs, seed):
    products = random_products(seed, 3, 2, inputs, outputs)
    rows = side_of(products.A)
    blocks = difference_blocks(products, rows)
    assert blocks.shape[1:] == (min(4, outputs), min(6, inputs))
    wide = products.B @ products.A
    for (j, k), block in zip(pairs_of(3), blocks, strict=True):
        lifted = rows.lift(block)
        difference = wide[j] - wide[k]
        np.testing.assert_allclose(lifted.T @ lifted, difference.T @ difference, atol=1e-8)


def test_lifting_undoes_coordinates_also_of_vectors_that_depend_on_each_other():
    vectors = np.random.default_rng(0).normal(size=(2, 3, 20))
    vectors[1, 2] = vectors[0, 0] - vectors[0, 1]
    side = side_of(vectors)
    assert side.coordinates.shape == (2, 3, 5)
    np.testing.assert_allclose(side.lift(side.coordinates), vectors, atol=1e-10)
    np.testing.assert_allclose(side.project(vectors[0].T), side.coordinates[0].T, atol=1e-10)


def test_equal_products_have_zero_blocks():
    one = random_products(0, 1, 2, 30, 20)
    same = Factors(*(np.repeat(factor, 3, axis=0) for factor in one))
    np.testing.assert_allclose(difference_blocks(same, side_of(same.A)), 0, atol=1e-6)


def test_pairs_are_all_and_each_once():
    assert pairs_of(4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert pairs_of(1).shape == (0, 2)
