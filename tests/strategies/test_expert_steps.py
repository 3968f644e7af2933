"""Steps in the space of products, through FC-MoE: dense products, projected as in the paper, then truncated.

Steps in the space of factors are those of test_fc_moe.py.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.adapters import NotFiniteError
from strategies.base import ClientUpdate
from strategies.conflicts import Against, ConflictConfig, Granularity, Space
from strategies.experts import is_expert_array
from strategies.fc_moe import FcMoe, Importance
from strategies.fc_moe_plus import FcMoePlus
from tests.strategies.naive_fc_moe import LAYERS, LORA, NUM_EXPERTS, naive_importance, naive_projection, random_round

seeds = st.integers(0, 2**32 - 1)


def products_of(arrays, layer, expert):
    """Dense B A of both projections of one expert."""
    parts = [
        [arrays[f"{layer}.experts.{p}.lora_{ab}"][expert].astype(float) for ab in "BA"]
        for p in ("down_proj", "gate_up_proj")
    ]
    return [b @ a for b, a in parts]


def naive_product_step(strategy, adapter, updates, layer, expert):
    """The dense next products of one expert, before and after truncation; None if nobody used it."""
    before = products_of(adapter, layer, expert)
    changes = [
        [new - old for new, old in zip(products_of(u.adapter, layer, expert), before, strict=True)] for u in updates
    ]
    flat = [np.concatenate([change.ravel() for change in both]) for both in changes]
    importance = [naive_importance(strategy, u, layer, expert, vector) for u, vector in zip(updates, flat, strict=True)]
    if sum(importance) == 0:
        return None
    weights = np.array(importance) / sum(importance)
    parts = (
        [flat]
        if strategy.conflict.granularity is Granularity.expert
        else [[c[p].ravel() for c in changes] for p in (0, 1)]
    )
    steps = np.concatenate(
        [
            sum(
                w * naive_projection(i, vectors, weights, strategy.conflict.against)
                for i, w in enumerate(weights)
                if w > 0
            )
            for vectors in parts
        ]
    )
    steps = np.split(steps, [before[0].size])
    full = [old + step.reshape(old.shape) for old, step in zip(before, steps, strict=True)]
    left, values, right = zip(*[np.linalg.svd(product, full_matrices=False) for product in full], strict=True)
    kept = [(u[:, :2] * s[:2]) @ v[:2] for u, s, v in zip(left, values, right, strict=True)]
    return kept, max((s[2:] ** 2).sum() / (s**2).sum() for s in values)


def in_products(importance=Importance.paper, **conflict):
    return FcMoe(importance=importance, conflict=ConflictConfig(space=Space.product, **conflict))


def assert_dense(strategy, adapter, updates):
    """Every expert is where the naive step takes it."""
    result = strategy.aggregate(adapter, {}, updates)
    for layer in LAYERS:
        lost = result.diagnostics["experts"][layer]["lost_energy"]
        for expert in range(NUM_EXPERTS):
            expected = naive_product_step(strategy, adapter, updates, layer, expert)
            if expected is None:
                assert lost[expert] is None
                continue
            for ours, dense in zip(products_of(result.adapter, layer, expert), expected[0], strict=True):
                np.testing.assert_allclose(ours, dense, atol=1e-4 * max(1, abs(dense).max()))
            np.testing.assert_allclose(lost[expert], expected[1], atol=1e-6)
    return result


@pytest.mark.parametrize("granularity", [Granularity.expert, Granularity.matrix])
@pytest.mark.parametrize("against", Against)
@settings(deadline=None, max_examples=8)
@given(seed=seeds)
def test_product_space_is_the_dense_one_truncated(granularity, against, seed):
    adapter, updates = random_round(seed, LORA)
    assert_dense(in_products(granularity=granularity, against=against), adapter, updates)


@pytest.mark.parametrize("importance", Importance)
@pytest.mark.parametrize("against", [Against.consensus, Against.pairwise])
def test_every_importance_is_the_dense_one_in_products(importance, against):
    adapter, updates = random_round(5, LORA)
    assert_dense(in_products(importance, against=against), adapter, updates)


def test_product_space_by_hand():
    """Rank 1, A = (1, 0) at both sites; B A goes from 1 to 3 and from 1 to 5, with equal weights to 4.

    The factors' own mean would be the same here; the new A is a unit row, so the new B is 4.
    """
    name = "l.experts.w.lora_"
    A = np.array([[[1, 0]]], np.float32)
    adapter = {f"{name}A": A, f"{name}B": np.ones((1, 1, 1), np.float32)}
    updates = [
        ClientUpdate(
            site=site,
            adapter={f"{name}A": A, f"{name}B": np.full((1, 1, 1), value, np.float32)},
            num_examples=1,
            expert_tokens={"l": np.ones(1)},
        )
        for site, value in (("a", 3), ("b", 5))
    ]
    strategy = FcMoe(importance=Importance.uniform, conflict=ConflictConfig(space=Space.product))
    result = strategy.aggregate(adapter, {}, updates)
    np.testing.assert_allclose(result.adapter[f"{name}A"], A, atol=1e-6)
    np.testing.assert_allclose(result.adapter[f"{name}B"], [[[4]]], rtol=1e-6)
    assert result.diagnostics["experts"]["l"]["lost_energy"] == [pytest.approx(0, abs=1e-12)]


def test_product_space_with_one_site_is_that_sites_product():
    adapter, updates = random_round(4, LORA)
    used = replace(updates[0], expert_tokens={layer: np.ones(NUM_EXPERTS) for layer in LAYERS})
    result = FcMoe(conflict=ConflictConfig(space=Space.product)).aggregate(adapter, {}, [used])
    for layer in LAYERS:
        for expert in range(NUM_EXPERTS):
            both = zip(
                products_of(result.adapter, layer, expert), products_of(used.adapter, layer, expert), strict=True
            )
            for ours, theirs in both:
                np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("strategy", [FcMoe(conflict=ConflictConfig(space=Space.product)), FcMoePlus()])
def test_small_step_leaves_a_where_it_was(strategy):
    """Factors of one product are as many as rotations: the one nearest to what was received is taken."""
    rng = np.random.default_rng(0)
    name = "l.experts.w.lora_"
    A = np.linalg.qr(rng.normal(size=(12, 3)))[0].T[None].astype(np.float32)
    adapter = {f"{name}A": A, f"{name}B": rng.normal(size=(1, 9, 3)).astype(np.float32)}
    updates = [
        ClientUpdate(
            site=site,
            adapter={
                key: (array + 1e-4 * rng.normal(size=array.shape)).astype(np.float32) for key, array in adapter.items()
            },
            num_examples=1,
            expert_tokens={"l": np.ones(1)},
        )
        for site in "ab"
    ]
    stepped = strategy.aggregate(adapter, strategy.init_state(adapter), updates).adapter
    for key, array in adapter.items():
        assert 0 < abs(stepped[key] - array).max() < 2e-3


@pytest.mark.parametrize(
    ("strategy", "is_refused"),
    [(FcMoe(conflict=ConflictConfig(space=Space.product)), True), (FcMoePlus(), True), (FcMoe(), False),
     (FcMoePlus(space=Space.factors), False)],
)  # fmt: skip
def test_product_too_long_for_one_factor_is_refused_where_products_step(strategy, is_refused):
    """All of its length is in B after such a step: of one site's factors, each within bounds, no adapter came of it."""
    received, updates = random_round(0, LORA)
    adapter, trained = (
        {name: array for name, array in arrays.items() if is_expert_array(name)}
        for arrays in (received, updates[0].adapter)
    )
    strategy.check_update(adapter, replace(updates[0], adapter=trained))
    long = replace(updates[0], adapter={name: np.float32(1e4) * array for name, array in trained.items()})
    if not is_refused:
        strategy.check_update(adapter, long)
        return
    with pytest.raises(
        NotFiniteError, match=r"model.layers.0.mlp.experts.down_proj: \|\|A\|\| \|\|B\|\| is .* at most 1e\+06"
    ):
        strategy.check_update(adapter, long)


def round_from_zero(seed, unmoved):
    """A first round: B = 0 in what is received, and still 0 at the sites ``unmoved``, although they move A."""
    adapter, updates = random_round(seed, LORA)
    zeroed = [adapter, *(updates[site].adapter for site in unmoved)]
    for name in adapter:
        if is_expert_array(name) and name.endswith("lora_B"):
            for arrays in zeroed:
                arrays[name][...] = 0
    return adapter, updates


def assert_finite(result):
    assert all(np.isfinite(array).all() for array in result.adapter.values())
    json.dumps(result.diagnostics, allow_nan=False)


@pytest.mark.parametrize("granularity", [Granularity.expert, Granularity.matrix])
@pytest.mark.parametrize("against", Against)
@pytest.mark.parametrize("unmoved", [(), (1,), (0, 2)])
def test_first_round_from_a_product_of_zero_is_the_dense_one(granularity, against, unmoved):
    """Who leaves the product at 0 has no update, so no say by Eq. 1, however many tokens it routed."""
    adapter, updates = round_from_zero(2, unmoved)
    result = assert_dense(in_products(granularity=granularity, against=against), adapter, updates)
    assert_finite(result)
    for layer in LAYERS:
        weights_CE = np.array(result.diagnostics["experts"][layer]["weight"])
        assert [bool(weights_E.any()) for weights_E in weights_CE] == [site not in unmoved for site in range(4)]


@pytest.mark.parametrize("importance", Importance)
def test_product_that_every_site_leaves_at_zero_stays_there_and_can_still_learn(importance):
    """B = 0 and A of full rank, as in fresh LoRA. By Eq. 1 nobody used the expert, so that A is the received one."""
    adapter, updates = round_from_zero(2, range(4))
    result = in_products(importance).aggregate(adapter, {}, updates)
    assert_finite(result)
    for layer in LAYERS:
        of_used = None if importance is Importance.paper else 0
        assert result.diagnostics["experts"][layer]["lost_energy"] == [None, of_used, of_used, of_used]
    for name in filter(is_expert_array, adapter):
        if name.endswith("lora_B"):
            np.testing.assert_array_equal(result.adapter[name], 0)
            continue
        assert (np.linalg.matrix_rank(result.adapter[name]) == 2).all()
        if importance is Importance.paper:
            np.testing.assert_array_equal(result.adapter[name], adapter[name])
