"""CLAIR against its dense, literal version, and what must hold of it whatever the data."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.base import ClientUpdate
from strategies.clair import Clair, RefinedRank
from strategies.shared_subspace import SubspaceConfig
from tests.strategies.naive_clair import (
    MATRICES,
    naive_differences,
    naive_projection,
    naive_refined,
    product,
    random_sites,
)

EXACT = Clair(refined_rank=RefinedRank.exact)
seeds = st.integers(0, 2**32 - 1)


def rejected(result):
    return sorted(site for site, verdict in result.diagnostics["verdicts"].items() if verdict["rejected"])


def test_same_as_the_dense_program_on_formed_products():
    adapter, updates = random_sites(0)
    strategy = Clair(refined_rank=RefinedRank.exact, subspace=SubspaceConfig(tolerance=1e-10, max_iterations=3000))
    result = strategy.aggregate(adapter, {}, updates)
    assert rejected(result) == ["site-4", "site-5"]
    for prefix in MATRICES:
        weights = [product(update.adapter, prefix) for update in updates]
        projection = naive_projection(naive_differences(weights), rank=2)
        expected = naive_refined(weights, [True] * 4 + [False] * 2, projection)
        for update, dense in zip(updates, expected, strict=True):
            np.testing.assert_allclose(product(result.personal[update.site], prefix), dense, atol=2e-4)
        outside = np.eye(projection.shape[0]) - projection
        found = result.diagnostics["matrices"][prefix]
        for site, distance in enumerate(found["distance"]):
            others = sorted(np.linalg.norm((weights[site] - other) @ outside) for other in weights)
            assert distance == pytest.approx(others[3], rel=1e-3)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=seeds, num_sites=st.sampled_from([7, 10]))
def test_no_contamination_expels_nobody_and_sends_the_mean(seed, num_sites):
    """Among five sites chance alone opens a gap in under 1 % of the draws (see ``judge``), among ten hardly ever."""
    adapter, updates = random_sites(seed, num_sites=num_sites, contaminated=0, matrices={"l.q": (30, 40)})
    result = Clair().aggregate(adapter, {}, updates)
    assert rejected(result) == []
    mean = np.mean([product(update.adapter, "l.q") for update in updates], axis=0)
    left, sizes, right = np.linalg.svd(mean)
    np.testing.assert_allclose(product(result.adapter, "l.q"), (left[:, :2] * sizes[:2]) @ right[:2], atol=1e-4)


def test_accepted_sites_differ_only_inside_the_shared_row_space():
    adapter, updates = random_sites(1)
    result = EXACT.aggregate(adapter, {}, updates)
    left, right = (product(result.personal[site], "l.q") for site in ("site-0", "site-1"))
    assert np.linalg.matrix_rank(left, tol=1e-4) > 2
    assert np.linalg.matrix_rank(left - right, tol=1e-4) == 2
    mean = np.mean([product(result.personal[f"site-{i}"], "l.q") for i in range(4)], axis=0)
    np.testing.assert_allclose(mean, np.mean([product(u.adapter, "l.q") for u in updates[:4]], axis=0), atol=1e-5)


def test_rejected_site_keeps_its_own_and_gives_nothing():
    adapter, updates = random_sites(2)
    result = Clair().aggregate(adapter, {}, updates)
    for update in updates[4:]:
        assert result.personal[update.site].keys() == update.adapter.keys()
        for name, array in update.adapter.items():
            np.testing.assert_array_equal(result.personal[update.site][name], array)
    worse = [replace(update, adapter={name: 3 * a for name, a in update.adapter.items()}) for update in updates[4:]]
    again = Clair().aggregate(adapter, {}, updates[:4] + worse)
    assert rejected(again) == ["site-4", "site-5"]
    for prefix in MATRICES:
        # They still have a say in where the shared row space lies, not in the mean.
        np.testing.assert_allclose(product(again.adapter, prefix), product(result.adapter, prefix), atol=1e-4)


@pytest.mark.parametrize("num_sites", [6, 10])
def test_one_enormous_update_does_not_pass_for_the_shared_row_space(num_sites):
    """It stands in all pairs of its site; untempered, the program calls it low-rank and lets it pass."""
    adapter, updates = random_sites(0, num_sites=num_sites, contaminated=1)
    last = updates[-1]
    updates[-1] = replace(last, adapter={name: 30 * array for name, array in last.adapter.items()})
    assert rejected(Clair().aggregate(adapter, {}, updates)) == [last.site]


def test_truncation_is_the_closest_product_and_reports_what_it_loses():
    adapter, updates = random_sites(3)
    exact, truncated = EXACT.aggregate(adapter, {}, updates), Clair().aggregate(adapter, {}, updates)
    for prefix in MATRICES:
        lost = []
        for i in range(4):
            whole = product(exact.personal[f"site-{i}"], prefix)
            left, sizes, right = np.linalg.svd(whole, full_matrices=False)
            closest = (left[:, :2] * sizes[:2]) @ right[:2]
            np.testing.assert_allclose(product(truncated.personal[f"site-{i}"], prefix), closest, atol=1e-4)
            lost.append((sizes[2:] ** 2).sum() / (sizes**2).sum())
        assert truncated.diagnostics["matrices"][prefix]["lost_energy"] == pytest.approx(max(lost), rel=1e-4)
        assert exact.diagnostics["matrices"][prefix]["lost_energy"] < 1e-12


def test_grown_adapters_have_room_for_the_accepted_sites_products():
    adapter, updates = random_sites(3)
    shapes = {name: array.shape for name, array in EXACT.aggregate(adapter, {}, updates).personal["site-0"].items()}
    assert shapes["l.q.lora_A"] == (4 * 2, 20)
    assert shapes["l.q.lora_B"] == (12, 4 * 2)


def test_verdicts_say_by_how_much_a_site_is_outside():
    adapter, updates = random_sites(0)
    found = Clair().aggregate(adapter, {}, updates).diagnostics
    for k, verdict in enumerate(found["verdicts"].values()):
        ratios = [
            found["matrices"][prefix]["distance"][k] / found["matrices"][prefix]["threshold"] for prefix in MATRICES
        ]
        blocks = [found["matrices"][prefix]["block_norm"] for prefix in MATRICES]
        if k < 4:
            assert (verdict["against"], verdict["distance_ratio"]) == (0, None)
        else:
            assert verdict["distance_ratio"] == pytest.approx(np.median(ratios))
            assert f"2 of 2 matrices, there at {np.median(ratios):.1f} times" in verdict["reason"]
            assert all(of[k] > max(of[:4]) for of in blocks)


@settings(deadline=None, max_examples=5)
@given(seed=seeds, scale=st.floats(0.01, 100))
def test_scaling_all_updates_scales_the_products_and_changes_no_verdict(seed, scale):
    adapter, updates = random_sites(seed)
    scaled = [
        replace(
            update,
            adapter={n: (scale * a).astype(np.float32) if n.endswith("B") else a for n, a in update.adapter.items()},
        )
        for update in updates
    ]
    plain, result = EXACT.aggregate(adapter, {}, updates), EXACT.aggregate(adapter, {}, scaled)
    assert rejected(plain) == rejected(result)
    for site, arrays in plain.personal.items():
        np.testing.assert_allclose(
            product(result.personal[site], "l.q"), scale * product(arrays, "l.q"), atol=1e-3 * scale
        )


@settings(deadline=None, max_examples=5)
@given(seed=seeds)
def test_rotating_inputs_and_outputs_rotates_the_result(seed):
    adapter, updates = random_sites(seed, matrices={"l.q": (12, 20)})
    rng = np.random.default_rng(seed)
    turn_in, turn_out = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (20, 12))
    turned = [
        replace(
            update,
            adapter={
                "l.q.lora_A": (update.adapter["l.q.lora_A"] @ turn_in).astype(np.float32),
                "l.q.lora_B": (turn_out @ update.adapter["l.q.lora_B"]).astype(np.float32),
            },
        )
        for update in updates
    ]
    plain, result = EXACT.aggregate(adapter, {}, updates), EXACT.aggregate(adapter, {}, turned)
    for site, arrays in plain.personal.items():
        np.testing.assert_allclose(
            product(result.personal[site], "l.q"), turn_out @ product(arrays, "l.q") @ turn_in, atol=1e-3
        )


@settings(deadline=None, max_examples=5)
@given(seed=seeds)
def test_order_of_sites_changes_nothing_but_rounding(seed):
    adapter, updates = random_sites(seed)
    order = np.random.default_rng(seed).permutation(len(updates))
    plain, result = Clair().aggregate(adapter, {}, updates), Clair().aggregate(adapter, {}, [updates[i] for i in order])
    for site, verdict in plain.diagnostics["verdicts"].items():
        again = result.diagnostics["verdicts"][site]
        assert (verdict["judged"], verdict["against"]) == (again["judged"], again["against"])
    for site, arrays in plain.personal.items():
        np.testing.assert_allclose(product(arrays, "l.v"), product(result.personal[site], "l.v"), atol=1e-4)


def test_what_all_sites_have_in_common_changes_no_verdict():
    """W_0 cancels in the differences: here as one more rank component of every site."""
    adapter, updates = random_sites(4, matrices={"l.q": (30, 40)})
    rng = np.random.default_rng(0)
    row, column = rng.normal(size=(1, 40)).astype(np.float32), rng.normal(size=(30, 1)).astype(np.float32)
    wider = [
        replace(
            update,
            adapter={
                "l.q.lora_A": np.concatenate([update.adapter["l.q.lora_A"], row]),
                "l.q.lora_B": np.concatenate([update.adapter["l.q.lora_B"], column], axis=1),
            },
        )
        for update in updates
    ]
    strategy = Clair(subspace=SubspaceConfig(rank=2, tolerance=1e-8))
    plain = strategy.aggregate(adapter, {}, updates)
    result = strategy.aggregate({n: np.zeros_like(a) for n, a in wider[0].adapter.items()}, {}, wider)
    distances = [found.diagnostics["matrices"]["l.q"]["distance"] for found in (plain, result)]
    np.testing.assert_allclose(*distances, rtol=1e-3)


def boosted(adapter, update, factor):
    """The update with that many times its change."""
    return replace(
        update,
        adapter={n: (adapter[n] + factor * (a - adapter[n])).astype(np.float32) for n, a in update.adapter.items()},
    )


def small_steps(num_sites=10, width=64):
    """Sites that all start from one trained pair, whose changes are a thousandth of it."""
    rng = np.random.default_rng(0)
    adapter = {"l.q.lora_A": rng.normal(size=(4, width)) / 8, "l.q.lora_B": 1e-3 * rng.normal(size=(48, 4))}
    adapter = {name: array.astype(np.float32) for name, array in adapter.items()}
    sent = [
        {name: (array + 1e-3 * rng.normal(size=array.shape)).astype(np.float32) for name, array in adapter.items()}
        for _ in range(num_sites)
    ]
    return adapter, [ClientUpdate(site=f"site-{i}", adapter=arrays, num_examples=1) for i, arrays in enumerate(sent)]


@pytest.mark.parametrize("factor", [1e3, 1e5, 1e8])
def test_one_huge_update_neither_hides_another_attacker_nor_takes_from_the_accepted(factor):
    adapter, updates = small_steps()
    attacked = [*updates[:8], boosted(adapter, updates[8], -30.0), boosted(adapter, updates[9], factor)]
    result = Clair().aggregate(adapter, {}, attacked)
    assert rejected(result) == ["site-8", "site-9"]
    alone = Clair().aggregate(adapter, {}, updates[:8])
    # The row space, which is sought among all, moves a little; the mean of the accepted does not.
    for of, tolerance in [(lambda found: found.adapter, 1e-5), (lambda found: found.personal["site-0"], 0.05)]:
        got, expected = product(of(result), "l.q"), product(of(alone), "l.q")
        assert np.linalg.norm(got - expected) < tolerance * np.linalg.norm(expected)


def test_reply_that_does_not_count_every_expert_is_refused():
    adapter, updates = expert_round(users=set(range(8)))
    for counts in ({}, {"l.mlp": np.ones(3)}):
        with pytest.raises(ValueError, match="expert_tokens"):
            Clair().check_update(adapter, replace(updates[0], expert_tokens=counts))
    Clair().check_update(adapter, updates[0])


def expert_round(users):
    """Two experts of eight sites; ``users`` of the second one are its only ones. The last site is contaminated."""
    adapter, updates = random_sites(
        5, num_sites=8, contaminated=1, matrices={"dense": (20, 30), "l.mlp.experts.w": (20, 30)}
    )
    expert = "l.mlp.experts.w"

    def pair_up(arrays):
        return {n: np.stack([a, a]) if n.startswith(expert) else a for n, a in arrays.items()}

    counted = [
        ClientUpdate(
            site=update.site,
            adapter=pair_up(update.adapter),
            num_examples=1,
            expert_tokens={"l.mlp": np.array([5.0, 5.0 * (i in users)])},
        )
        for i, update in enumerate(updates)
    ]
    return pair_up(adapter), counted


def test_expert_few_sites_used_is_judged_by_those_few_or_not_at_all_and_says_so():
    adapter, updates = expert_round(users={0, 1, 2})
    matrices = Clair().aggregate(adapter, {}, updates).diagnostics["matrices"]
    assert matrices["l.mlp.experts.w[0]"]["judged"]
    assert matrices["l.mlp.experts.w[0]"]["rejected"] == ["site-7"]
    assert not matrices["l.mlp.experts.w[1]"]["judged"]
    assert matrices["l.mlp.experts.w[1]"]["sites"] == ["site-0", "site-1", "site-2"]
    adapter, updates = expert_round(users={0, 1, 2, 3, 7})
    found = Clair().aggregate(adapter, {}, updates).diagnostics["matrices"]["l.mlp.experts.w[1]"]
    assert found["rejected"] == ["site-7"]


def test_expert_is_the_mean_of_its_users_for_those_that_did_not_use_it():
    adapter, updates = expert_round(users={0, 1, 2})
    result = Clair().aggregate(adapter, {}, updates)
    everyone, idle, user = (
        product({name: array[1] for name, array in arrays.items() if "experts" in name}, "l.mlp.experts.w")
        for arrays in (result.adapter, result.personal["site-5"], result.personal["site-0"])
    )
    np.testing.assert_allclose(idle, everyone, atol=1e-5)
    assert not np.allclose(user, everyone, atol=0.1)


def test_mean_of_an_expert_is_turned_towards_the_rows_of_a_site_that_did_not_use_it():
    adapter, updates = expert_round(users={0, 1, 2})
    name = "l.mlp.experts.w.lora_A"
    mean = Clair().aggregate(adapter, {}, updates).personal["site-5"][name][1]
    orthogonal = np.array([[0.6, -0.8], [0.8, 0.6]])
    idle = {**updates[5].adapter, name: np.stack([updates[5].adapter[name][0], orthogonal @ mean]).astype(np.float32)}
    turned = [*updates[:5], replace(updates[5], adapter=idle), *updates[6:]]
    given = Clair().aggregate(adapter, {}, turned).personal["site-5"][name][1]
    np.testing.assert_allclose(given, idle[name][1], atol=1e-5)


def test_expert_nobody_or_one_site_used_keeps_its_value_or_takes_the_sites():
    adapter, updates = expert_round(users=set())
    result = Clair().aggregate(adapter, {}, updates)
    expert = {name[-6:]: array[1] for name, array in result.adapter.items() if "experts" in name}
    assert not (expert["lora_B"] @ expert["lora_A"]).any()
    adapter, updates = expert_round(users={2})
    result = Clair().aggregate(adapter, {}, updates)
    for adapter_of in (result.adapter, result.personal["site-2"], result.personal["site-4"]):
        got = adapter_of["l.mlp.experts.w.lora_B"][1] @ adapter_of["l.mlp.experts.w.lora_A"][1]
        sent = updates[2].adapter["l.mlp.experts.w.lora_B"][1] @ updates[2].adapter["l.mlp.experts.w.lora_A"][1]
        np.testing.assert_allclose(got, sent, atol=1e-5)


def test_accepted_site_keeps_its_own_of_an_expert_that_it_is_rejected_for():
    """The last site is contaminated in expert 1 alone: of that the others get the mean of themselves."""
    adapter, updates = expert_round(users=set(range(8)))
    clean = random_sites(5, num_sites=8, contaminated=0, matrices={"dense": (20, 30), "l.mlp.experts.w": (20, 30)})[1]
    mended = []
    for update, other in zip(updates, clean, strict=True):
        arrays = {n: np.stack([a, update.adapter[n][1]]) if "experts" in n else a for n, a in other.adapter.items()}
        mended.append(replace(update, adapter=arrays))
    result = EXACT.aggregate(adapter, {}, mended)
    assert rejected(result) == []
    experts = {site: verdict["experts"] for site, verdict in result.diagnostics["verdicts"].items()}
    assert [site for site, found in experts.items() if found] == ["site-7"]
    assert list(experts["site-7"]) == ["l.mlp[1]"]
    assert experts["site-7"]["l.mlp[1]"].startswith("outside the collaborative set of 1 of 1 matrices, there at ")

    def of_expert(arrays, expert):
        return product({n: a[expert] for n, a in arrays.items() if "experts" in n}, "l.mlp.experts.w")

    own, sent = result.personal["site-7"], [update.adapter for update in mended]
    np.testing.assert_allclose(of_expert(own, 1), of_expert(sent[7], 1), atol=1e-5)
    assert np.linalg.norm(of_expert(own, 0) - of_expert(sent[7], 0)) > 0.1
    mean = np.mean([of_expert(result.personal[f"site-{i}"], 1) for i in range(7)], axis=0)
    np.testing.assert_allclose(mean, np.mean([of_expert(arrays, 1) for arrays in sent[:7]], axis=0), atol=1e-5)


def test_arrays_without_a_pair_are_averaged_over_the_accepted_by_examples():
    adapter, updates = random_sites(6)
    routed = [
        replace(update, adapter={**update.adapter, "l.gate.weight": np.full((2, 3), float(i), np.float32)})
        for i, update in enumerate(updates)
    ]
    result = Clair().aggregate({**adapter, "l.gate.weight": np.zeros((2, 3), np.float32)}, {}, routed)
    # Sites 0 to 3 with 1 to 4 examples: (0*1 + 1*2 + 2*3 + 3*4) / 10
    np.testing.assert_allclose(result.adapter["l.gate.weight"], 2.0)
    np.testing.assert_allclose(result.personal["site-1"]["l.gate.weight"], 2.0)
    np.testing.assert_allclose(result.personal["site-5"]["l.gate.weight"], 5.0)


def test_a_direction_without_weight_keeps_room_to_learn():
    """Under B = 0 everywhere A must not vanish as well: its gradient would be zero for good."""
    adapter, updates = random_sites(0, num_sites=4)
    fresh = [replace(u, adapter={n: 0 * a if n.endswith("B") else a for n, a in u.adapter.items()}) for u in updates]
    result = Clair().aggregate(adapter, {}, fresh)
    for arrays in (result.adapter, result.personal["site-0"]):
        assert not arrays["l.q.lora_B"].any()
        assert (np.linalg.norm(arrays["l.q.lora_A"], axis=1) > 0.5).all()


def test_one_site_is_that_site():
    adapter, updates = random_sites(0)
    result = Clair().aggregate(adapter, {}, updates[:1])
    for arrays in (result.adapter, result.personal["site-0"]):
        np.testing.assert_allclose(product(arrays, "l.q"), product(updates[0].adapter, "l.q"), atol=1e-5)


def test_needs_lora_and_an_accepted_site():
    adapter, updates = random_sites(0)
    with pytest.raises(ValueError, match="strategy=clair needs LoRA: set model.experts=lora"):
        Clair().init_state({"l.gate.weight": np.zeros((2, 3), np.float32)})
    assert Clair().init_state(adapter) == {}
    tight = Clair(subspace=SubspaceConfig(threshold=1e-9))
    with pytest.raises(ValueError, match=r"all sites are rejected at strategy.subspace.threshold=1e-09"):
        tight.aggregate(adapter, {}, updates)


@pytest.mark.parametrize(
    ("key", "value", "limit"),
    [
        ("agreement", 0.4, r"in \[0.5, 1\), got 0.4"),
        ("threshold", 0.0, "null or > 0, got 0.0"),
        ("low_rank_penalty", 1.0, "given or null as"),
        ("rank", 0, "null or >= 1, got 0"),
        ("min_gap", 0.0, "> 0, got 0.0"),
        ("tolerance", 1.0, r"in \(0, 1\), got 1.0"),
        ("max_iterations", 0, ">= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(key, value, limit):
    with pytest.raises(ValueError, match=limit):
        SubspaceConfig(**{key: value})
