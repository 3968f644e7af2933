"""FC-MoE plus against a dense version of it, and by what it must reduce to.

Its parts are those of test_equal_say.py and test_flatten.py; how far it goes is in test_agreement.py.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from strategies import experts
from strategies.base import ClientUpdate
from strategies.conflicts import Space
from strategies.expert_rounds import Attention
from strategies.fc_moe import FcMoe
from strategies.fc_moe_plus import FcMoePlus
from strategies.fedavg import FedAvg
from strategies.fedmoe import FedMoe
from tests.strategies.naive_fc_moe import FULL, LAYERS, LORA, NUM_EXPERTS, assert_same, random_round
from tests.strategies.naive_fc_moe_plus import assert_dense, naive_pair_cosine, naive_whole, parts_of
from tests.strategies.test_expert_steps import products_of

seeds = st.integers(0, 2**32 - 1)
LORA_AND_FULL = pytest.mark.parametrize("shapes", [LORA, FULL], ids=["lora", "full"])
PLAIN = FcMoePlus(step=1.0, flatten=0.0)
RANK = 2
THIN = {
    "gate_up_proj.lora_A": (1, 6),
    "gate_up_proj.lora_B": (7, 1),
    "down_proj.lora_A": (1, 5),
    "down_proj.lora_B": (6, 1),
}
WIDE = {
    "gate_up_proj.lora_A": (2, 30),
    "gate_up_proj.lora_B": (40, 2),
    "down_proj.lora_A": (2, 20),
    "down_proj.lora_B": (30, 2),
}


CASES = [
    pytest.param(shapes, strategy, id=f"{kind}-{strategy}")
    for kind, shapes in (("lora", LORA), ("thin", THIN), ("wide", WIDE), ("full", FULL))
    for strategy in (
        FcMoePlus(),
        PLAIN,
        FcMoePlus(flatten=0.5, ridge=2.0, step=0.5, momentum=0.0),
        FcMoePlus(space=Space.factors),
        FcMoePlus(ridge=None),
        FcMoePlus(agreement=None),
    )
]


@pytest.mark.parametrize(("shapes", "strategy"), CASES)
def test_rule_is_the_dense_one(shapes, strategy):
    """After a round in which sites had a little in common, so that each knob is neither whole nor least."""
    adapter, updates = random_round(11, shapes)
    last = strategy.aggregate(random_round(12, shapes)[0], {}, updates)
    adapter = {name: array + 0.3 * last.adapter[name] for name, array in adapter.items()}
    previous = {name.removeprefix("previous/"): array for name, array in last.state.items() if name != "pair_cosine"}
    result = strategy.aggregate(adapter, {**last.state, "pair_cosine": np.array([0.06])}, updates)
    assert strategy.agreement is None or 0.25 < naive_whole(strategy, 0.06, len(updates), 2) < 1
    assert_dense(result, strategy, adapter, previous or adapter, updates, 0.06)


@pytest.mark.parametrize(("shapes", "strategy"), CASES)
def test_rounds_of_other_sites_each_time_are_the_dense_ones(shapes, strategy):
    """Momentum is the server's: the change of the round before, whoever trained then.

    Only site 1 uses expert 1: it moves in the first round, rests in the second to the bit, starts again in the third
    without momentum, since its last change was 0, and goes on with it in the fourth. In these draws sums of changes
    neither cancel nor depend on each other nearly: there float32 loses digits (change_span.py).
    """
    adapter = previous = random_round(20, shapes)[0]
    state, pairs = strategy.init_state(adapter), None
    for number, asked in enumerate([(0, 1), (2, 3, 4), (1, 3), (1,)]):
        begun, trained = random_round(100 + number, shapes, num_sites=5)
        updates = [
            replace(
                trained[site],
                adapter={name: array + trained[site].adapter[name] - begun[name] for name, array in adapter.items()},
                num_examples=1 + 4 * site,
            )
            for site in asked
        ]
        result = strategy.aggregate(adapter, state, updates)
        assert_dense(result, strategy, adapter, previous, updates, pairs)
        found = naive_pair_cosine(strategy, adapter, updates)
        pairs = pairs if found is None else found
        rests = [np.array_equal(result.adapter[n][1], adapter[n][1]) for n in filter(experts.is_expert_array, adapter)]
        assert rests == [number == 1] * len(rests)
        previous, adapter, state = adapter, result.adapter, result.state


@LORA_AND_FULL
def test_everything_but_experts_is_averaged_as_by_fedavg(shapes):
    adapter, updates = random_round(1, shapes)
    ours = FcMoePlus().aggregate(adapter, {}, updates).adapter
    plain = FedAvg().aggregate(adapter, {}, updates).adapter
    assert ours.keys() == adapter.keys()
    for name in adapter:
        if not experts.is_expert_array(name):
            np.testing.assert_array_equal(ours[name], plain[name])


@LORA_AND_FULL
def test_expert_nobody_used_keeps_its_value_to_the_bit(shapes):
    adapter, updates = random_round(3, shapes)
    result = FcMoePlus().aggregate(adapter, {}, updates)
    for name in filter(experts.is_expert_array, adapter):
        np.testing.assert_array_equal(result.adapter[name][0], adapter[name][0])
        assert not np.array_equal(result.adapter[name][1], adapter[name][1])


@LORA_AND_FULL
@pytest.mark.parametrize("step", [1.0, 7.0])
def test_expert_that_one_site_used_becomes_that_sites_whatever_the_step(shapes, step):
    adapter, updates = random_round(3, shapes)
    strategy = FcMoePlus(step=step, flatten=0.0)
    result = strategy.aggregate(adapter, {}, updates)
    for layer in LAYERS:
        ours, theirs = (parts_of(arrays, layer, 1, strategy) for arrays in (result.adapter, updates[1].adapter))
        for part, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(part, expected, atol=1e-5)


def test_expert_goes_on_as_it_went_and_rests_when_nobody_used_it():
    """Heavy ball (Polyak, 1964): of one site's expert, its own change and a quarter of the last one."""
    adapter, updates = random_round(3, FULL)
    earlier = {name: array - np.float32(0.5) for name, array in adapter.items()}
    strategy = FcMoePlus(flatten=0.0, momentum=0.25, agreement=None)
    state = {f"previous/{name}": array for name, array in earlier.items() if experts.is_expert_array(name)}
    result = strategy.aggregate(adapter, state, updates)
    for name in filter(experts.is_expert_array, adapter):
        np.testing.assert_array_equal(result.adapter[name][0], adapter[name][0])
        np.testing.assert_allclose(result.adapter[name][1], updates[1].adapter[name][1] + 0.125, atol=1e-5)
        np.testing.assert_array_equal(result.state[f"previous/{name}"], adapter[name])
    assert result.state.keys() == state.keys()
    assert FcMoePlus(momentum=0.0, agreement=None).aggregate(adapter, {}, updates).state == {}


@LORA_AND_FULL
def test_sites_that_all_send_the_same_get_fedavgs_step(shapes):
    adapter, updates = random_round(4, shapes)
    used = {layer: np.ones(NUM_EXPERTS) for layer in LAYERS}
    same = [replace(update, adapter=updates[0].adapter, expert_tokens=used) for update in updates]
    ours = FcMoePlus(flatten=0.0).aggregate(adapter, {}, same).adapter
    plain = FedAvg().aggregate(adapter, {}, same).adapter
    for layer in LAYERS:
        for e in range(NUM_EXPERTS):
            for part, expected in zip(*(parts_of(a, layer, e, PLAIN) for a in (ours, plain)), strict=True):
                np.testing.assert_allclose(part, expected, atol=1e-4)


def test_without_an_equal_say_and_all_else_whole_experts_are_those_of_fedmoe():
    """The mean by examples over the sites that used the expert, and nothing more; with the equal say it is not."""
    adapter, updates = random_round(7, FULL)
    bare = FcMoePlus(ridge=None, step=1.0, flatten=0.0, momentum=0.0, agreement=None)
    fedmoe, ours, equal = (
        {name: array for name, array in found.items() if experts.is_expert_array(name)}
        for found in (s.aggregate(adapter, {}, updates).adapter for s in (FedMoe(), bare, replace(bare, ridge=0.3)))
    )
    assert_same(ours, fedmoe, atol=1e-5)
    assert max(abs(equal[name] - fedmoe[name]).max() for name in fedmoe) > 0.01


@pytest.mark.parametrize("shapes", [LORA, WIDE, FULL], ids=["lora", "wide", "full"])
@pytest.mark.parametrize("strategy", [PLAIN, FcMoePlus()], ids=["plain", "shipped"])
@settings(deadline=None, max_examples=10)
@example(seed=154141)  # two sites that are exactly opposed
@given(seed=seeds)
def test_order_of_the_sites_changes_nothing_but_rounding(shapes, strategy, seed):
    adapter, updates = random_round(seed, shapes)
    order = np.random.default_rng(seed).permutation(len(updates))
    one, other = (strategy.aggregate(adapter, {}, us) for us in (updates, [updates[i] for i in order]))
    for layer in LAYERS:
        for name in ("weight", "cosine", "tokens"):
            left, right = (np.array(r.diagnostics["experts"][layer][name], float) for r in (one, other))
            np.testing.assert_allclose(left[order], right, atol=1e-6)
    if shapes is FULL:
        assert_same(one.adapter, other.adapter)
        return
    for layer, e in itertools.product(LAYERS, range(NUM_EXPERTS)):
        for left, right in zip(*(products_of(r.adapter, layer, e) for r in (one, other)), strict=True):
            # Directions of less than sqrt(1e-5) of a basis vector's length may be in one basis and not in the other:
            # seldom, and only where matrices are narrower than their bases.
            np.testing.assert_allclose(left, right, atol=(1e-4 if shapes is WIDE else 0.1) * abs(left).max())


def test_another_basis_of_the_factors_gives_the_same_products():
    """(A, B) -> (Q A, B Q^-1), with one Q for the received adapter and all sites: they start from it."""
    adapter, updates = random_round(6, WIDE)
    rng = np.random.default_rng(0)
    Q = {name[:-7]: np.eye(RANK) + 0.3 * rng.normal(size=(RANK, RANK)) for name in adapter if ".experts." in name}

    def turned(arrays):
        turned = dict(arrays)
        for prefix, basis in Q.items():
            turned[f"{prefix}.lora_A"] = (basis @ arrays[f"{prefix}.lora_A"]).astype(np.float32)
            turned[f"{prefix}.lora_B"] = (arrays[f"{prefix}.lora_B"] @ np.linalg.inv(basis)).astype(np.float32)
        return turned

    plain = FcMoePlus().aggregate(adapter, {}, updates)
    other = FcMoePlus().aggregate(turned(adapter), {}, [replace(u, adapter=turned(u.adapter)) for u in updates])
    for layer in LAYERS:
        for e in range(1, NUM_EXPERTS):
            pairs = zip(*(products_of(r.adapter, layer, e) for r in (plain, other)), strict=True)
            for left, right in pairs:
                np.testing.assert_allclose(left, right, atol=1e-3)


ALL_IN_COMMON = {"pair_cosine": np.ones(1)}
"""State after a round in which the sites agreed: each knob is taken whole."""


def test_whole_experts_step_has_a_flat_spectrum():
    adapter, updates = random_round(8, FULL)
    result = FcMoePlus().aggregate(adapter, ALL_IN_COMMON, updates)
    plain = FcMoePlus(flatten=0.0).aggregate(adapter, ALL_IN_COMMON, updates)
    for name in (f"{LAYERS[0]}.experts.{end}" for end in ("gate_up_proj", "down_proj")):
        for e in range(1, NUM_EXPERTS):
            flat, step = (r.adapter[name][e].astype(float) - adapter[name][e] for r in (result, plain))
            sizes = np.linalg.svd(flat, compute_uv=False)
            np.testing.assert_allclose(sizes, sizes[0], rtol=1e-4)
            np.testing.assert_allclose(np.linalg.norm(flat), np.linalg.norm(step), rtol=1e-4)


def fresh_lora(seed):
    """A round from B = 0, as LoRA starts."""
    adapter, updates = random_round(seed, LORA)
    for name in adapter:
        if name.endswith("lora_B"):
            adapter[name] = np.zeros_like(adapter[name])
    return adapter, updates


def test_step_of_lora_from_nothing_has_a_flat_spectrum():
    adapter, updates = fresh_lora(8)
    result = FcMoePlus().aggregate(adapter, ALL_IN_COMMON, updates)
    for layer in LAYERS:
        for product in products_of(result.adapter, layer, 2):
            sizes = np.linalg.svd(product, compute_uv=False)
            np.testing.assert_allclose(sizes[:RANK], sizes[0], rtol=1e-4)
            np.testing.assert_allclose(sizes[RANK:], 0, atol=1e-5)


@pytest.mark.parametrize("learnt", [0, 1])
def test_direction_in_which_nothing_was_learnt_can_still_be_trained(learnt):
    """From B = 0 the sites learn 0 or 1 of 2 directions of an expert: the others need rows of A that are not 0."""
    adapter, updates = random_round(8, WIDE)
    for arrays in (adapter, *(update.adapter for update in updates)):
        for name in filter(experts.is_expert_array, adapter):
            if name.endswith("lora_B"):
                arrays[name][..., learnt:] = 0
                arrays[name][...] *= arrays is not adapter
    result = FcMoePlus().aggregate(adapter, {}, updates).adapter
    for name in filter(experts.is_expert_array, adapter):
        if name.endswith("lora_A"):
            sizes = np.linalg.svd(result[name][1:], compute_uv=False)
            assert (sizes[:, -1] > 0.5).all(), name


def test_unchanged_updates_change_nothing():
    for shapes in (LORA, FULL):
        adapter, updates = random_round(0, shapes)
        idle = [replace(update, adapter=adapter) for update in updates]
        assert_same(FcMoePlus().aggregate(adapter, {}, idle).adapter, adapter)


@LORA_AND_FULL
def test_diagnostics_are_called_as_those_of_fc_moe(shapes):
    adapter, updates = random_round(3, shapes)
    found, printed = (s.aggregate(adapter, {}, updates).diagnostics["experts"] for s in (FcMoePlus(), FcMoe()))
    for layer in LAYERS:
        assert printed[layer].keys() <= found[layer].keys()
        assert found[layer]["tokens"] == printed[layer]["tokens"]
        assert np.array(found[layer]["cosine"]).shape == (len(updates), NUM_EXPERTS)
        assert [row[0] for row in found[layer]["cosine"]] == [None] * len(updates)
        assert found[layer]["scale"][0] is None
        np.testing.assert_allclose(np.sum(found[layer]["weight"], axis=0)[1:], 1)


@LORA_AND_FULL
def test_ranges_of_experts_give_the_same_as_all_at_once(monkeypatch, shapes):
    """Momentum, too, is that of the range's own experts."""
    adapter, updates = random_round(2, shapes)
    state = FcMoePlus().init_state(random_round(5, shapes)[0]) | {"pair_cosine": np.array([0.02])}
    at_once = FcMoePlus().aggregate(adapter, state, updates)
    monkeypatch.setattr(experts, "expert_slices", lambda *_: [slice(e, e + 1) for e in range(NUM_EXPERTS)])
    apart = FcMoePlus().aggregate(adapter, state, updates)
    assert_same(at_once.adapter, apart.adapter, atol=1e-5)


def test_inputs_stay_as_they_were():
    adapter, updates = random_round(2, LORA)
    copies = [{name: array.copy() for name, array in arrays.items()} for arrays in (adapter, updates[0].adapter)]
    FcMoePlus().aggregate(adapter, {}, updates)
    for before, after in zip(copies, (adapter, updates[0].adapter), strict=True):
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array)


def test_update_without_the_counts_of_every_expert_is_refused():
    adapter, updates = random_round(0, LORA)
    with pytest.raises(ValueError, match="expert_tokens lacks model.layers.1.mlp"):
        FcMoePlus().check_update(adapter, replace(updates[0], expert_tokens={LAYERS[0]: np.ones(NUM_EXPERTS)}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, r"strategy.ridge must be null or > 0, got 0.0"),
        ({"step": 0.0}, r"strategy.step must be > 0, got 0.0"),
        ({"step": float("inf")}, r"strategy.step must be > 0, got inf"),
        ({"momentum": 1.0}, r"strategy.momentum must be in \[0, 1\), got 1.0"),
        ({"agreement": 0.0}, r"strategy.agreement must be null or > 0, got 0.0"),
        ({"agreement": float("inf")}, r"strategy.agreement must be null or > 0, got inf"),
        ({"flatten": 1.5}, r"strategy.flatten must be in \[0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FcMoePlus(**settings)


def test_expert_whose_steps_cancel_before_it_learnt_anything_can_still_learn():
    """B = 0, and two sites send b and -b: the product stays 0, but A must not become 0 as well."""
    adapter, updates = random_round(0, LORA, num_sites=2)
    for name, array in adapter.items():
        if name.endswith("lora_B"):
            array[:] = 0
            updates[1].adapter[name][:] = -updates[0].adapter[name]
        elif name.endswith("lora_A"):
            for update in updates:
                update.adapter[name][:] = array
    same = [replace(u, num_examples=1, expert_tokens=dict.fromkeys(LAYERS, np.ones(NUM_EXPERTS))) for u in updates]
    stepped = FcMoePlus().aggregate(adapter, FcMoePlus().init_state(adapter), same).adapter
    for name in adapter:
        if experts.is_expert_array(name) and name.endswith("lora_B"):
            np.testing.assert_allclose(stepped[name], 0, atol=1e-6)
        elif experts.is_expert_array(name):
            assert (np.linalg.matrix_rank(stepped[name]) == RANK).all()


@pytest.mark.parametrize("size", [1e-3, 1e-5])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_few_examples_taught_is_not_drowned_in_rounding(kind, size):
    """Changes of rank 1 on weights of size 1: what float32 leaves beside them must not be raised to their size."""
    rng = np.random.default_rng(0)
    direction = np.outer(rng.choice([-1, 1], 64), rng.choice([-1, 1], 96))
    name = f"{LAYERS[0]}.experts.up_proj"
    if kind == "full":
        received = {name: rng.normal(size=(1, 64, 96)).astype(np.float32)}
        trained = [{name: (received[name] + size * s * direction).astype(np.float32)} for s in (1, 2, 3)]
    else:
        A, B = rng.normal(size=(1, 8, 96)).astype(np.float32), rng.normal(size=(1, 64, 8)).astype(np.float32)
        received = {f"{name}.lora_A": A, f"{name}.lora_B": B}
        changed = [(A + size * s * np.outer(rng.normal(size=8), direction[0])).astype(np.float32) for s in (1, 2, 3)]
        trained = [{f"{name}.lora_A": after, f"{name}.lora_B": B} for after in changed]
    tokens = {LAYERS[0]: np.ones(1)}
    updates = [
        ClientUpdate(site=f"{i}", adapter=t, num_examples=1, expert_tokens=tokens) for i, t in enumerate(trained)
    ]
    after = FcMoePlus(momentum=0.0).aggregate(received, ALL_IN_COMMON, updates).adapter

    def dense(arrays):
        whole = arrays.get(name)
        return (arrays[f"{name}.lora_B"] @ arrays[f"{name}.lora_A"] if whole is None else whole)[0].astype(float)

    step = dense(after) - dense(received)
    along = direction[0] / np.linalg.norm(direction[0])
    assert np.linalg.norm(step @ along) ** 2 > 0.8 * np.linalg.norm(step) ** 2


def test_state_holds_what_steps_alone():
    adapter = {
        f"{LAYERS[0]}.experts.up_proj": np.zeros((2, 3, 4), np.float32),
        f"{LAYERS[0]}.gate.weight": np.zeros((2, 4), np.float32),
        "model.layers.0.self_attn.q_proj.lora_A": np.zeros((2, 4), np.float32),
        "model.layers.0.self_attn.q_proj.lora_B": np.zeros((4, 2), np.float32),
    }
    names = [*adapter]
    assert FcMoePlus().init_state(adapter).keys() == {f"previous/{names[0]}"}
    of_all = FcMoePlus(attention=Attention.as_experts).init_state(adapter)
    assert of_all.keys() == {f"previous/{name}" for name in (names[0], *names[2:])}
