"""FedAlign-MoE's server: by hand, against loops written independently, and by what it must reduce to."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import experts
from strategies.base import ClientUpdate
from strategies.fedalign_moe import (
    MARGIN,
    MEAN,
    PROBABILITY,
    REFERENCE,
    SEMANTICS,
    FedAlignMoe,
    pair_weights,
    routing_reference,
)
from strategies.fedavg import FedAvg
from tests.strategies.naive_fc_moe import FULL, LAYERS, LORA, NUM_EXPERTS, assert_same, random_round

LORA_AND_FULL = pytest.mark.parametrize("shapes", [LORA, FULL], ids=["lora", "full"])
WIDTH = 5


def aligned_round(seed, shapes):
    """``random_round`` with routing statistics; hidden states share a direction, as real ones do."""
    adapter, updates = random_round(seed, shapes)
    rng = np.random.default_rng(seed + 1)
    told = []
    for update in updates:
        extras = {}
        for layer in LAYERS:
            probability = rng.dirichlet(np.ones(NUM_EXPERTS))
            extras[PROBABILITY + layer] = probability.astype(np.float32)
            extras[MARGIN + layer] = (probability * rng.uniform(size=NUM_EXPERTS)).astype(np.float32)
            extras[SEMANTICS + layer] = rng.normal(0.5, 1, (NUM_EXPERTS, WIDTH)).astype(np.float32)
        told.append(replace(update, extras=extras))
    return adapter, told


def cosine(left, right):
    lengths = np.linalg.norm(left) * np.linalg.norm(right)
    return float(left @ right / lengths) if lengths > 0 else 0.0


def naive_experts(adapter, updates, beta):
    """Eq. 13 and 15 to 18, one (layer, expert, pair) at a time."""
    result = {}
    for layer in LAYERS:
        names = [name for name in adapter if name.startswith(f"{layer}.experts.")]
        for name in names:
            result[name] = adapter[name].astype(float)
        for e in range(NUM_EXPERTS):
            users = [u for u in updates if u.expert_tokens[layer][e] > 0]
            change = [
                np.concatenate([(u.adapter[n][e].astype(float) - adapter[n][e]).ravel() for n in names]) for u in users
            ]
            meaning = [u.extras[SEMANTICS + layer][e].astype(float) for u in users]
            alike = [[cosine(a, b) for b in meaning] for a in meaning]
            if not users:
                continue
            threshold = np.mean(alike) - beta * np.std(alike)
            gamma = [
                [
                    max(0.0, cosine(change[i], change[j])) / (1 + math.exp(threshold - alike[i][j]))
                    for j in range(len(users))
                ]
                for i in range(len(users))
            ]
            for i, u in enumerate(users):
                weight = sum(gamma[i]) / sum(map(sum, gamma))
                for name in names:
                    result[name][e] += weight * (u.adapter[name][e].astype(float) - adapter[name][e])
    return result


def naive_reference(updates, layer):
    """Eq. 4, 6 and 7, one expert at a time."""
    reference = []
    for e in range(NUM_EXPERTS):
        p = [float(u.extras[PROBABILITY + layer][e]) for u in updates]
        m = [float(u.extras[MARGIN + layer][e]) for u in updates]
        overlap = [own * sum(p) / len(p) for own in p]
        s = [o * margin for o, margin in zip(overlap, m, strict=True)]
        reference.append(sum(value / sum(s) * own for value, own in zip(s, p, strict=True)))
    return reference


@LORA_AND_FULL
@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 2**32 - 2))
def test_rule_is_the_naive_one(shapes, beta, seed):
    adapter, updates = aligned_round(seed, shapes)
    result = FedAlignMoe(deviations=beta).aggregate(adapter, {}, updates)
    dense = FedAvg().aggregate(adapter, {}, updates).adapter
    expected = {name: dense[name] for name in adapter if not experts.is_expert_array(name)}
    assert_same(result.adapter, expected | naive_experts(adapter, updates, beta))
    for layer in LAYERS:
        np.testing.assert_allclose(result.state[REFERENCE + layer], naive_reference(updates, layer), rtol=1e-5)
        mean = np.mean([u.extras[PROBABILITY + layer] for u in updates], axis=0)
        np.testing.assert_allclose(result.state[MEAN + layer], mean, rtol=1e-6)


def test_reference_by_hand():
    """p = .6 and .2: mean .4, overlaps .24 and .08; margins .5 and .5: weights 3/4 and 1/4, p_g = .45 + .05 = .5.

    Nobody prefers the second expert: its reference is the mean of .4 and .8.
    """
    reference, mean = routing_reference(np.array([[0.6, 0.4], [0.2, 0.8]]), np.array([[0.5, 0.0], [0.5, 0.0]]))
    np.testing.assert_allclose(reference, [0.5, 0.6])
    np.testing.assert_allclose(mean, [0.4, 0.6])


def test_pair_weights_by_hand():
    """Two sites alike by 0, each by 1 with itself: mean 1/2, deviation 1/2, threshold 0 with beta = 1.

    Updates at a cosine of 0.6: gamma is sigmoid(1) on the diagonal and 0.6 sigmoid(0) = 0.3 beside it.
    """
    found = pair_weights(
        np.array([[[1, 0.6], [0.6, 1]]]), np.array([[[1.0, 0], [0, 1]]]), np.array([[True, True]]), 1.0
    )
    own = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(found, [[[own, 0.3], [0.3, own]]])


@LORA_AND_FULL
def test_sites_that_agree_have_equal_say(shapes):
    adapter, updates = aligned_round(1, shapes)
    used = {layer: np.ones(NUM_EXPERTS) for layer in LAYERS}
    equal = [replace(updates[0], site=f"site-{i}", expert_tokens=used) for i in range(3)]
    result = FedAlignMoe().aggregate(adapter, {}, equal)
    assert_same(result.adapter, updates[0].adapter, atol=1e-6)
    for found in result.diagnostics["experts"].values():
        np.testing.assert_allclose(found["weight"], np.full((3, NUM_EXPERTS), 1 / 3))


@LORA_AND_FULL
def test_expert_nobody_used_keeps_its_value_and_one_that_one_site_used_is_copied(shapes):
    """Of ``random_round``, nobody uses expert 0 and site 1 alone uses expert 1."""
    adapter, updates = aligned_round(2, shapes)
    result = FedAlignMoe().aggregate(adapter, {}, updates).adapter
    for name in filter(experts.is_expert_array, adapter):
        np.testing.assert_array_equal(result[name][0], adapter[name][0])
        np.testing.assert_array_equal(result[name][1], updates[1].adapter[name][1])


def two_against_one(meanings):
    """One layer, one expert of two values: two sites that went to (1, 0), and one at 60 degrees to them."""
    values = [(1, 0), (1, 0), (0.5, math.sqrt(0.75))]
    updates = [
        ClientUpdate(
            site=f"site-{i}",
            adapter={"l.experts.w": np.array([value], np.float32)},
            num_examples=1,
            expert_tokens={"l": np.array([1.0])},
            extras={
                PROBABILITY + "l": np.float32([1]),
                MARGIN + "l": np.float32([1]),
                SEMANTICS + "l": np.float32([meaning]),
            },
        )
        for i, (value, meaning) in enumerate(zip(values, meanings, strict=True))
    ]
    return FedAlignMoe().aggregate({"l.experts.w": np.zeros((1, 2), np.float32)}, {}, updates)


def test_a_site_that_means_something_else_counts_less():
    same, other = two_against_one([(1, 0)] * 3), two_against_one([(1, 0), (1, 0), (-1, 0)])
    weight = [np.ravel(result.diagnostics["experts"]["l"]["weight"]) for result in (same, other)]
    # The same meaning throughout: gamma = cosine / 2, so 1 + 1 + .5 against .5 + .5 + 1.
    np.testing.assert_allclose(weight[0], np.array([2.5, 2.5, 2.0]) / 7, rtol=1e-6)
    assert weight[1][2] < weight[0][2] - 0.01
    np.testing.assert_allclose([w.sum() for w in weight], 1)


def test_sites_of_opposite_updates_have_no_weight_through_one_another():
    """Each keeps its own pair alone: equal shares, and the step is their mean."""
    adapter, updates = aligned_round(3, LORA)
    used = {layer: np.ones(NUM_EXPERTS) for layer in LAYERS}
    opposite = {name: 2 * array - updates[0].adapter[name] for name, array in adapter.items()}
    pair = [
        replace(updates[0], expert_tokens=used),
        replace(updates[0], site="site-1", adapter=opposite, expert_tokens=used),
    ]
    assert_same(FedAlignMoe().aggregate(adapter, {}, pair).adapter, adapter, atol=1e-6)


def test_beta_matters_little():
    """From 0 to 3 deviations no share of an expert moves by more than a few percent: the sigmoid is nearly flat."""
    adapter, updates = aligned_round(4, LORA)
    shares = [
        np.array([found["weight"] for found in rule.aggregate(adapter, {}, updates).diagnostics["experts"].values()])
        for rule in (FedAlignMoe(deviations=0), FedAlignMoe(), FedAlignMoe(deviations=3))
    ]
    assert 0 < np.abs(shares[0] - shares[2]).max() < 0.05
    assert np.abs(shares[1] - shares[2]).max() < 0.05


def test_ranges_of_experts_give_the_same_as_all_at_once(monkeypatch):
    adapter, updates = aligned_round(5, LORA)
    at_once = FedAlignMoe().aggregate(adapter, {}, updates).adapter
    monkeypatch.setattr(
        "strategies.fedalign_moe.experts.expert_slices", lambda *_: [slice(e, e + 1) for e in range(NUM_EXPERTS)]
    )
    assert_same(FedAlignMoe().aggregate(adapter, {}, updates).adapter, at_once, atol=1e-7)


def test_before_the_first_round_there_is_no_reference_and_then_it_is_broadcast():
    adapter, updates = aligned_round(6, LORA)
    rule = FedAlignMoe()
    assert rule.broadcast(rule.init_state(adapter)) == {}
    state = rule.aggregate(adapter, {}, updates).state
    assert rule.broadcast(state).keys() == {kind + layer for kind in (REFERENCE, MEAN) for layer in LAYERS}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({PROBABILITY + LAYERS[0]: None}, r"probability/model.layers.0.mlp must have 4 rows and 1 axes, got None"),
        ({SEMANTICS + LAYERS[1]: np.zeros((3, WIDTH))}, r"semantics/.* must have 4 rows and 2 axes, got \(3, 5\)"),
        ({MARGIN + LAYERS[0]: np.full(NUM_EXPERTS, 2.0)}, r"margin/model.layers.0.mlp must be in \[0, 1\], got 2 to 2"),
        ({SEMANTICS + LAYERS[0]: np.full((NUM_EXPERTS, WIDTH), np.inf)}, "semantics/.* holds NaN or infinity"),
    ],
)
def test_update_without_good_statistics_is_refused(changed, message):
    adapter, updates = aligned_round(0, LORA)
    FedAlignMoe().check_update(adapter, updates[0])
    extras = {name: array for name, array in (updates[0].extras | changed).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        FedAlignMoe().check_update(adapter, replace(updates[0], extras=extras))


def test_a_site_with_another_width_of_hidden_states_resembles_nobody_and_breaks_nothing():
    adapter, updates = aligned_round(7, LORA)
    wide = {SEMANTICS + layer: np.ones((NUM_EXPERTS, WIDTH + 1), np.float32) for layer in LAYERS}
    none = {SEMANTICS + layer: np.zeros((NUM_EXPERTS, WIDTH), np.float32) for layer in LAYERS}
    first, expected = (
        FedAlignMoe().aggregate(adapter, {}, [replace(updates[0], extras=updates[0].extras | sent), *updates[1:]])
        for sent in (wide, none)
    )
    assert_same(first.adapter, expected.adapter)
