"""FC-MoE against ``naive_fc_moe``, by hand, and by what it must reduce to."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import experts
from strategies.base import ClientUpdate
from strategies.conflicts import Against, ConflictConfig, Granularity, Space
from strategies.expert_rounds import Attention
from strategies.fc_moe import FcMoe, Importance
from strategies.fc_moe_plus import FcMoePlus
from strategies.fedavg import FedAvg, Weights
from strategies.fedmoe import FedMoe
from tests.strategies.naive_fc_moe import FULL, LAYERS, LORA, NUM_EXPERTS, assert_same, naive_fc_moe, random_round

seeds = st.integers(0, 2**32 - 1)
LORA_AND_FULL = pytest.mark.parametrize("shapes", [LORA, FULL], ids=["lora", "full"])


@LORA_AND_FULL
@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_paper_rule_is_the_naive_one(shapes, seed):
    adapter, updates = random_round(seed, shapes)
    assert_same(FcMoe().aggregate(adapter, {}, updates).adapter, naive_fc_moe(FcMoe(), adapter, updates))


VARIANTS = [
    *[FcMoe(importance=importance) for importance in Importance],
    *[FcMoe(conflict=ConflictConfig(granularity=g, against=against)) for g in Granularity for against in Against],
]
CASES = [
    pytest.param(shapes, strategy, id=f"{kind}-{strategy}")
    for kind, shapes in (("lora", LORA), ("full", FULL))
    for strategy in VARIANTS
    if not (shapes is FULL and strategy.conflict.granularity is Granularity.component)
]


@pytest.mark.parametrize(("shapes", "strategy"), CASES)
def test_every_variant_is_the_naive_one(shapes, strategy):
    adapter, updates = random_round(7, shapes)
    result = strategy.aggregate(adapter, {}, updates)
    assert_same(result.adapter, naive_fc_moe(strategy, adapter, updates))
    for layer in LAYERS:
        used_CE = np.array([update.expert_tokens[layer] for update in updates]) > 0
        assert 1 < used_CE.sum() < used_CE.size
        for name in ("cosine", "conflict"):
            rows = result.diagnostics["experts"][layer][name]
            assert [[value is not None for value in row] for row in rows] == used_CE.tolist()


def one_expert(*trained, tokens=None, received=(0, 0)):
    """An adapter of one layer with one expert of two values, and a site for each trained value."""
    updates = [
        ClientUpdate(
            site=f"site-{i}",
            adapter={"l.experts.w": np.array([value], np.float32)},
            num_examples=1,
            expert_tokens={"l": np.array([1.0 if tokens is None else tokens[i]])},
        )
        for i, value in enumerate(trained)
    ]
    return {"l.experts.w": np.array([received], np.float32)}, updates


def test_paper_rule_by_hand():
    """Updates (3, 4) with 4 tokens and (0, -5) with 1, both of length 5: importances 20 and 5, weights .8 and .2.

    g = .8 (3, 4) + .2 (0, -5) = (2.4, 2.2), ||g||^2 = 10.6; <(0, -5), g> = -11 is a conflict.
    s = .2 * 11 / 10.6, and from (1, 1) the expert goes to (1, 1) + (1 + s) g.
    """
    adapter, updates = one_expert((4, 5), (1, -4), tokens=(4, 1), received=(1, 1))
    result = FcMoe().aggregate(adapter, {}, updates)
    scale = 1 + 2.2 / 10.6
    np.testing.assert_allclose(result.adapter["l.experts.w"], [[1 + 2.4 * scale, 1 + 2.2 * scale]], rtol=1e-6)
    found = result.diagnostics["experts"]["l"]
    assert found["sites"] == ["site-0", "site-1"]
    assert found["tokens"] == [[4], [1]]
    assert found["conflict"] == [[0], [1]]
    np.testing.assert_allclose(found["weight"], [[0.8], [0.2]])
    np.testing.assert_allclose(found["scale"], [scale])
    length = 5 * np.sqrt(10.6)
    np.testing.assert_allclose(found["cosine"], [[(7.2 + 8.8) / length], [-11 / length]])


def test_ablations_by_hand():
    """The same updates: without projection g itself; uniform weights give (1.5, -.5) and no conflict with (3, 4).

    There <(3, 4), g> = 2.5 and <(0, -5), g> = 2.5.
    """
    adapter, updates = one_expert((3, 4), (0, -5), tokens=(4, 1))
    unprojected = FcMoe(conflict=ConflictConfig(against=Against.off)).aggregate(adapter, {}, updates)
    np.testing.assert_allclose(unprojected.adapter["l.experts.w"], [[2.4, 2.2]], rtol=1e-6)
    uniform = FcMoe(importance=Importance.uniform).aggregate(adapter, {}, updates)
    np.testing.assert_allclose(uniform.adapter["l.experts.w"], [[1.5, -0.5]], rtol=1e-6)
    by_examples = [replace(updates[0], num_examples=3), updates[1]]
    weighted = FcMoe(importance=Importance.examples, conflict=ConflictConfig(against=Against.off))
    np.testing.assert_allclose(weighted.aggregate(adapter, {}, by_examples).adapter["l.experts.w"], [[2.25, 1.75]])


@LORA_AND_FULL
@pytest.mark.parametrize(
    ("importance", "same"),
    [(Importance.tokens, FedAvg(weights=Weights.tokens)), (Importance.examples, FedMoe())],
    ids=["tokens", "examples"],
)
def test_importance_without_conflicts_is_a_mean_that_has_a_name(importance, same, shapes):
    """Weights of tokens alone are FedAvg's by tokens, those of the examples of who used the expert are FedMoE's."""
    adapter, updates = random_round(11, shapes)
    ours = FcMoe(importance=importance, conflict=ConflictConfig(against=Against.off))
    stepped, named = (strategy.aggregate(adapter, {}, updates).adapter for strategy in (ours, same))
    of_experts = [
        {name: arrays[name] for name in filter(experts.is_expert_array, adapter)} for arrays in (stepped, named)
    ]
    assert_same(*of_experts)


@LORA_AND_FULL
@pytest.mark.parametrize("against", Against)
def test_expert_nobody_used_keeps_its_value_to_the_bit(shapes, against):
    adapter, updates = random_round(3, shapes)
    result = FcMoe(conflict=ConflictConfig(against=against)).aggregate(adapter, {}, updates)
    for name in filter(experts.is_expert_array, adapter):
        np.testing.assert_array_equal(result.adapter[name][0], adapter[name][0])
        assert not np.array_equal(result.adapter[name][1], adapter[name][1])
    for found in result.diagnostics["experts"].values():
        assert [row[0] for row in found["cosine"]] == [None] * 4
        assert [row[0] for row in found["weight"]] == [0] * 4
        assert found["scale"][0] is None


@LORA_AND_FULL
def test_expert_one_site_used_becomes_that_sites(shapes):
    adapter, updates = random_round(3, shapes)
    result = FcMoe().aggregate(adapter, {}, updates)
    for name in filter(experts.is_expert_array, adapter):
        np.testing.assert_allclose(result.adapter[name][1], updates[1].adapter[name][1], rtol=1e-6)


@LORA_AND_FULL
def test_one_site_is_that_site_where_it_used_the_experts(shapes):
    adapter, updates = random_round(3, shapes)
    used = {layer: np.ones(NUM_EXPERTS) for layer in LAYERS}
    result = FcMoe().aggregate(adapter, {}, [replace(updates[0], expert_tokens=used)])
    assert_same(result.adapter, updates[0].adapter, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=seeds)
def test_projection_only_rescales_the_weighted_mean(seed):
    """sum_i w_i d_i^proj = (1 + s) g: the printed rule and its ablation differ by the scale that is reported."""
    adapter, updates = random_round(seed, LORA)
    projected = FcMoe().aggregate(adapter, {}, updates)
    plain = FcMoe(conflict=ConflictConfig(against=Against.off)).aggregate(adapter, {}, updates).adapter
    for layer, arrays in experts.by_layer(adapter).items():
        scale = projected.diagnostics["experts"][layer]["scale"]
        for e in range(1, NUM_EXPERTS):
            if scale[e] is not None and scale[e] < 10:
                assert scale[e] >= 1 - 1e-12
                for name in arrays:
                    expected = adapter[name][e] + scale[e] * (plain[name][e] - adapter[name][e])
                    np.testing.assert_allclose(projected.adapter[name][e], expected, atol=1e-5)


@LORA_AND_FULL
def test_sites_by_another_order_change_nothing_but_rounding(shapes):
    adapter, updates = random_round(5, shapes)
    forward, backward = (FcMoe().aggregate(adapter, {}, order).adapter for order in (updates, updates[::-1]))
    assert_same(forward, backward)


def test_dense_model_is_fedavg_exactly():
    adapter, updates = random_round(0, {})
    dense = [replace(update, expert_tokens={}) for update in updates]
    result = FcMoe().aggregate(adapter, {}, dense)
    expected = FedAvg().aggregate(adapter, {}, dense)
    assert result.diagnostics == {"experts": {}}
    for name in adapter:
        np.testing.assert_array_equal(result.adapter[name], expected.adapter[name])


def test_ranges_of_experts_give_the_same_as_all_at_once(monkeypatch):
    adapter, updates = random_round(2, LORA)
    at_once = FcMoe().aggregate(adapter, {}, updates)
    one_by_one = [slice(e, e + 1) for e in range(NUM_EXPERTS)]
    monkeypatch.setattr("strategies.fc_moe.experts.expert_slices", lambda *_: one_by_one)
    apart = FcMoe().aggregate(adapter, {}, updates)
    assert_same(at_once.adapter, apart.adapter, atol=1e-7)
    assert at_once.diagnostics["experts"].keys() == apart.diagnostics["experts"].keys()
    np.testing.assert_allclose(
        at_once.diagnostics["experts"][LAYERS[0]]["weight"], apart.diagnostics["experts"][LAYERS[0]]["weight"]
    )


@pytest.mark.parametrize(
    ("conflict", "message"),
    [
        (
            ConflictConfig(space=Space.product),
            "strategy.conflict.space=product needs model.experts=lora, but .* is a whole",
        ),
        (
            ConflictConfig(granularity=Granularity.component),
            "strategy.conflict.granularity=component needs model.experts=lora",
        ),
    ],
)
def test_whole_experts_have_neither_products_nor_ranks(conflict, message):
    adapter, _ = random_round(0, FULL)
    with pytest.raises(ValueError, match=message):
        FcMoe(conflict=conflict).init_state(adapter)
    assert FcMoe(conflict=conflict).init_state(random_round(0, LORA)[0]) == {}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({LAYERS[0]: np.ones(NUM_EXPERTS)}, "expert_tokens lacks model.layers.1.mlp"),
        (
            {layer: np.ones(3) for layer in LAYERS},
            r"expert_tokens\[model.layers.0.mlp\] must have the shape \(4,\), got \(3,\)",
        ),
    ],
)
def test_update_without_the_counts_of_every_expert_is_refused(tokens, message):
    adapter, updates = random_round(0, LORA)
    FcMoe().check_update(adapter, updates[0])
    with pytest.raises(ValueError, match=message):
        FcMoe().check_update(adapter, replace(updates[0], expert_tokens=tokens))


def attention_round(seed):
    """Two LoRA pairs on attention and a router, from three sites, and no expert."""
    generator = np.random.default_rng(seed)
    shapes = {f"l.self_attn.{p}_proj.lora_{end}": shape for p in "qv" for end, shape in (("A", (2, 5)), ("B", (4, 2)))}
    shapes["l.gate.weight"] = (3, 5)

    def draw():
        return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    return draw(), [
        ClientUpdate(site=f"site-{i}", adapter=draw(), num_examples=int(generator.integers(1, 9))) for i in range(3)
    ]


def as_expert(name):
    return name.replace(".lora", ".experts.w.lora")


@pytest.mark.parametrize(
    "strategy",
    [
        FcMoe(attention=Attention.as_experts),
        FcMoe(attention=Attention.as_experts, conflict=ConflictConfig(space=Space.product)),
        FcMoePlus(attention=Attention.as_experts),
    ],
    ids=["factors", "product", "plus"],
)
def test_attention_steps_as_if_each_projection_were_a_layer_of_one_expert(strategy):
    adapter, updates = attention_round(3)
    found = strategy.aggregate(adapter, {}, updates)
    renamed, renamed_updates = (
        {as_expert(name): array[None] for name, array in adapter.items() if name != "l.gate.weight"},
        [
            ClientUpdate(
                site=update.site,
                adapter={
                    as_expert(name): array[None] for name, array in update.adapter.items() if name != "l.gate.weight"
                },
                num_examples=update.num_examples,
                expert_tokens={f"l.self_attn.{p}_proj": np.array([float(update.num_examples)]) for p in "qv"},
            )
            for update in updates
        ],
    )
    expected = strategy.aggregate(renamed, {}, renamed_updates)
    for name, array in found.adapter.items():
        if name != "l.gate.weight":
            np.testing.assert_array_equal(array, expected.adapter[as_expert(name)][0])
    later = strategy.aggregate(found.adapter, found.state, updates).adapter  # with what a rule remembers
    expected_later = strategy.aggregate(expected.adapter, expected.state, renamed_updates).adapter
    for name in expected_later:
        np.testing.assert_array_equal(later[name.replace(".experts.w.", ".")], expected_later[name][0])
    assert found.diagnostics["attention"] == expected.diagnostics["experts"]
    assert found.diagnostics["experts"] == {}
    averaged = FedAvg().aggregate(adapter, {}, updates).adapter
    np.testing.assert_array_equal(found.adapter["l.gate.weight"], averaged["l.gate.weight"])
    assert any(not np.allclose(found.adapter[name], averaged[name]) for name in averaged)


def test_attention_without_conflicts_to_resolve_is_fedavgs():
    adapter, updates = attention_round(4)
    strategy = FcMoe(
        attention=Attention.as_experts, importance=Importance.examples, conflict=ConflictConfig(against=Against.off)
    )
    assert_same(strategy.aggregate(adapter, {}, updates).adapter, FedAvg().aggregate(adapter, {}, updates).adapter)
