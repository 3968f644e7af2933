import math

import numpy as np
import pytest
import torch

from strategies.base import ClientUpdate
from strategies.fedavg import FedAvg
from strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from tests.strategies.naive_fc_moe import FULL, assert_same, random_round


def one_site(value):
    return [ClientUpdate(site="a", adapter={"w": np.asarray(value, np.float32)}, num_examples=5)]


def follow(strategy, deltas, start):
    """Global arrays after rounds in which the sites moved by ``deltas`` from wherever the server was."""
    adapter, path = {"w": start.astype(np.float32)}, []
    state = strategy.init_state(adapter)
    for delta in deltas:
        result = strategy.aggregate(adapter, state, one_site(adapter["w"] + delta))
        adapter, state = result.adapter, result.state
        path.append(adapter["w"])
    return np.array(path)


@pytest.fixture
def deltas():
    """Eight rounds of updates to four coordinates, of very different sizes and of both signs."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(8, 4)) * np.array([1e-4, 1e-3, 1e-2, 1e-1])


START = np.array([0.5, -0.25, 0.0, 1.0])


def naive_adaptive(kind, deltas, *, learning_rate, beta1, beta2, tau):
    """Algorithm 2 of Reddi et al., 2021, line by line, one coordinate at a time."""
    path = []
    x, m, v = START.tolist(), [0.0] * 4, [tau**2] * 4
    for delta in deltas:
        for i in range(4):
            d = float(delta[i])
            m[i] = beta1 * m[i] + (1 - beta1) * d
            if kind is FedAdagrad:
                v[i] = v[i] + d**2
            elif kind is FedYogi:
                v[i] = v[i] - (1 - beta2) * d**2 * (v[i] > d**2) + (1 - beta2) * d**2 * (v[i] < d**2)
            else:
                v[i] = beta2 * v[i] + (1 - beta2) * d**2
            x[i] += learning_rate * m[i] / (math.sqrt(v[i]) + tau)
        path.append(list(x))
    return path


@pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])
@pytest.mark.parametrize(("beta1", "tau"), [(0.9, 1e-3), (0.0, 1e-1), (0.5, 1e-2)])
def test_adaptive_steps_are_those_of_a_scalar_loop(kind, beta1, tau, deltas):
    settings = {"learning_rate": 0.02, "beta1": beta1, "tau": tau} | ({} if kind is FedAdagrad else {"beta2": 0.9})
    expected = naive_adaptive(kind, deltas, **({"beta2": 0.9} | settings))
    np.testing.assert_allclose(follow(kind(**settings), deltas, START), expected, rtol=1e-4, atol=1e-6)


def torch_path(optimizer_of, deltas, prepare=None):
    """The same updates as negative gradients of a torch optimiser."""
    weight = torch.nn.Parameter(torch.tensor(START))
    optimizer = optimizer_of([weight])
    if prepare:
        optimizer.state[weight] = prepare(weight)
    path = []
    for delta in deltas:
        weight.grad = -torch.tensor(delta)
        optimizer.step()
        path.append(weight.detach().numpy().copy())
    return np.array(path)


def test_fedadam_is_torch_adam_without_bias_correction(deltas):
    """torch corrects by 1 - beta^step, which is 1 at a late step; v starts at tau^2 and tau is its eps."""
    tau, rate = 1e-3, 0.02
    expected = torch_path(
        lambda weights: torch.optim.Adam(weights, lr=rate, betas=(0.8, 0.95), eps=tau),
        deltas,
        lambda weight: {
            "step": torch.tensor(1e6),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.full_like(weight, tau**2),
        },
    )
    ours = follow(FedAdam(learning_rate=rate, beta1=0.8, beta2=0.95, tau=tau), deltas, START)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_fedadagrad_is_torch_adagrad(deltas):
    tau, rate = 1e-3, 0.02
    expected = torch_path(
        lambda weights: torch.optim.Adagrad(weights, lr=rate, initial_accumulator_value=tau**2, eps=tau), deltas
    )
    np.testing.assert_allclose(follow(FedAdagrad(learning_rate=rate), deltas, START), expected, rtol=1e-4, atol=1e-6)


def test_fedavgm_is_torch_sgd_with_momentum(deltas):
    expected = torch_path(lambda weights: torch.optim.SGD(weights, lr=0.3, momentum=0.7), deltas)
    ours = follow(FedAvgM(learning_rate=0.3, momentum=0.7), deltas, START)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


def test_first_steps_by_hand():
    """One coordinate at 0 moves by D = 3 with tau = 4 and learning_rate = 2, so v starts at 16.

    Adagrad: v = 16 + 9 = 25, step 2 * 3 / (5 + 4) = 2/3.
    Adam, beta1 = beta2 = 0.5: m = 1.5, v = 8 + 4.5 = 12.5, step 2 * 1.5 / (sqrt(12.5) + 4) = 0.398...
    Yogi, the same betas: v = 16 - 0.5 * 9 = 11.5, step 3 / (sqrt(11.5) + 4) = 0.405...
    Momentum, learning_rate = 2: 2 * 3 = 6, then with momentum 0.5 and D = 3 again 2 * (1.5 + 3) = 9 more.
    """
    start, once = np.zeros(1), np.array([[3.0]])
    common = {"learning_rate": 2, "tau": 4}
    assert follow(FedAdagrad(**common), once, start)[-1] == pytest.approx(2 / 3)
    assert follow(FedAdam(**common, beta1=0.5, beta2=0.5), once, start)[-1] == pytest.approx(3 / (math.sqrt(12.5) + 4))
    assert follow(FedYogi(**common, beta1=0.5, beta2=0.5), once, start)[-1] == pytest.approx(3 / (math.sqrt(11.5) + 4))
    momentum = FedAvgM(learning_rate=2, momentum=0.5)
    np.testing.assert_allclose(follow(momentum, np.array([[3.0], [3.0]]), start), [[6], [15]])


def test_experts_step_further_along_the_same_momentum(deltas):
    """Torch's SGD at three times the rate for an expert's array, at the rate itself for any other."""
    names = {"mlp.experts.w": 0.9, "self_attn.q_proj.lora_A": 0.3}
    strategy = FedAvgM(learning_rate=0.3, momentum=0.7, expert_step=3.0)
    adapter = {name: START.astype(np.float32)[None] for name in names}
    state, path = strategy.init_state(adapter), []
    for delta in deltas:
        moved = {name: array + delta.astype(np.float32) for name, array in adapter.items()}
        result = strategy.aggregate(adapter, state, [ClientUpdate(site="a", adapter=moved, num_examples=5)])
        adapter, state = result.adapter, result.state
        path.append(adapter)
    for name, rate in names.items():
        expected = torch_path(lambda weights, rate=rate: torch.optim.SGD(weights, lr=rate, momentum=0.7), deltas)
        np.testing.assert_allclose([arrays[name][0] for arrays in path], expected, rtol=1e-4, atol=1e-6)


def test_without_momentum_a_step_on_experts_is_fedavgs():
    adapter, updates = random_round(0, FULL)
    plain = FedAvg(expert_step=2.5).aggregate(adapter, {}, updates).adapter
    strategy = FedAvgM(learning_rate=1, momentum=0, expert_step=2.5)
    assert_same(strategy.aggregate(adapter, strategy.init_state(adapter), updates).adapter, plain, atol=1e-5)


@pytest.mark.parametrize("kind", [FedAdagrad, FedAdam, FedYogi])
def test_second_moment_starts_at_its_lower_bound(kind):
    state = kind(tau=0.25).init_state({"w": np.ones((2, 3), np.float32)})
    np.testing.assert_array_equal(state["square/w"], np.full((2, 3), 0.0625))
    np.testing.assert_array_equal(state["momentum/w"], np.zeros((2, 3)))


def test_no_momentum_and_a_full_step_is_fedavg(deltas):
    plain = FedAvgM(learning_rate=1, momentum=0)
    np.testing.assert_allclose(follow(plain, deltas, START), follow(FedAvg(), deltas, START), rtol=1e-6)


def test_large_tau_is_fedavg(deltas):
    """Far above the updates, sqrt(v) + tau = 2 tau, so a learning rate of 2 tau gives the mean itself."""
    scaled = FedAdagrad(tau=1e3, learning_rate=2e3)
    np.testing.assert_allclose(follow(scaled, deltas, START), follow(FedAvg(), deltas, START), rtol=1e-5, atol=1e-6)


def test_default_momentum_takes_a_steady_update_at_its_full_length():
    """Steps 0.5 (1 + 0.5 + ... ) D: 0.5, 0.75, 0.875 of D, towards D."""
    path = follow(FedAvgM(), np.full((3, 1), 8.0), np.zeros(1))
    np.testing.assert_allclose(np.diff(path.ravel(), prepend=0), [4, 6, 7])


@pytest.mark.parametrize(("kind", "bound"), [(FedAdagrad, 1.0), (FedAdam, 2.2), (FedYogi, 2.2)])
def test_steps_are_bounded_by_the_learning_rate_however_large_the_updates(kind, bound):
    """Without bias correction v lags behind m: Adam's and Yogi's steps reach about twice the learning rate."""
    steps = np.diff(follow(kind(), np.full((40, 1), 5.0), np.zeros(1)), axis=0, prepend=0)
    assert steps.min() > 0
    assert steps.max() <= bound * kind().learning_rate


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (FedAdam, {"tau": 0}, "strategy.tau must be > 0, got 0"),
        (FedYogi, {"tau": float("nan")}, "strategy.tau must be > 0, got nan"),
        (FedAdagrad, {"learning_rate": -1.0}, "strategy.learning_rate must be > 0, got -1.0"),
        (FedAdagrad, {"beta1": 1.0}, r"strategy.beta1 must be in \[0, 1\), got 1.0"),
        (FedAdam, {"beta2": 1.0}, r"strategy.beta2 must be in \[0, 1\), got 1.0"),
        (FedYogi, {"beta2": -0.1}, r"strategy.beta2 must be in \[0, 1\), got -0.1"),
        (FedAvgM, {"momentum": 1.0}, r"strategy.momentum must be in \[0, 1\), got 1.0"),
        (FedAvgM, {"learning_rate": float("inf")}, "strategy.learning_rate must be > 0, got inf"),
        (FedAvgM, {"expert_step": 0.0}, "strategy.expert_step must be > 0, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
