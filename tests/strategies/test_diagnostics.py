"""Diagnostics of a round against dense matrices formed one by one, and by what updates must show."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import experts
from strategies.base import Aggregation
from strategies.diagnostics import bytes_by_kind, kind_of, round_diagnostics
from strategies.fc_moe import FcMoe
from strategies.fedavg import FedAvg
from strategies.local_only import LocalOnly
from tests.strategies.naive_fc_moe import FULL, LAYERS, LORA, NUM_EXPERTS, random_round

QUERY = "model.layers.0.self_attn.q_proj"
ROUTER = "model.layers.0.mlp.gate.weight"


def a_round(seed, shapes, num_sites=4):
    """An adapter and updates of experts, of a whole router and of attention by LoRA."""
    adapter, updates = random_round(seed, shapes, num_sites)
    rng = np.random.default_rng(seed)
    for arrays in (adapter, *(update.adapter for update in updates)):
        arrays[f"{QUERY}.lora_B"] = rng.normal(size=(5, 2)).astype(np.float32)
    return adapter, updates


def expert_parts(adapter, block, expert):
    """Dense matrices, in float64, of one expert of a layer or of a kind of other arrays."""
    if block == "attention":
        return [adapter[f"{QUERY}.lora_B"].astype(np.float64) @ adapter[f"{QUERY}.lora_A"]]
    if block == "router":
        return [adapter[ROUTER].astype(np.float64)]
    arrays = {
        name: array[expert].astype(np.float64) for name, array in adapter.items() if name.startswith(f"{block}.experts")
    }
    pairs = [name.removesuffix(".lora_A") for name in arrays if name.endswith(".lora_A")]
    if not pairs:
        return list(arrays.values())
    return [arrays[f"{name}.lora_B"] @ arrays[f"{name}.lora_A"] for name in pairs]


def vector(adapter, block, expert):
    return np.concatenate([part.ravel() for part in expert_parts(adapter, block, expert)])


def naive(adapter, updates, after, block, expert, personal):
    """The diagnostics of one expert, each from its definition."""
    sites = {}
    for update in updates:
        before = vector(personal.get(update.site, adapter), block, expert)
        if block not in update.expert_tokens or update.expert_tokens[block][expert] > 0:
            sites[update.site] = vector(update.adapter, block, expert) - before
    step = vector(after, block, expert) - vector(adapter, block, expert)
    found = {"norm": np.linalg.norm(vector(after, block, expert)), "pairs": {}}
    if sites:
        mean = sum(sites.values()) / len(sites)
        others = {site: sum(sites.values()) - change for site, change in sites.items()}
        length = {site: np.linalg.norm(change) for site, change in sites.items()}
        found |= {
            "cosine": {site: change @ mean / (length[site] * np.linalg.norm(mean)) for site, change in sites.items()},
            "cosine_to_others": {
                site: change @ others[site] / (length[site] * np.linalg.norm(others[site]))
                for site, change in sites.items()
                if len(sites) > 1
            },
            "length": length,
            "kept": np.linalg.norm(mean) / np.mean(list(length.values())),
            "scale": step @ mean / (mean @ mean),
            "pairs": {(j, k): sites[j] @ sites[k] / (length[j] * length[k]) for j, k in combinations(sorted(sites), 2)},
        }
        found["lowest_cosine"] = min(found["cosine"].values())
        found["lowest_to_others"] = min(found["cosine_to_others"].values(), default=None)
    return found


def close(value, expected, decimals):
    """Rounded to decimals, or to four digits."""
    if expected is None:
        return value is None or value == 0
    tolerance = abs(expected) * 6e-4 if decimals is None else 0.51 * 10**-decimals
    return value == pytest.approx(expected, abs=tolerance + 1e-9)


@pytest.mark.parametrize("shapes", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("own", [False, True], ids=["global", "personal"])
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_every_number_is_its_definition_on_dense_matrices(shapes, own, seed):
    adapter, updates = a_round(seed, shapes)
    rng = np.random.default_rng(seed)
    noise = {name: array + rng.normal(size=array.shape).astype(np.float32) for name, array in adapter.items()}
    personal = {"site-1": noise, "site-3": adapter} if own else {}
    result = FedAvg().aggregate(adapter, {}, updates)
    found = round_diagnostics(adapter, updates, result, personal)
    assert found["sites"] == [update.site for update in updates]
    blocks = {**found["layers"], **found["kinds"]}
    assert blocks.keys() == {*LAYERS, "attention", "router"}
    for block, table in blocks.items():
        for expert in range(NUM_EXPERTS if block in LAYERS else 1):
            expected = naive(adapter, updates, result.adapter, block, expert, personal)
            decimals = {"norm": None, "scale": None, "kept": 3, "lowest_cosine": 3, "lowest_to_others": 3}
            for name, kept in decimals.items():
                assert close(table[name][expert], expected.get(name), kept), (block, expert, name)
            for row, site in enumerate(found["sites"]):
                for name in ("cosine", "cosine_to_others"):
                    assert close(table[name][row][expert], expected.get(name, {}).get(site), 3), (name, site)
                assert close(table["length"][row][expert], expected.get("length", {}).get(site), None)
            for pair, sites in enumerate(combinations(found["sites"], 2)):
                assert close(table["pairs"][expert][pair], expected["pairs"].get(sites), 2)


def test_cosines_of_a_block_are_those_of_all_its_experts_as_one_vector():
    adapter, updates = a_round(3, LORA)
    everywhere = [
        replace(update, expert_tokens={layer: np.ones(NUM_EXPERTS) for layer in LAYERS}) for update in updates
    ]
    found = round_diagnostics(adapter, everywhere, FedAvg().aggregate(adapter, {}, everywhere))
    changes = [
        np.concatenate([vector(each.adapter, LAYERS[1], e) - vector(adapter, LAYERS[1], e) for e in range(NUM_EXPERTS)])
        for each in everywhere
    ]
    expected = [j @ k / np.linalg.norm(j) / np.linalg.norm(k) for j, k in combinations(changes, 2)]
    assert found["layers"][LAYERS[1]]["block_pairs"] == pytest.approx(expected, abs=0.0051)


def one_expert(*changes, received=(0.0, 0.0), weights=None):
    """Diagnostics of an expert of two values under FedAvg, whose sites changed it so."""
    adapter, template = random_round(0, {"w": (2,)}, len(changes))
    adapter = {f"{LAYERS[0]}.experts.w": np.array([received], np.float32)}
    updates = [
        replace(
            update,
            adapter={name: array + np.float32(change) for name, array in adapter.items()},
            num_examples=1 if weights is None else weights[i],
            expert_tokens={LAYERS[0]: np.array([1.0])},
        )
        for i, (update, change) in enumerate(zip(template, changes, strict=True))
    ]
    return round_diagnostics(adapter, updates, FedAvg().aggregate(adapter, {}, updates))["layers"][LAYERS[0]]


def test_by_hand():
    """Updates (3, 0) and (0, 4): the mean is (1.5, 2), of length 2.5 where the updates have 3.5 in the mean; cosines
    4.5 / (3 * 2.5) and 8 / (4 * 2.5). FedAvg with weights 1 and 3 steps (0.75, 3): (1.125 + 6) / 6.25 along the mean.
    """
    found = one_expert((3, 0), (0, 4), weights=(1, 3))
    assert found["cosine"] == [[0.6], [0.8]]
    assert found["lowest_cosine"] == [0.6]
    assert found["kept"] == [0.714]
    assert found["scale"] == [1.14]
    assert found["pairs"] == [[0.0]]
    assert found["length"] == [[3.0], [4.0]]
    assert found["norm"] == [3.092]


def test_updates_that_agree_lose_nothing_and_updates_that_cancel_lose_all():
    agreeing, cancelling = one_expert((1, 2), (2, 4), (1, 2)), one_expert((1, 2), (-1, -2))
    assert (agreeing["kept"], agreeing["lowest_cosine"], agreeing["scale"]) == ([1.0], [1.0], [1.0])
    assert agreeing["pairs"] == [[1.0, 1.0, 1.0]]
    assert (cancelling["kept"], cancelling["pairs"]) == ([0.0], [[-1.0]])
    assert cancelling["cosine"] == [[None], [None]]
    assert (agreeing["cosine_to_others"], cancelling["cosine_to_others"]) == ([[1.0]] * 3, [[-1.0]] * 2)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_updates_that_cancel_on_large_weights_leave_no_direction(size):
    """Three that sum to 0 but for the rounding of float32, on weights of size 1; then a fourth beside them."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        before = rng.normal(size=64)
        first, second, last = size * rng.normal(size=(3, 64))
        changes = (first, second, -(first + second))
        found = one_expert(*changes, received=before)
        assert (found["scale"], found["kept"], found["cosine"]) == ([None], [0.0], [[None]] * 3)
        assert one_expert(*changes, last, received=before)["cosine_to_others"][3] == [None]


def test_a_sites_own_share_in_the_consensus_does_not_hide_that_it_goes_against_the_others():
    """(4, 0), (-1, 1) and (-1, 1) have the sum (2, 2); without the first it is (-2, 2), without a second one (3, 1)."""
    found = one_expert((4, 0), (-1, 1), (-1, 1))
    assert found["cosine"] == [[0.707], [0.0], [0.0]]
    assert found["cosine_to_others"] == [[-0.707], [-0.447], [-0.447]]
    assert found["lowest_to_others"] == [-0.707]
    assert one_expert((4, 0), (0, 0))["cosine_to_others"] == [[None], [None]]


@pytest.mark.parametrize("count", [2, 5, 9])
def test_orthogonal_updates_keep_one_over_the_root_of_their_number(count):
    adapter, template = random_round(0, {"w": (count,)}, count)
    adapter = {f"{LAYERS[0]}.experts.w": np.zeros((1, count), np.float32)}
    updates = [
        replace(each, adapter={f"{LAYERS[0]}.experts.w": np.eye(count, dtype=np.float32)[[i]]}, expert_tokens={})
        for i, each in enumerate(template)
    ]
    found = round_diagnostics(adapter, updates, FedAvg().aggregate(adapter, {}, updates))["layers"][LAYERS[0]]
    assert found["kept"] == [round(1 / math.sqrt(count), 3)]


def test_small_changes_of_large_products_are_told_from_rounding():
    """An update a ten-thousandth of what it changes keeps its cosines; one that changed nothing has none."""
    adapter, updates = a_round(5, LORA, 3)
    adapter = {name: 100 * array for name, array in adapter.items()}
    rng = np.random.default_rng(5)
    for update in updates[:2]:
        for name, array in adapter.items():
            update.adapter[name][...] = array + 1e-2 * rng.normal(size=array.shape)
    for name, array in adapter.items():
        updates[2].adapter[name][...] = array
    everywhere = [replace(update, expert_tokens={}) for update in updates]
    result = FedAvg().aggregate(adapter, {}, everywhere)
    found = round_diagnostics(adapter, everywhere, result)["layers"][LAYERS[0]]
    expected = naive(adapter, everywhere[:2], result.adapter, LAYERS[0], 1, {})
    assert found["length"][2] == [0.0] * NUM_EXPERTS
    assert found["cosine"][2] == [None] * NUM_EXPERTS
    assert found["cosine"][0][1] == pytest.approx(expected["cosine"]["site-0"], abs=0.001)


def test_what_the_rule_found_stands_beside_without_what_is_there_already():
    adapter, updates = a_round(0, LORA)
    result = FcMoe().aggregate(adapter, {}, updates)
    found = round_diagnostics(adapter, updates, result)["layers"][LAYERS[0]]
    assert found["rule"].keys() == {"weight", "cosine", "conflict", "scale"}
    own = result.diagnostics["experts"][LAYERS[0]]
    assert found["rule"]["scale"][2] == pytest.approx(own["scale"][2], rel=1e-3)
    assert found["tokens"] == own["tokens"]


def test_inputs_are_unchanged_and_the_result_is_strict_json():
    adapter, updates = a_round(1, LORA)
    before = {name: array.copy() for name, array in adapter.items()}
    found = round_diagnostics(adapter, updates, FcMoe().aggregate(adapter, {}, updates))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all((adapter[name] == before[name]).all() for name in before)


def test_rule_without_adapters_still_shows_the_load():
    _, updates = a_round(0, LORA)
    silent = [replace(update, adapter={}) for update in updates]
    found = round_diagnostics({}, silent, LocalOnly().aggregate({}, {}, silent))
    assert found["kinds"] == {}
    assert found["layers"][LAYERS[0]].keys() == {"tokens", "num_tokens"}


def test_site_that_counts_otherwise_is_left_out_of_the_counts_alone():
    """FedAvg does not use the counts, so it takes updates with others."""
    adapter, updates = a_round(0, LORA)
    odd = {LAYERS[0]: np.ones(NUM_EXPERTS + 3), "elsewhere": np.ones(2)}
    updates[2] = replace(updates[2], expert_tokens=odd)
    found = round_diagnostics(adapter, updates, FedAvg().aggregate(adapter, {}, updates))
    assert found["layers"].keys() == set(LAYERS)
    assert found["layers"][LAYERS[0]]["tokens"][2] == [None] * NUM_EXPERTS
    assert all(cosine is not None for cosine in found["layers"][LAYERS[0]]["cosine"][2])
    others = sum(update.expert_tokens[LAYERS[0]] for update in updates if update is not updates[2])
    assert found["layers"][LAYERS[0]]["num_tokens"] == others.tolist()


def numbers_in(value):
    if isinstance(value, dict):
        return sum(map(numbers_in, value.values()))
    return sum(map(numbers_in, value)) if isinstance(value, list) else 1


@pytest.mark.parametrize(
    ("limit", "kept"), [(10_000, {"pairs", "cosine", "tokens"}), (500, {"cosine", "tokens"}), (10, set())]
)
def test_large_models_keep_less_and_always_what_there_is_of_each_expert(limit, kept):
    adapter, updates = a_round(0, LORA, 8)
    result = FcMoe().aggregate(adapter, {}, updates)
    found = round_diagnostics(adapter, updates, result, max_numbers=limit)
    layer = found["layers"][LAYERS[0]]
    assert {"pairs", "cosine", "tokens"} & layer.keys() == kept
    assert {"lowest_cosine", "lowest_to_others", "kept", "scale", "norm", "num_tokens", "block_pairs"} <= layer.keys()
    always = 2 * (6 * NUM_EXPERTS + NUM_EXPERTS + 28) + 2 * (5 + 28)
    assert numbers_in(found) <= always + 8 + limit


def test_range_by_range_is_as_all_at_once(monkeypatch):
    adapter, updates = a_round(0, LORA)
    result = Aggregation(adapter=adapter, state={})
    at_once = round_diagnostics(adapter, updates, result)
    original = experts.expert_slices
    monkeypatch.setattr(experts, "expert_slices", lambda arrays, sites: original(arrays, sites, 1))
    assert round_diagnostics(adapter, updates, result) == at_once


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{LAYERS[0]}.experts.down_proj.lora_A", "experts"),
        ("model.layers.0.self_attn.q_proj.lora_B", "attention"),
        ("transformer.h.3.attn.c_attn.lora_A", "attention"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.router.weight", "router"),
        ("model.layers.0.self_attn.gate.lora_A", "attention"),
        ("model.layers.0.mlp.gate_proj.lora_A", "other"),
        ("model.layers.0.mlp.shared_experts.up_proj.lora_A", "other"),
    ],
)
def test_kind_of_an_array(name, kind):
    assert kind_of(name) == kind


def test_bytes_by_kind_add_up_to_all():
    adapter, _ = a_round(0, LORA)
    counted = bytes_by_kind(adapter, {})
    assert counted.keys() == {"experts", "attention", "router"}
    assert counted.total() == sum(array.nbytes for array in adapter.values())
    beside = bytes_by_kind(adapter, {"control": np.zeros(3, np.float32)})
    assert beside == {**counted, "extras": 12}
    assert counted["router"] == adapter[ROUTER].nbytes
