"""What every strategy owes the round that calls it."""

import json

import numpy as np
import pytest

from strategies.base import ClientUpdate, require
from strategies.centralised import Centralised
from strategies.clair import Clair
from strategies.conflicts import Against, ConflictConfig, Granularity, Space
from strategies.fc_moe import FcMoe
from strategies.fedavg import FedAvg, FedProx
from strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.local_only import LocalOnly

AVERAGING = [
    FedAvg(),
    FedProx(),
    FedAvgM(),
    FedAdam(),
    FedAdagrad(),
    FedYogi(),
    FcMoe(),
    FcMoe(conflict=ConflictConfig(space=Space.product)),
    FcMoe(conflict=ConflictConfig(granularity=Granularity.component)),
    FcMoe(conflict=ConflictConfig(against=Against.others)),
    FcMoe(conflict=ConflictConfig(against=Against.off)),
]
ORDERED = FcMoe(conflict=ConflictConfig(against=Against.pairwise))
"""Pairwise projection goes by the order of the sites, which callers sort by name."""
REFACTORING = [Clair()]
"""Keep products, not their factors, so that factors come back in another basis."""
ALONE = [Centralised(), LocalOnly()]

SHAPES = {
    "l.q.lora_A": (2, 5),
    "l.q.lora_B": (4, 2),
    "l.mlp.experts.w.lora_A": (3, 2, 5),
    "l.mlp.experts.w.lora_B": (3, 4, 2),
    "l.mlp.gate.weight": (3, 5),
}


def describe(strategy):
    return str(strategy)


def read_only(arrays):
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def random_adapter(rng):
    return read_only({name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()})


def random_round(num_sites, seed=0):
    """An adapter and its updates, none of which can be written to."""
    rng = np.random.default_rng(seed)
    adapter = random_adapter(rng)
    updates = [
        ClientUpdate(
            site=f"site-{i:02}",
            adapter=random_adapter(rng),
            num_examples=int(rng.integers(1, 100)),
            expert_tokens=read_only({"l.mlp": rng.integers(0, 50, 3).astype(np.float64)}),
        )
        for i in range(num_sites)
    ]
    return adapter, updates


@pytest.mark.parametrize("strategy", [*AVERAGING, ORDERED, *REFACTORING, *ALONE], ids=describe)
def test_a_round_keeps_the_layout_and_changes_none_of_its_inputs(strategy):
    """The inputs are read-only, so that writing to one raises; state goes round twice."""
    adapter, updates = random_round(1 if strategy in ALONE else 3)
    settings, state = describe(strategy), strategy.init_state(adapter)
    for _ in range(2):
        result = strategy.aggregate(adapter, read_only(dict(state)), updates)
        assert list(result.adapter) == list(adapter)
        assert {name: array.shape for name, array in result.adapter.items()} == SHAPES
        assert {array.dtype for array in result.adapter.values()} == {np.dtype(np.float32)}
        assert all(np.isfinite(array).all() for array in result.adapter.values())
        assert result.state.keys() == state.keys()
        json.dumps(result.diagnostics, allow_nan=False)
        adapter, state = read_only(dict(result.adapter)), result.state
    assert describe(strategy) == settings


@pytest.mark.parametrize("strategy", AVERAGING, ids=describe)
def test_order_of_sites_changes_nothing_but_rounding(strategy):
    adapter, updates = random_round(4)
    state = strategy.init_state(adapter)
    forward = strategy.aggregate(adapter, state, updates).adapter
    backward = strategy.aggregate(adapter, state, updates[::-1]).adapter
    for name in adapter:
        np.testing.assert_allclose(forward[name], backward[name], atol=1e-5)


@pytest.mark.parametrize("strategy", [*AVERAGING, ORDERED], ids=describe)
def test_sites_that_changed_nothing_leave_the_adapter_alone(strategy):
    adapter, updates = random_round(3)
    idle = [
        ClientUpdate(site=update.site, adapter=adapter, num_examples=1, expert_tokens=update.expert_tokens)
        for update in updates
    ]
    result = strategy.aggregate(adapter, strategy.init_state(adapter), idle)
    for name in adapter:
        np.testing.assert_allclose(result.adapter[name], adapter[name], rtol=1e-6)


def test_names_and_client_halves_are_what_the_settings_call_them():
    methods = {strategy.name: set(strategy.methods) for strategy in [*AVERAGING, *REFACTORING, *ALONE]}
    paired = {"sft", "fc_moe", "flex", "firm", "dpo"}
    assert methods == {
        "fedavg": paired,
        "fedprox": paired,
        "fedavgm": paired,
        "fedadam": paired,
        "fedadagrad": paired,
        "fedyogi": paired,
        "fc_moe": paired,
        "clair": {"sft"},
        "local_only": {"local_only"},
        "centralised": {"sft"},
    }


def update_with(**changes):
    _, (update,) = random_round(1)
    fields = {"site": "a", "adapter": update.adapter, "num_examples": 1, "expert_tokens": update.expert_tokens}
    return ClientUpdate(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 0}, r"num_examples must be in \[1, 1e\+12\], got 0"),
        ({"num_examples": 10**400}, r"num_examples must be in \[1, 1e\+12\], got 10000"),
        ({"extras": {"control": np.array([1e7])}}, r"control holds 1e\+07; weights must be at most"),
        (
            {"expert_tokens": {"l.mlp": np.array([1.0, -1, 0])}},
            r"expert_tokens\[l.mlp\] must be one count in \[0, 1e\+15\]",
        ),
        ({"expert_tokens": {"l.mlp": np.ones((3, 1))}}, r"expert_tokens\[l.mlp\] must be one count in \[0, 1e\+15\]"),
        (
            {"expert_tokens": {"l.mlp": np.array([1.0, 1e16, 0])}},
            r"expert_tokens\[l.mlp\] must be one count in \[0, 1e",
        ),
        ({"expert_tokens": {"l.mlp": np.array([1.0, np.nan, 0])}}, "l.mlp holds NaN"),
        ({"adapter": {}}, "array names differ"),
    ],
)
@pytest.mark.parametrize("strategy", AVERAGING[::3], ids=describe)
def test_updates_that_must_be_left_out_are_refused(strategy, changes, message):
    adapter, _ = random_round(1)
    strategy.check_update(adapter, update_with())
    with pytest.raises(ValueError, match=message):
        strategy.check_update(adapter, update_with(**changes))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda array: np.full_like(array, np.nan), "l.q.lora_A holds NaN or infinity"),
        (lambda array: np.full_like(array, np.inf), "l.q.lora_A holds NaN or infinity"),
        (lambda array: array[:1], r"shapes of l.q.lora_A differ: \(2, 5\) and \(1, 5\)"),
    ],
)
def test_arrays_that_must_be_left_out_are_named(broken, message):
    adapter, (update,) = random_round(1)
    arrays = dict(update.adapter) | {"l.q.lora_A": broken(update.adapter["l.q.lora_A"])}
    with pytest.raises(ValueError, match=message):
        FedAvg().check_update(adapter, update_with(adapter=arrays))


def test_require_names_key_limit_and_value():
    require(True, "train.batch_size", ">= 1", 3)
    with pytest.raises(ValueError, match=r"train.batch_size must be >= 1, got 0"):
        require(False, "train.batch_size", ">= 1", 0)
