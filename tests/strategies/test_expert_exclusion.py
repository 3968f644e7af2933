"""Single experts counted less, against means over the sites with the weights written out."""

from __future__ import annotations

import numpy as np
import pytest

from strategies.base import ClientUpdate
from strategies.expert_exclusion import counted_less
from strategies.fedavg import FedAvg, Weights

LAYER, NAMES = "l.mlp", ("l.mlp.experts.w.lora_A", "l.mlp.experts.w.lora_B", "l.q.lora_A")


@pytest.fixture(scope="module")
def drawn():
    """The received adapter, and updates of four sites with 3 experts."""
    rng = np.random.default_rng(0)
    shapes = dict(zip(NAMES, [(3, 2, 5), (3, 4, 2), (2, 5)], strict=True))

    def adapter():
        return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    return adapter(), [
        ClientUpdate(site=f"s{i}", adapter=adapter(), num_examples=n, expert_tokens={LAYER: np.array([4.0, n, 0.0])})
        for i, n in enumerate([10, 30, 20, 40])
    ]


@pytest.mark.parametrize(
    ("rule", "weight"),
    [(Weights.examples, 0.0), (Weights.examples, 0.3), (Weights.examples, 1.0), (Weights.tokens, 0.0)],
)
def test_mean_counts_the_rejected_expert_so_much_less(drawn, rule, weight):
    """Sites 1 and 3 are rejected for expert 1, which got as many tokens at a site as the site has examples."""
    received, updates = drawn
    less = counted_less(received, updates, {(LAYER, 1): {"s1", "s3", "not here"}}, weight)
    plain, got = (FedAvg(weights=rule).aggregate(received, {}, sent).adapter for sent in (updates, less))
    shares = [10, 30 * weight, 20, 40 * weight]
    for name in NAMES[:2]:
        expected = np.average([update.adapter[name][1] for update in updates], axis=0, weights=shares)
        np.testing.assert_allclose(got[name][1], expected, atol=1e-6)
        for expert in (0, 2):
            np.testing.assert_array_equal(got[name][expert], plain[name][expert])
    np.testing.assert_array_equal(got[NAMES[2]], plain[NAMES[2]])
    kept = [update.expert_tokens[LAYER][1] for update in updates] if weight else [10, 0, 20, 0]
    assert [update.expert_tokens[LAYER].tolist() for update in less] == [[4.0, tokens, 0.0] for tokens in kept]


def test_a_rule_by_tokens_counts_the_rejected_expert_less_once(drawn):
    """What it gives moves from the others' mean towards that of all as the weight grows, by about the weight."""
    received, updates = drawn
    by_tokens, name = FedAvg(weights=Weights.tokens), NAMES[0]
    ends = [
        by_tokens.aggregate(received, {}, counted_less(received, updates, {(LAYER, 1): {"s1"}}, weight)).adapter[name]
        for weight in (0.0, 0.2, 1.0)
    ]
    none, some, full = (end[1] - ends[0][1] for end in ends)
    moved = (some * full).sum() / (full * full).sum()
    assert np.linalg.norm(some - moved * full) < 1e-5
    assert not none.any()
    assert 0.2 < moved < 0.3


def test_expert_that_is_trusted_nowhere_keeps_what_was_received(drawn):
    received, updates = drawn
    everyone = {update.site for update in updates}
    got = FedAvg().aggregate(received, {}, counted_less(received, updates, {(LAYER, 2): everyone}, 0.0)).adapter
    for name in NAMES[:2]:
        np.testing.assert_allclose(got[name][2], received[name][2], atol=1e-6)


def test_inputs_stay_as_they_are(drawn):
    received, updates = drawn
    before = [update.adapter[name].copy() for update in updates for name in NAMES]
    counted_less(received, updates, {(LAYER, 0): {"s0"}}, 0.0)
    for old, new in zip(before, (update.adapter[name] for update in updates for name in NAMES), strict=True):
        np.testing.assert_array_equal(old, new)
    assert updates[0].expert_tokens[LAYER].tolist() == [4.0, 10.0, 0.0]
