"""The screen: whom the inner strategy gets to see, and what is remembered of a site."""

import json
from dataclasses import replace

import numpy as np
import pytest

from strategies.base import ClientUpdate
from strategies.collaborative_set import VerdictRule
from strategies.fc_moe import FcMoe
from strategies.fedavg import FedAvg
from strategies.fedopt import FedAdam
from strategies.screen import Evidence, OnReject, ScreenConfig, Screened, ScreenKind, screened
from strategies.shared_subspace import SubspaceConfig
from strategies.update_distance import compare
from tests.strategies.naive_clair import random_sites

BAD = ["site-4", "site-5"]


def screen(inner=None, **settings):
    settings = {"evidence": [Evidence.subspace]} | settings
    return Screened(inner=inner or FedAvg(), screen=ScreenConfig(kind=ScreenKind.clair, **settings))


def rejected(result):
    return sorted(site for site, verdict in result.diagnostics["verdicts"].items() if verdict["rejected"])


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name])


@pytest.mark.parametrize("inner", [FedAvg(), FedAdam(), FcMoe()])
def test_inner_strategy_works_on_the_accepted_sites(inner):
    adapter, updates = random_sites(0)
    strategy = screen(inner)
    state = strategy.init_state(adapter)
    result, expected = strategy.aggregate(adapter, state, updates), inner.aggregate(adapter, state, updates[:4])
    assert rejected(result) == BAD
    assert_same(result.adapter, expected.adapter)
    assert_same({n: a for n, a in result.state.items() if not n.startswith("screen/")}, expected.state)
    assert expected.diagnostics.items() <= result.diagnostics.items()
    json.dumps(result.diagnostics, allow_nan=False)


@pytest.mark.parametrize("rule", VerdictRule)
def test_both_rules_find_the_contaminated_and_say_how(rule):
    adapter, updates = random_sites(0)
    result = screen(subspace=SubspaceConfig(verdict=rule)).aggregate(adapter, {}, updates)
    assert rejected(result) == BAD
    told = result.diagnostics["verdicts"]["site-5"]
    assert ("pooled over all at" in told["reason"]) == (rule is VerdictRule.pooled)
    assert (told["pooled_ratio"] is None) == (rule is VerdictRule.majority)


@pytest.mark.parametrize("rule", VerdictRule)
def test_without_contamination_the_screen_changes_nothing(rule):
    adapter, updates = random_sites(0, contaminated=0)
    result = screen(subspace=SubspaceConfig(verdict=rule)).aggregate(adapter, {}, updates)
    assert_same(result.adapter, FedAvg().aggregate(adapter, {}, updates).adapter)
    assert result.state == {}


def test_off_is_the_strategy_itself():
    inner = FedAvg()
    assert screened(inner, ScreenConfig()) is inner
    assert isinstance(screened(inner, ScreenConfig(kind=ScreenKind.clair)), Screened)


def test_warning_reports_and_keeps_everyone():
    adapter, updates = random_sites(0)
    result = screen(on_reject=OnReject.warn).aggregate(adapter, {}, updates)
    assert rejected(result) == BAD
    assert_same(result.adapter, FedAvg().aggregate(adapter, {}, updates).adapter)


def test_downweighting_counts_examples_and_tokens_less():
    """Sites of one example each: 4 weigh 1, 2 weigh a tenth."""
    adapter, updates = random_sites(0)
    equal = [replace(update, num_examples=1) for update in updates]
    result = screen(on_reject=OnReject.downweight, weight=0.1).aggregate(adapter, {}, equal)
    weights = np.array([50, 50, 50, 50, 5, 5]) / 210
    for name in adapter:
        mean = sum(w * u.adapter[name].astype(float) for w, u in zip(weights, equal, strict=True))
        np.testing.assert_allclose(result.adapter[name], mean, atol=1e-6)


def test_rejected_site_sits_out_clean_rounds_until_it_is_forgiven():
    """Contaminated in round 1, clean afterwards, two clean rounds to sit out: back in round 4."""
    adapter, updates = random_sites(0, contaminated=1)
    _, clean = random_sites(0, contaminated=0)
    strategy, state, seen = screen(forgive_after=2), {}, []
    for replies in (updates, clean, clean, clean):
        result = strategy.aggregate(adapter, state, replies)
        state = result.state
        verdict = result.diagnostics["verdicts"]["site-5"]
        seen.append((verdict["rejected"], verdict["clean_rounds_needed"], verdict["times_rejected"]))
    assert seen == [(True, 2, 1), (True, 1, 1), (True, 0, 1), (False, 0, 1)]
    assert "rejected before: 1 more clean rounds are needed" not in verdict["reason"]
    relapse = strategy.aggregate(adapter, state, updates).diagnostics["verdicts"]["site-5"]
    assert (relapse["rejected"], relapse["clean_rounds_needed"], relapse["times_rejected"]) == (True, 2, 2)


def test_history_of_absent_sites_is_kept():
    adapter, updates = random_sites(0, contaminated=1)
    state = screen(forgive_after=3).aggregate(adapter, {}, updates).state
    later = screen(forgive_after=3).aggregate(adapter, state, updates[:5]).state
    assert_same(later, state)


def test_no_memory_judges_every_round_by_itself():
    adapter, updates = random_sites(0, contaminated=1)
    _, clean = random_sites(0, contaminated=0)
    state = screen(forgive_after=0).aggregate(adapter, {}, updates).state
    assert rejected(screen(forgive_after=0).aggregate(adapter, state, clean)) == []


def test_pinned_site_is_accepted_whatever_its_verdict():
    adapter, updates = random_sites(0)
    result = screen(pinned=["site-5"]).aggregate(adapter, {}, updates)
    verdict = result.diagnostics["verdicts"]["site-5"]
    assert (verdict["rejected"], verdict["against"], verdict["judged"]) == (False, 2, 2)
    assert "pinned" in verdict["reason"]
    expected = FedAvg().aggregate(adapter, {}, [*updates[:4], updates[5]])
    assert_same(result.adapter, expected.adapter)


def test_banned_site_is_not_even_looked_at():
    adapter, updates = random_sites(0)
    poisoned = {name: np.full_like(array, 1e20) for name, array in updates[0].adapter.items()}
    replies = [replace(updates[0], adapter=poisoned), *updates[1:]]
    result = screen(banned=["site-0"], on_reject=OnReject.warn).aggregate(adapter, {}, replies)
    assert result.diagnostics["verdicts"]["site-0"]["reason"] == "banned"
    assert all("site-0" not in matrix["sites"] for matrix in result.diagnostics["matrices"].values())
    assert_same(result.adapter, FedAvg().aggregate(adapter, {}, updates[1:]).adapter)


EXPERT = "l.mlp.experts.w"


@pytest.fixture(scope="module")
def one_bad_expert():
    """Eight sites with a dense pair and two experts; the last site is contaminated in expert 1 alone."""
    matrices = {"dense": (20, 30), EXPERT: (20, 30)}
    adapter, clean = random_sites(5, num_sites=8, contaminated=0, matrices=matrices)
    _, dirty = random_sites(6, num_sites=8, contaminated=1, matrices=matrices)

    def pair_up(first, second):
        return {n: np.stack([a, second[n]]) if n.startswith(EXPERT) else a for n, a in first.items()}

    updates = [
        replace(one, adapter=pair_up(one.adapter, other.adapter), expert_tokens={"l.mlp": np.array([5.0, 5.0])})
        for one, other in zip(clean, dirty, strict=True)
    ]
    return pair_up(adapter, adapter), updates


def averaged_with_last_expert_counting(weight, updates):
    """The mean by examples, but for expert 1, of which the last site counts so much less."""
    examples = np.array([update.num_examples for update in updates], float)
    less = examples * ([1.0] * 7 + [weight])
    mean = {n: np.average([u.adapter[n] for u in updates], axis=0, weights=examples) for n in updates[0].adapter}
    for name in (n for n in mean if n.startswith(EXPERT)):
        mean[name][1] = np.average([u.adapter[name][1] for u in updates], axis=0, weights=less)
    return mean


@pytest.mark.parametrize(
    ("settings", "weight", "named"),
    [
        ({}, 0.0, ["l.mlp[1]"]),
        ({"on_reject": OnReject.downweight, "weight": 0.2}, 0.2, ["l.mlp[1]"]),
        ({"on_reject": OnReject.warn}, 1.0, ["l.mlp[1]"]),
        ({"single_experts": False}, 1.0, []),
        ({"pinned": ["site-7"]}, 1.0, []),
        ({"evidence": [Evidence.distance]}, 1.0, []),
    ],
)
def test_one_bad_expert_of_an_accepted_site_is_judged_by_itself(one_bad_expert, settings, weight, named):
    adapter, updates = one_bad_expert
    result = screen(**settings).aggregate(adapter, {}, updates)
    assert rejected(result) == []
    assert list(result.diagnostics["verdicts"]["site-7"]["experts"]) == named
    assert not any(result.diagnostics["verdicts"][f"site-{i}"]["experts"] for i in range(7))
    for name, array in averaged_with_last_expert_counting(weight, updates).items():
        np.testing.assert_allclose(result.adapter[name], array, atol=1e-5)


def test_rejected_expert_is_not_held_against_the_site(one_bad_expert):
    adapter, updates = one_bad_expert
    assert screen(forgive_after=3).aggregate(adapter, {}, updates).state == {}


def test_rejected_expert_has_no_say_in_rules_that_weigh_experts_by_tokens(one_bad_expert):
    adapter, updates = one_bad_expert
    changed = {n: np.concatenate([a[:1], 3 * a[1:]]) for n, a in updates[7].adapter.items() if n.startswith(EXPERT)}
    others = [*updates[:7], replace(updates[7], adapter=updates[7].adapter | changed)]
    one, other = (screen(FcMoe()).aggregate(adapter, {}, sent) for sent in (updates, others))
    assert list(other.diagnostics["verdicts"]["site-7"]["experts"]) == ["l.mlp[1]"]
    assert_same(one.adapter, other.adapter)
    unscreened = FcMoe().aggregate(adapter, {}, updates).adapter
    assert not np.array_equal(one.adapter[f"{EXPERT}.lora_B"][1], unscreened[f"{EXPERT}.lora_B"][1])


def test_a_round_that_leaves_nobody_is_refused_with_the_reasons():
    adapter, updates = random_sites(0)
    nobody = screen(subspace=SubspaceConfig(threshold=1e-9))
    with pytest.raises(ValueError, match=r"screen=clair leaves no update \(site-0: outside .* of 2 of 2 matrices"):
        nobody.aggregate(adapter, {}, updates)


def test_a_round_of_banned_and_waiting_sites_alone_changes_nothing():
    adapter, updates = random_sites(0, contaminated=1)
    strategy = screen(FedAdam(), banned=["site-0"], forgive_after=2)
    first = strategy.aggregate(adapter, strategy.init_state(adapter), updates)
    assert rejected(first) == ["site-0", "site-5"]
    result = strategy.aggregate(first.adapter, first.state, [updates[0], updates[5]])
    assert rejected(result) == ["site-0", "site-5"]
    assert_same(result.adapter, first.adapter)
    assert_same(result.state, first.state)


def test_rounds_in_which_nobody_can_be_judged_forgive_nothing():
    """Four sites judge nobody, whatever the evidence: six such rounds, and the site still waits for both."""
    adapter, updates = random_sites(0, contaminated=1)
    strategy = screen(forgive_after=2, evidence=list(Evidence))
    state = strategy.aggregate(adapter, {}, updates).state
    for _ in range(6):
        result = strategy.aggregate(adapter, state, updates[2:])
        state = result.state
        verdict = result.diagnostics["verdicts"]["site-5"]
        assert (verdict["rejected"], verdict["clean_rounds_needed"]) == (True, 2)


@pytest.mark.parametrize("factor", [1e3, 1e6])
def test_one_huge_update_hides_no_other_attacker(factor):
    adapter, updates = drawn(10)

    def times(update, share):
        return {n: (adapter[n] + share * (a - adapter[n])).astype(np.float32) for n, a in update.adapter.items()}

    attacked = swapped(updates, {8: times(updates[8], -30.0), 9: times(updates[9], factor)})
    assert rejected(screen(evidence=list(Evidence)).aggregate(adapter, {}, attacked)) == ["site-8", "site-9"]


def test_values_of_an_expert_without_tokens_count_nothing(one_bad_expert):
    """By its own count nobody judges it by them; a mean by examples would take them."""
    adapter, updates = one_bad_expert
    idle = replace(updates[7], expert_tokens={"l.mlp": np.array([5.0, 0.0])})
    told = {n: np.stack([a[0], adapter[n][1]]) if n.startswith(EXPERT) else a for n, a in idle.adapter.items()}
    expected = FedAvg().aggregate(adapter, {}, [*updates[:7], replace(idle, adapter=told)]).adapter
    result = screen().aggregate(adapter, {}, [*updates[:7], idle])
    assert rejected(result) == []
    assert_same(result.adapter, expected)
    warned = screen(on_reject=OnReject.warn).aggregate(adapter, {}, [*updates[:7], idle])
    assert_same(warned.adapter, FedAvg().aggregate(adapter, {}, [*updates[:7], idle]).adapter)


@pytest.mark.parametrize("counts", [{}, {"l.mlp": np.ones(1)}, {"l.mlp": np.ones(3)}])
def test_reply_that_does_not_count_every_expert_is_refused(one_bad_expert, counts):
    adapter, updates = one_bad_expert
    screen().check_update(adapter, updates[0])
    with pytest.raises(ValueError, match="expert_tokens"):
        screen().check_update(adapter, replace(updates[0], expert_tokens=counts))


def drawn(num_sites=8, seed=0):
    """Updates whose changes are Gaussian, in a LoRA pair and a router."""
    rng = np.random.default_rng(seed)
    shapes = {"l.q.lora_A": (2, 20), "l.q.lora_B": (12, 2), "l.gate.weight": (4, 12)}
    adapter = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    sent = [
        {n: a + 0.1 * rng.normal(size=a.shape).astype(np.float32) for n, a in adapter.items()} for _ in range(num_sites)
    ]
    return adapter, [ClientUpdate(site=f"site-{i}", adapter=arrays, num_examples=1) for i, arrays in enumerate(sent)]


def swapped(updates, changed):
    return [replace(update, adapter={**update.adapter, **changed.get(i, {})}) for i, update in enumerate(updates)]


def test_poisoned_router_is_seen_by_distance_and_not_by_row_space():
    adapter, updates = drawn()
    poisoned = swapped(updates, {7: {"l.gate.weight": -20 * adapter["l.gate.weight"]}})
    found = screen(evidence=[Evidence.distance]).aggregate(adapter, {}, poisoned)
    assert rejected(found) == ["site-7"]
    assert "whole weights at" in found.diagnostics["verdicts"]["site-7"]["reason"]
    assert rejected(screen(evidence=[Evidence.subspace]).aggregate(adapter, {}, poisoned)) == []


def test_copies_are_rejected_together_and_only_as_such():
    adapter, updates = drawn()
    copied = swapped(updates, {7: updates[6].adapter})
    assert rejected(screen(evidence=[Evidence.copies]).aggregate(adapter, {}, copied)) == ["site-6", "site-7"]
    assert rejected(screen(evidence=list(Evidence)).aggregate(adapter, {}, updates)) == []
    assert rejected(screen(evidence=[Evidence.copies]).aggregate(adapter, {}, copied[4:])) == []  # four judge nobody


def test_honest_sites_are_no_copies_of_each_other_beside_colluders_far_away():
    """Four of ten: most pairs are of an attacker and an honest site, and 300 times as far apart as two honest ones."""
    adapter, updates = drawn(10)
    poisoned = swapped(updates, {i: {"l.gate.weight": 30 + adapter["l.gate.weight"]} for i in range(6, 10)})
    colluders = [f"site-{i}" for i in range(6, 10)]
    assert rejected(screen(evidence=[Evidence.copies]).aggregate(adapter, {}, poisoned)) == colluders
    assert rejected(screen(evidence=list(Evidence)).aggregate(adapter, {}, poisoned)) == colluders


def test_distance_is_that_of_the_changes_as_one_vector():
    adapter, updates = drawn(6)
    (factors, routers) = compare(adapter, updates, agreement=0.5, min_gap=1.0)
    flat = [np.concatenate([(u.adapter[n] - adapter[n]).ravel() for n in adapter if "lora" in n]) for u in updates]
    for k, one in enumerate(flat):
        expected = sorted(np.linalg.norm(one - other) for other in flat)[3]
        assert factors.verdict.distances[k] == pytest.approx(expected, rel=1e-6)
    assert [factors.kind, routers.kind] == ["LoRA factors", "whole weights"]


def test_needs_lora():
    with pytest.raises(ValueError, match="screen=clair needs LoRA: set model.experts=lora"):
        screen().init_state({"l.gate.weight": np.zeros((2, 3), np.float32)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.0}, r"screen.weight must be in \(0, 1\), got 1.0"),
        ({"evidence": []}, "screen.evidence must be a list of at least one kind"),
        ({"forgive_after": -1}, "screen.forgive_after must be >= 0, got -1"),
        ({"pinned": ["a"], "banned": ["a", "b"]}, "screen.banned must be disjoint from screen.pinned"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ScreenConfig(**settings)
