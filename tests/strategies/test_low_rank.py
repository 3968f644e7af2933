import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import low_rank
from strategies.low_rank import Factors

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 6)


def random_factors(rng, rank, num_in, num_out, leading=()):
    return Factors(rng.normal(size=(*leading, rank, num_in)), rng.normal(size=(*leading, num_out, rank)))


def dense(product):
    return product.B @ product.A


@given(seeds, sizes, sizes, sizes, sizes)
def test_inner_product_is_that_of_the_dense_products(seed, rank, other_rank, num_in, num_out):
    rng = np.random.default_rng(seed)
    left = random_factors(rng, rank, num_in, num_out, (3,))
    right = random_factors(rng, other_rank, num_in, num_out, (3,))
    expected = [np.vdot(dense(left)[e], dense(right)[e]) for e in range(3)]
    np.testing.assert_allclose(low_rank.inner_product(left, right), expected, atol=1e-10)


def test_inner_product_by_hand():
    """B1 A1 = [[2, 4]] with B1 = [2], A1 = [1, 2]; B2 A2 = [[3, -3]]; 2 * 3 - 4 * 3 = -6."""
    left = Factors(np.array([[1.0, 2.0]]), np.array([[2.0]]))
    right = Factors(np.array([[1.0, -1.0]]), np.array([[3.0]]))
    assert low_rank.inner_product(left, right) == -6


def test_squared_norm_is_never_negative():
    """B A + B (-A) is zero as a product, and rounding may take its square to either side of zero."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        half = random_factors(rng, 3, 40, 40)
        cancelled = low_rank.weighted_sum([half, Factors(-half.A * (1 + 1e-9), half.B)], [1, 1])
        assert low_rank.squared_norm(cancelled) >= 0


@given(seeds, sizes, sizes, sizes, sizes)
def test_gram_holds_the_inner_products_of_the_dense_products(seed, count, rank, num_in, num_out):
    rng = np.random.default_rng(seed)
    products = random_factors(rng, rank, num_in, num_out, (count, 3))
    flat = dense(products).reshape(count, 3, -1)
    np.testing.assert_allclose(low_rank.gram(products), np.einsum("jed,ked->ejk", flat, flat), atol=1e-9)


def test_gram_of_products_without_other_axes_is_that_of_their_inner_products():
    products = random_factors(np.random.default_rng(1), 2, 4, 3, (5,))
    pairs = [[Factors(products.A[i], products.B[i]) for i in range(5)]] * 2
    expected = [[low_rank.inner_product(left, right) for right in pairs[1]] for left in pairs[0]]
    np.testing.assert_allclose(low_rank.gram(products), expected, atol=1e-12)


@given(seeds, st.integers(1, 4))
def test_weighted_sum_is_the_sum_of_the_dense_products(seed, num_terms):
    rng = np.random.default_rng(seed)
    terms = [random_factors(rng, 2, 4, 3, (5,)) for _ in range(num_terms)]
    weights = rng.normal(size=(num_terms, 5))
    expected = np.einsum("ke,keoi->eoi", weights, [dense(term) for term in terms])
    np.testing.assert_allclose(dense(low_rank.weighted_sum(terms, weights)), expected, atol=1e-10)


@settings(deadline=None)
@given(seeds, sizes, sizes, sizes, sizes)
def test_truncation_is_the_dense_one(seed, stacked_rank, num_in, num_out, rank):
    rng = np.random.default_rng(seed)
    product = random_factors(rng, stacked_rank, num_in, num_out, (2,))
    kept, lost = low_rank.truncate(product, rank)
    assert kept.A.shape == (2, rank, num_in)
    assert kept.B.shape == (2, num_out, rank)
    left, values, right = np.linalg.svd(dense(product), full_matrices=False)
    best = (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    np.testing.assert_allclose(dense(kept), best, atol=1e-9)
    share = (values[:, rank:] ** 2).sum(-1) / (values**2).sum(-1)
    np.testing.assert_allclose(lost, share, atol=1e-9)
    np.testing.assert_allclose(
        ((dense(product) - dense(kept)) ** 2).sum((1, 2)), (values[:, rank:] ** 2).sum(-1), atol=1e-9
    )


def test_truncated_zero_can_still_be_trained():
    """The gradient of B A with respect to B is zero where A is: a zero product must keep rows in A."""
    kept, lost = low_rank.truncate(Factors(np.zeros((4, 6)), np.zeros((5, 4))), 2)
    assert not kept.B.any()
    np.testing.assert_allclose(kept.A @ kept.A.T, np.eye(2), atol=1e-12)
    assert lost == 0


@given(seeds)
def test_turning_keeps_the_product_and_the_reference(seed):
    """Factors that were rotated by any orthogonal matrix are turned back to where they were."""
    rng = np.random.default_rng(seed)
    product, _ = low_rank.truncate(random_factors(rng, 3, 6, 5, (2,)), 3)
    rotation = np.linalg.qr(rng.normal(size=(2, 3, 3)))[0]
    rotated = Factors(rotation @ product.A, product.B @ np.swapaxes(rotation, -1, -2))
    turned = low_rank.turned_towards(rotated, product.A)
    np.testing.assert_allclose(turned.A, product.A, atol=1e-9)
    np.testing.assert_allclose(turned.B, product.B, atol=1e-9)


def random_adapter(rng):
    dense_pair, expert_pair = random_factors(rng, 2, 4, 3), random_factors(rng, 2, 3, 5, (3,))
    arrays = {
        "l.q.lora_A": dense_pair.A,
        "l.q.lora_B": dense_pair.B,
        "l.mlp.experts.w.lora_A": expert_pair.A,
        "l.mlp.experts.w.lora_B": expert_pair.B,
        "l.mlp.gate.weight": rng.normal(size=(3, 4)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


@given(seeds, st.integers(1, 5))
def test_aggregation_gap_is_the_dense_one(seed, num_sites):
    rng = np.random.default_rng(seed)
    adapters, weights = [random_adapter(rng) for _ in range(num_sites)], rng.uniform(1, 9, num_sites)
    gap, length = [], []
    for prefix in ("l.q", "l.mlp.experts.w"):
        A, B = ([adapter[prefix + end].astype(float) for adapter in adapters] for end in (".lora_A", ".lora_B"))
        products = [b @ a for a, b in zip(A, B, strict=True)]
        mean = np.average(products, axis=0, weights=weights)
        length.append(mean.ravel())
        gap.append((mean - np.average(B, axis=0, weights=weights) @ np.average(A, axis=0, weights=weights)).ravel())
    expected = np.linalg.norm(np.concatenate(gap)) / np.linalg.norm(np.concatenate(length))
    np.testing.assert_allclose(low_rank.aggregation_gap(adapters, weights), expected, atol=1e-7, rtol=1e-6)


def test_aggregation_gap_by_hand():
    """A = 1 and 3, B = 1 and 3, equal weights: mean(BA) = 5, mean(B) mean(A) = 4, gap 1 / 5."""
    adapters = [
        {"q.lora_A": np.full((1, 1), v, np.float32), "q.lora_B": np.full((1, 1), v, np.float32)} for v in (1, 3)
    ]
    assert low_rank.aggregation_gap(adapters, [7, 7]) == pytest.approx(0.2)


def test_aggregation_gap_is_zero_when_one_factor_is_shared():
    rng = np.random.default_rng(0)
    first = random_adapter(rng)
    second = {name: array if name.endswith("lora_A") else array + 1 for name, array in first.items()}
    assert low_rank.aggregation_gap([first, second], [1, 2]) < 1e-12


@pytest.mark.parametrize("adapter", [{}, {"l.mlp.experts.w": np.ones((2, 3))}])
def test_aggregation_gap_without_lora_is_zero(adapter):
    assert low_rank.aggregation_gap([adapter, adapter], [1, 1]) == 0


def test_aggregation_gap_of_a_vanishing_mean_is_infinite():
    """B A = 2 * 1 and 1 * -2: their mean is 0, but mean(B) mean(A) = 1.5 * -0.5."""
    adapters = [
        {"q.lora_A": np.full((1, 1), a, np.float32), "q.lora_B": np.full((1, 1), b, np.float32)}
        for a, b in ((1, 2), (-2, 1))
    ]
    assert low_rank.aggregation_gap(adapters, [1, 1]) == np.inf


def test_half_a_pair_is_named():
    with pytest.raises(ValueError, match=r"without their other half: \['l.q'\]"):
        low_rank.lora_prefixes(["l.q.lora_A", "l.k.lora_A", "l.k.lora_B"])


@pytest.mark.parametrize("weights", [[0, 0], [1, -1], [1, float("nan")], [1]])
def test_aggregation_gap_rejects_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be finite, >= 0, not all 0"):
        low_rank.aggregation_gap([{}, {}], weights)


def test_aggregation_gap_rejects_nothing():
    with pytest.raises(ValueError, match="one for each adapter"):
        low_rank.aggregation_gap([], [])
