import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.adapters import weighted_mean
from strategies.base import ClientUpdate
from strategies.fedavg import FedAvg, FedProx, Weights
from tests.strategies.naive_fc_moe import LORA, random_round

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


def expert_update(site, experts, dense, num_examples, tokens):
    """A site's adapter of two experts of one value each and a dense value."""
    adapter = {"l.experts.w": np.array(experts, np.float32)[:, None], "w": np.array([dense], np.float32)}
    return ClientUpdate(
        site=site, adapter=adapter, num_examples=num_examples, expert_tokens={"l": np.array(tokens, np.float64)}
    )


RECEIVED = {"l.experts.w": np.ones((2, 1), np.float32), "w": np.ones(1, np.float32)}
SENT = [expert_update("a", [2, 7], 4, 1, [9, 0]), expert_update("b", [4, 7], 8, 3, [1, 0])]


@pytest.mark.parametrize(
    ("weights", "first", "second", "dense"),
    [
        (Weights.examples, (2 + 3 * 4) / 4, 7, (4 + 3 * 8) / 4),
        (Weights.uniform, 3, 7, 6),
        (Weights.tokens, (9 * 2 + 4) / 10, 1, (4 + 3 * 8) / 4),
    ],
)
def test_weights_by_hand(weights, first, second, dense):
    """Nobody used the second expert, which keeps its value of 1 by tokens only."""
    result = FedAvg(weights=weights).aggregate(RECEIVED, {}, SENT).adapter
    np.testing.assert_allclose(result["l.experts.w"][:, 0], [first, second], rtol=1e-6)
    np.testing.assert_allclose(result["w"], dense, rtol=1e-6)


def test_expert_step_goes_on_from_the_last_adapter_and_moves_experts_only():
    """Means 3.5 and 7 are 2.5 and 6 away from 1: three times that is 8.5 and 19."""
    result = FedAvg(expert_step=3.0).aggregate(RECEIVED, {}, SENT).adapter
    np.testing.assert_allclose(result["l.experts.w"][:, 0], [8.5, 19])
    np.testing.assert_allclose(result["w"], [7])


def test_defaults_are_the_plain_mean_to_the_bit():
    adapter, updates = random_round(0, LORA)
    result = FedAvg(expert_step=1.0, weights=Weights.examples).aggregate(adapter, {}, updates).adapter
    expected = weighted_mean([u.adapter for u in updates], [u.num_examples for u in updates])
    assert result.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(result[name], expected[name])


def test_settings_and_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"strategy.expert_step must be > 0, got 0"):
        FedAvg(expert_step=0.0)
    uncounted = ClientUpdate(site="a", adapter=RECEIVED, num_examples=1)
    FedAvg().check_update(RECEIVED, uncounted)
    with pytest.raises(ValueError, match="expert_tokens lacks l, which has trained experts"):
        FedAvg(weights=Weights.tokens).check_update(RECEIVED, uncounted)
