"""FC-MoE plus expert by expert, all dense: what test_fc_moe_plus.py holds the rule against."""

import itertools

import numpy as np
import pytest

from strategies.conflicts import Space
from tests.strategies.naive_fc_moe import LAYERS, NUM_EXPERTS
from tests.strategies.test_equal_say import naive_coefficients
from tests.strategies.test_expert_steps import products_of
from tests.strategies.test_flatten import dense_flattened


def parts_of(arrays, layer, expert, strategy):
    """What the rule looks at in one expert: dense products of LoRA pairs, or the arrays themselves."""
    if f"{layer}.experts.down_proj" not in arrays and strategy.space is Space.product:
        return products_of(arrays, layer, expert)
    names = sorted(name for name in arrays if name.startswith(f"{layer}.experts."))
    return [arrays[name][expert].astype(float) for name in names]


def projector(columns):
    """On the span of the columns, without directions that have less than 1e-5 of the squared lengths, made equal."""
    lengths = np.linalg.norm(columns, axis=0)
    left, sizes, _ = np.linalg.svd(columns / np.where(lengths > 0, lengths, 1.0), full_matrices=False)
    kept = left[:, sizes**2 > 1e-5]
    return kept @ kept.T


def naive_sum(coefficients, changes):
    """The weighted sum of changes of a factor, (R, N); of rows that cancel nothing is left that float32 would know."""
    weighted = [c * change for c, change in zip(coefficients, changes, strict=True)]
    total, uncancelled = sum(weighted), sum((part**2).sum(axis=1) for part in weighted)
    return np.where(((total**2).sum(axis=1) > 1e-6 * uncancelled)[:, None], total, 0.0)


def naive_product(adapter, ends, coefficients, flatten, prefix, expert):
    """The next dense product of one LoRA pair, and the share of its squared norm that was lost."""
    A, B = (adapter[f"{prefix}.lora_{side}"][expert].astype(float) for side in "AB")
    trained = [[end[f"{prefix}.lora_{side}"][expert].astype(float) for side in "AB"] for end in ends]
    change = sum(c * (Bi @ Ai - B @ A) for c, (Ai, Bi) in zip(coefficients, trained, strict=True))
    change_A = naive_sum(coefficients, [Ai - A for Ai, _ in trained])
    change_B = naive_sum(coefficients, [(Bi - B).T for _, Bi in trained])
    within = projector(np.vstack([B.T, change_B]).T) @ change @ projector(np.vstack([A, change_A]).T)
    step = dense_flattened(within, flatten, len(A))
    left, sizes, right = np.linalg.svd(B @ A + step)
    kept = (left[:, : len(A)] * sizes[: len(A)]) @ right[: len(A)]
    return kept, 1 - (kept**2).sum() / ((B @ A + step + change - within) ** 2).sum()


def naive_pair_cosine(strategy, adapter, updates):
    """Mean over all experts of the mean cosine of two sites' dense updates; None if no two sites share one."""
    means = []
    for layer, expert in itertools.product(LAYERS, range(NUM_EXPERTS)):
        before = np.concatenate([part.ravel() for part in parts_of(adapter, layer, expert, strategy)])
        users = [u.adapter for u in updates if u.expert_tokens[layer][expert] > 0]
        ends = [np.concatenate([p.ravel() for p in parts_of(user, layer, expert, strategy)]) for user in users]
        units = [(end - before) / np.linalg.norm(end - before) for end in ends]
        if len(units) > 1:
            means.append(np.mean([a @ b for a, b in itertools.combinations(units, 2)]))
    return np.mean(means) if means else None


def naive_whole(strategy, pairs, num_sites, num_users):
    """How much of step, momentum and flattening is taken, of an expert that so many of the round's sites used."""
    if strategy.agreement is None or num_users < 2:
        return 1.0
    if pairs is None:
        return 0.5
    mean_squared = (1 + (num_users - 1) * pairs) / num_users  # of a mean of unit vectors
    share = max(pairs, 0) / mean_squared
    needed = min(1, strategy.agreement / num_sites)
    return min(1, max(0.25, share / needed))


def naive_next(strategy, adapter, previous, updates, pairs, layer, expert):
    """The next parts of one expert, all dense, and the largest share that was lost; ``pairs`` of the round before."""
    before = parts_of(adapter, layer, expert, strategy)
    ends = [u.adapter for u in updates] + [previous]
    changes = [
        [new - old for new, old in zip(parts_of(end, layer, expert, strategy), before, strict=True)] for end in ends
    ]
    examples = [u.num_examples * (u.expert_tokens[layer][expert] > 0) for u in updates]
    if not any(examples):
        return before, None
    vectors = [np.concatenate([change.ravel() for change in parts]) for parts in changes[:-1]]
    whole = naive_whole(strategy, pairs, len(updates), np.count_nonzero(examples))
    coefficients = naive_coefficients(vectors, examples, strategy.ridge, whole * strategy.step)
    coefficients = [*coefficients, -whole * strategy.momentum]  # the change back to the previous adapter
    flatten = whole * strategy.flatten
    is_lora = f"{layer}.experts.down_proj" not in adapter
    if is_lora and strategy.space is Space.product:
        prefixes = [f"{layer}.experts.{p}" for p in ("down_proj", "gate_up_proj")]
        found = [naive_product(adapter, ends, coefficients, flatten, prefix, expert) for prefix in prefixes]
        return [product for product, _ in found], max(lost for _, lost in found)
    after = []
    for p, old in enumerate(before):
        step = sum(c * parts[p] for c, parts in zip(coefficients, changes, strict=True))
        is_flattened = old.ndim == 2 and not is_lora
        after.append(old + (dense_flattened(step, flatten, min(old.shape)) if is_flattened else step))
    return after, None


def assert_dense(result, strategy, adapter, previous, updates, pairs):
    """Every expert is where the naive rule takes it."""
    for layer in LAYERS:
        for expert in range(NUM_EXPERTS):
            parts, lost = naive_next(strategy, adapter, previous, updates, pairs, layer, expert)
            for ours, expected in zip(parts_of(result.adapter, layer, expert, strategy), parts, strict=True):
                atol = 1e-4 * max(1, abs(expected).max())
                np.testing.assert_allclose(ours, expected, atol=atol, err_msg=f"{layer} {expert}")
            if lost is not None:
                reported = result.diagnostics["experts"][layer]["lost_energy"][expert]
                assert reported == pytest.approx(lost, abs=1e-4)
