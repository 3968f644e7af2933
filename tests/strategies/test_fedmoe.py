"""FedMoE: by hand, against loops written independently, and by what it must reduce to."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.base import ClientUpdate
from strategies.fedavg import FedAvg
from strategies.fedmoe import FedMoe
from tests.strategies.naive_fc_moe import FULL, LAYERS, LORA, NUM_EXPERTS, assert_same, random_round

LORA_AND_FULL = pytest.mark.parametrize("shapes", [LORA, FULL], ids=["lora", "full"])


def naive_fedmoe(adapter, updates):
    """Row by row: whoever used the expert, weighted by examples; a router's rows are those of layer 0."""
    result = {}
    for name, before in adapter.items():
        layer = next((layer for layer in LAYERS if name.startswith(f"{layer}.")), None)
        rows = []
        for row in range(len(before)):
            say = [u.num_examples * (layer is None or u.expert_tokens[layer][row] > 0) for u in updates]
            values = sum(n * u.adapter[name][row].astype(float) for n, u in zip(say, updates, strict=True))
            rows.append(values / sum(say) if sum(say) else before[row])
        result[name] = np.array(rows)
    return result


@LORA_AND_FULL
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_rule_is_the_naive_one(shapes, seed):
    adapter, updates = random_round(seed, shapes)
    assert_same(FedMoe().aggregate(adapter, {}, updates).adapter, naive_fedmoe(adapter, updates))


def test_by_hand():
    """Expert 0: 1 and 3 examples, (1 * 1 + 3 * 5) / 4 = 4. Expert 1: the second site alone, 6. Expert 2: nobody, 0.

    So do the router's rows; the dense array is (1 * 8 + 3 * 4) / 4 = 5 although only one site used all of the layer.
    """
    names = {"l.experts.w": (3, 1), "l.gate.weight": (3, 2), "l.attn.q_proj.lora_A": (1, 1)}
    adapter = {name: np.zeros(shape, np.float32) for name, shape in names.items()}

    def update(site, num_examples, values, dense, tokens):
        rows = np.array(values, np.float32)[:, None]
        trained = (rows, np.repeat(rows, 2, axis=1), np.array([[dense]], np.float32))
        return ClientUpdate(
            site=site,
            adapter=dict(zip(names, trained, strict=True)),
            num_examples=num_examples,
            expert_tokens={"l": np.array(tokens, float)},
        )

    result = FedMoe().aggregate(
        adapter, {}, [update("a", 1, [1, 9, 7], 8, [2, 0, 0]), update("b", 3, [5, 6, 7], 4, [1, 9, 0])]
    )
    np.testing.assert_allclose(result.adapter["l.experts.w"], [[4], [6], [0]])
    np.testing.assert_allclose(result.adapter["l.gate.weight"], [[4, 4], [6, 6], [0, 0]])
    np.testing.assert_allclose(result.adapter["l.attn.q_proj.lora_A"], [[5]])
    found = result.diagnostics["experts"]["l"]
    assert found == {"sites": ["a", "b"], "tokens": [[2, 0, 0], [1, 9, 0]], "weight": [[0.25, 0, 0], [0.75, 1, 0]]}


@LORA_AND_FULL
def test_where_every_site_used_every_expert_it_is_fedavg(shapes):
    adapter, updates = random_round(1, shapes)
    used = [replace(update, expert_tokens={layer: np.ones(NUM_EXPERTS) for layer in LAYERS}) for update in updates]
    assert_same(FedMoe().aggregate(adapter, {}, used).adapter, FedAvg().aggregate(adapter, {}, used).adapter)


@LORA_AND_FULL
def test_expert_nobody_used_keeps_its_value_and_one_that_one_site_used_is_copied(shapes):
    """Of ``random_round``, nobody uses expert 0 and site 1 alone uses expert 1."""
    adapter, updates = random_round(2, shapes)
    result = FedMoe().aggregate(adapter, {}, updates).adapter
    for name in adapter:
        if ".experts." in name or ".gate." in name:
            np.testing.assert_array_equal(result[name][0], adapter[name][0])
            np.testing.assert_array_equal(result[name][1], updates[1].adapter[name][1])


def test_dense_model_is_fedavg_exactly():
    adapter, updates = random_round(0, {})
    dense = [replace(update, expert_tokens={}) for update in updates]
    result, expected = (rule.aggregate(adapter, {}, dense).adapter for rule in (FedMoe(), FedAvg()))
    for name in adapter:
        np.testing.assert_array_equal(result[name], expected[name])


def test_update_without_the_counts_of_every_expert_is_refused():
    adapter, updates = random_round(0, LORA)
    FedMoe().check_update(adapter, updates[0])
    with pytest.raises(ValueError, match=r"expert_tokens lacks model\.layers\.0\.mlp"):
        FedMoe().check_update(adapter, replace(updates[0], expert_tokens={}))
