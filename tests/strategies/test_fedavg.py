import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.base import ClientUpdate
from strategies.fedavg import FedAvg, FedProx

both = pytest.mark.parametrize("strategy", [FedAvg(), FedProx()], ids=["fedavg", "fedprox"])


def update(site, value, num_examples):
    return ClientUpdate(site=site, adapter={"w": np.array(value, np.float32)}, num_examples=num_examples)


@both
def test_sites_count_by_their_examples(strategy):
    """(1 * [2, 4] + 3 * [6, 0]) / 4 = [5, 1]; the last global adapter has no say."""
    result = strategy.aggregate({"w": np.full(2, 99, np.float32)}, {}, [update("a", [2, 4], 1), update("b", [6, 0], 3)])
    np.testing.assert_array_equal(result.adapter["w"], [5, 1])
    assert not result.state
    assert not result.personal


@both
@given(seed=st.integers(0, 2**32 - 1), num_sites=st.integers(1, 6))
def test_mean_is_the_scalar_loop(strategy, seed, num_sites):
    rng = np.random.default_rng(seed)
    updates = [update(str(i), rng.normal(size=3), int(rng.integers(1, 50))) for i in range(num_sites)]
    expected = [0.0, 0.0, 0.0]
    total = sum(u.num_examples for u in updates)
    for u in updates:
        for k in range(3):
            expected[k] += u.num_examples * float(u.adapter["w"][k]) / total
    mean = strategy.aggregate({"w": np.zeros(3, np.float32)}, {}, updates).adapter["w"]
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)


@both
def test_one_site_is_that_site(strategy):
    value = np.random.default_rng(0).normal(size=50).astype(np.float32)
    result = strategy.aggregate({"w": np.zeros(50, np.float32)}, {}, [update("a", value, 7)])
    np.testing.assert_array_equal(result.adapter["w"], value)
