"""SCAFFOLD's server: by hand, and what its control variate must always be."""

from dataclasses import replace

import numpy as np
import pytest

from strategies.base import ClientUpdate
from strategies.fedavg import FedAvg
from strategies.scaffold import CONTROL, Scaffold

SHAPES = {"l.experts.w": (2, 3), "l.attn.q_proj.lora_A": (1, 4)}


def reply(site, num_examples, adapter, change):
    return ClientUpdate(
        site=site,
        adapter=adapter,
        num_examples=num_examples,
        extras={CONTROL + name: array for name, array in change.items()},
    )


def drawn(generator):
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_by_hand():
    """Adapters 2 and 6 of 1 and 3 examples: 5. Changes 4 and 8 from c = 0: (4 + 3 * 8) / 4 = 7.

    Then site b alone, 3 of the 4 examples known, with a change of -4: 7 + 3 / 4 * -4 = 4. Then a newcomer of 4 examples
    with c_i = 12: (4 * 4 + 4 * 12) / 8 = 8.
    """
    value = lambda x: {"w": np.array([x], np.float32)}  # noqa: E731
    rule, adapter = Scaffold(), value(0)
    state = rule.init_state(adapter)
    assert rule.broadcast(state)[CONTROL + "w"] == 0
    first = rule.aggregate(adapter, state, [reply("a", 1, value(2), value(4)), reply("b", 3, value(6), value(8))])
    assert first.adapter["w"] == 5
    assert rule.broadcast(first.state)[CONTROL + "w"] == 7
    second = rule.aggregate(first.adapter, first.state, [reply("b", 3, value(1), value(-4))])
    assert second.adapter["w"] == 1
    assert rule.broadcast(second.state)[CONTROL + "w"] == 4
    third = rule.aggregate(second.adapter, second.state, [reply("c", 4, value(1), value(12))])
    assert rule.broadcast(third.state)[CONTROL + "w"] == 8
    assert rule.broadcast(third.state).keys() == {CONTROL + "w"}


def test_control_variate_is_always_the_mean_of_the_sites_own_whoever_takes_part():
    """Sixteen rounds of random pairs of five sites: what the changes add up to is what the sites hold."""
    generator = np.random.default_rng(0)
    examples = {f"site-{i}": i + 1 for i in range(5)}
    own, rule, adapter = {}, Scaffold(), drawn(generator)
    state = rule.init_state(adapter)
    for _ in range(16):
        updates = []
        for site in generator.choice(sorted(examples), size=2, replace=False):
            new = drawn(generator)
            old = own.get(site, {name: np.zeros(shape) for name, shape in SHAPES.items()})
            change = {name: (new[name] - old[name]).astype(np.float32) for name in new}
            updates.append(reply(site, examples[site], drawn(generator), change))
            own[site] = new
        state = rule.aggregate(adapter, state, updates).state
        for name in SHAPES:
            mean = np.average([c[name] for c in own.values()], axis=0, weights=[examples[site] for site in own])
            np.testing.assert_allclose(state[CONTROL + name], mean, atol=1e-5)
    assert len(own) == 5


def test_site_whose_data_grow_counts_in_c_as_it_did_at_first():
    value = lambda x: {"w": np.array([x], np.float32)}  # noqa: E731
    rule, adapter = Scaffold(), value(0)
    state = rule.init_state(adapter)
    state = rule.aggregate(
        adapter, state, [reply("a", 10, value(0), value(1)), reply("b", 10, value(0), value(-1))]
    ).state
    state = rule.aggregate(adapter, state, [reply("a", 100, value(0), value(1))]).state
    assert rule.broadcast(state)[CONTROL + "w"] == 0.5  # of c_i = 2 and -1


def test_adapter_is_fedavgs():
    generator = np.random.default_rng(1)
    updates = [reply(f"site-{i}", i + 1, drawn(generator), drawn(generator)) for i in range(3)]
    adapter = drawn(generator)
    result = Scaffold().aggregate(adapter, Scaffold().init_state(adapter), updates)
    expected = FedAvg().aggregate(adapter, {}, updates)
    for name in SHAPES:
        np.testing.assert_array_equal(result.adapter[name], expected.adapter[name])


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({}, "array names differ: .*control/l.attn"),
        ({CONTROL + name: np.zeros(3, np.float32) for name in SHAPES}, "shapes of control/.* differ"),
        ({CONTROL + name: np.full(shape, np.nan) for name, shape in SHAPES.items()}, "holds NaN or infinity"),
    ],
)
def test_update_without_a_good_change_of_the_control_variate_is_refused(extras, message):
    generator = np.random.default_rng(2)
    adapter = drawn(generator)
    update = reply("a", 1, drawn(generator), drawn(generator))
    Scaffold().check_update(adapter, update)
    with pytest.raises(ValueError, match=message):
        Scaffold().check_update(adapter, replace(update, extras=extras))
