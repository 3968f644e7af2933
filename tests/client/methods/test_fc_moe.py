"""FC-MoE's retention: each expert of each layer is re-anchored by itself, by the rule its kind names."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.methods import method_for
from conf.methods import FcMoeConfig, RetentionConfig, RetentionKind
from strategies.conflicts import Space

LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")
NUM_EXPERTS = 3
KINDS = (RetentionKind.paper, RetentionKind.filtered, RetentionKind.orthogonal)


def retention(kind, strength=0.5, norm_guard=None, space=Space.factors):
    config = RetentionConfig(kind=kind, strength=strength, norm_guard=norm_guard, space=space)
    return method_for(FcMoeConfig(retention=config))


def random_adapter(seed, scale=1.0):
    """Two layers of three experts with LoRA of rank 2 on a projection of 4 to 5, and one attention projection."""
    generator = np.random.default_rng(seed)
    shapes = {"model.layers.0.self_attn.q_proj.lora_A": (2, 4), "model.layers.0.self_attn.q_proj.lora_B": (4, 2)}
    for layer in LAYERS:
        shapes |= {f"{layer}.experts.up_proj.lora_A": (NUM_EXPERTS, 2, 4)}
        shapes |= {f"{layer}.experts.up_proj.lora_B": (NUM_EXPERTS, 5, 2)}
    return {name: (scale * generator.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def two_rounds(seed, update_scale=1.0):
    """Received and trained in round 1, received in round 2; half of the updates oppose the global step."""
    first, update, second = random_adapter(seed), random_adapter(seed + 1, update_scale), random_adapter(seed + 2)
    return first, {name: first[name] + update[name] for name in first}, second


def second_start(method, first_received, first_trained, second_received):
    """Where training starts in a site's second round."""
    return method.start(second_received, method.remember(first_received, first_trained))


def vector(adapter, layer, expert):
    """All arrays of one expert as one vector."""
    names = sorted(name for name in adapter if name.startswith(f"{layer}.experts."))
    return np.concatenate([adapter[name][expert].astype(np.float64).ravel() for name in names])


def naive_residual(kind, theta, update, step):
    """R of one expert, straight from the formulas of the three kinds."""
    if kind is RetentionKind.paper:
        return (update @ theta) / (theta @ theta) * theta
    if kind is RetentionKind.filtered:
        return min(0.0, update @ step) / (step @ step) * step
    return update - (update @ step) / (step @ step) * step


def experts():
    return [(layer, expert) for layer in LAYERS for expert in range(NUM_EXPERTS)]


def test_paper_by_hand():
    """One expert of two numbers, lambda 0.5.

    Round 1: received (9, 9), trained (9 + 1, 9 + 2), so Delta = (1, 2).
    Round 2: received Theta = (3, 4): <Delta, Theta> = 3 + 8 = 11, ||Theta||^2 = 25, R = 11/25 (3, 4) = (1.32, 1.76).
    Start = (3, 4) + 0.5 R = (3.66, 4.88).
    """
    name = "model.layers.0.mlp.experts.up_proj"
    first, trained, second = ({name: np.array([pair], np.float32)} for pair in ((9, 9), (10, 11), (3, 4)))
    start = second_start(retention(RetentionKind.paper), first, trained, second)
    np.testing.assert_allclose(start[name], [[3.66, 4.88]], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "update", "expected"),
    [
        (RetentionKind.filtered, (-2, 1), (-1, 0)),
        (RetentionKind.filtered, (2, 1), (0, 0)),
        (RetentionKind.orthogonal, (-2, 1), (0, 0.5)),
    ],
)
def test_filtered_and_orthogonal_by_hand(kind, update, expected):
    """Received (1, 1) then (4, 1), so g = (3, 0); lambda 0.5.

    Delta = (-2, 1): <Delta, g> = -6, ||g||^2 = 9: along g it is -6/9 (3, 0) = (-2, 0). filtered adds half of that,
    orthogonal half of the rest, (0, 1). Delta = (2, 1) does not oppose g: filtered adds nothing.
    """
    name = "model.layers.0.mlp.experts.up_proj"
    first, second = np.array([[1, 1]], np.float32), np.array([[4, 1]], np.float32)
    trained = first + np.array([update], np.float32)
    start = second_start(retention(kind), {name: first}, {name: trained}, {name: second})
    np.testing.assert_allclose(start[name] - second, [expected], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 4), strength=st.floats(0, 1))
def test_every_kind_equals_its_formula_expert_by_expert(kind, seed, strength):
    first, trained, second = two_rounds(seed)
    start = second_start(retention(kind, strength), first, trained, second)
    for layer, expert in experts():
        theta, before, after = (vector(adapter, layer, expert) for adapter in (second, first, trained))
        expected = theta + strength * naive_residual(kind, theta, after - before, theta - before)
        np.testing.assert_allclose(vector(start, layer, expert), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 4))
def test_papers_residual_is_parallel_to_the_received_expert(seed):
    first, trained, second = two_rounds(seed)
    start = second_start(retention(RetentionKind.paper), first, trained, second)
    for layer, expert in experts():
        theta = vector(second, layer, expert)
        residual = vector(start, layer, expert) - theta
        assert abs(residual @ theta) == pytest.approx(np.linalg.norm(residual) * np.linalg.norm(theta), rel=1e-4)


def test_orthogonal_residual_is_orthogonal_to_the_global_step():
    first, trained, second = two_rounds(seed=0)
    start = second_start(retention(RetentionKind.orthogonal), first, trained, second)
    for layer, expert in experts():
        step = vector(second, layer, expert) - vector(first, layer, expert)
        residual = vector(start, layer, expert) - vector(second, layer, expert)
        assert residual @ step == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 4), guard=st.floats(1, 3), update_scale=st.floats(0, 50))
def test_norm_guard_bounds_every_expert_and_only_shortens_the_residual(kind, seed, guard, update_scale):
    """The guarded start is Theta + c lambda R with c in [0, 1], and c = 1 inside the bound."""
    first, trained, second = two_rounds(seed, update_scale)
    free = second_start(retention(kind), first, trained, second)
    guarded = second_start(retention(kind, norm_guard=guard), first, trained, second)
    for layer, expert in experts():
        theta, open_end, end = (vector(adapter, layer, expert) for adapter in (second, free, guarded))
        residual, limit = open_end - theta, guard * np.linalg.norm(theta)
        assert np.linalg.norm(end) <= limit * (1 + 1e-5)
        if np.linalg.norm(open_end) <= limit * (1 - 1e-5):
            np.testing.assert_allclose(end, open_end, rtol=1e-5, atol=1e-5)
        elif np.linalg.norm(residual) > 0.01:  # Shorter ones drown in the rounding of Theta.
            assert np.linalg.norm(end) == pytest.approx(limit, rel=1e-4)
            c = (end - theta) @ residual / (residual @ residual)
            assert -1e-3 <= c <= 1 + 1e-3
            np.testing.assert_allclose(end, theta + c * residual, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_only_expert_arrays_are_re_anchored_and_inputs_stay(kind):
    first, trained, second = two_rounds(seed=0)
    received = {name: array.copy() for name, array in second.items()}
    start = second_start(retention(kind), first, trained, second)
    for name, array in second.items():
        np.testing.assert_array_equal(array, received[name])
        assert start[name].dtype == np.float32
        if ".experts." not in name:
            np.testing.assert_array_equal(start[name], array)


def test_off_starts_as_received_and_remembers_nothing():
    first, trained, second = two_rounds(seed=0)
    method = retention(RetentionKind.off)
    assert method.remember(first, trained) == {}
    assert second_start(method, first, trained, second) is second


@pytest.mark.parametrize("kind", KINDS)
def test_first_round_and_zero_strength_start_as_received(kind):
    first, trained, second = two_rounds(seed=0)
    assert retention(kind).start(first, {}) is first
    start = second_start(retention(kind, strength=0.0), first, trained, second)
    for name, array in second.items():
        np.testing.assert_array_equal(start[name], array)


@pytest.mark.parametrize("kind", KINDS)
def test_an_expert_whose_last_update_was_zero_starts_as_received(kind):
    first, trained, second = two_rounds(seed=0)
    for name in trained:
        if name.startswith(LAYERS[0] + ".experts."):
            trained[name][1] = first[name][1]
    start = second_start(retention(kind), first, trained, second)
    np.testing.assert_array_equal(vector(start, LAYERS[0], 1), vector(second, LAYERS[0], 1))
    assert any(not np.array_equal(vector(start, *expert), vector(second, *expert)) for expert in experts())


@pytest.mark.parametrize("guard", [None, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_vectors_divide_nothing_by_zero(kind, guard):
    """Theta = 0 and g = 0 at once: paper and filtered add nothing; all of Delta is beside the zero step, so
    orthogonal adds it, but only where no guard keeps the expert at 0."""
    zero = {name: np.zeros_like(array) for name, array in random_adapter(0).items()}
    trained = random_adapter(1)
    start = second_start(retention(kind, norm_guard=guard), zero, trained, zero)
    for layer, expert in experts():
        if kind is RetentionKind.orthogonal and guard is None:
            np.testing.assert_allclose(vector(start, layer, expert), 0.5 * vector(trained, layer, expert), rtol=1e-6)
        else:
            np.testing.assert_array_equal(vector(start, layer, expert), 0)


def test_each_kind_remembers_only_what_it_needs():
    first, trained = random_adapter(0), random_adapter(1)
    of_experts = {name for name in first if ".experts." in name}
    updates = {f"fc_moe/update/{name}" for name in of_experts}
    assert retention(RetentionKind.paper).remember(first, trained).keys() == updates
    both = updates | {f"fc_moe/received/{name}" for name in of_experts}
    assert retention(RetentionKind.filtered).remember(first, trained).keys() == both
    assert retention(RetentionKind.orthogonal).remember(first, trained).keys() == both


@pytest.mark.parametrize("space", Space)
@pytest.mark.parametrize("kind", KINDS)
def test_another_layout_than_the_remembered_one_is_refused(kind, space):
    first, trained, second = two_rounds(seed=0)
    name = f"{LAYERS[0]}.experts.up_proj.lora_A"
    second[name] = second[name][:, :1]
    with pytest.raises(ValueError, match=r"shapes of model\.layers\.0\.mlp\.experts\.up_proj\.lora_A differ"):
        second_start(retention(kind, space=space), first, trained, second)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_re_anchoring_added_to_an_idle_expert_shrinks_by_the_strength_a_round(strength):
    """The site trains it once, then never again; the server, which gives the site no say in it, keeps its value."""
    received, trained, _ = two_rounds(seed=0)
    method, leans = retention(RetentionKind.paper, strength), []
    for _ in range(4):
        start = method.start(received, method.remember(received, trained))
        leans.append(np.linalg.norm(vector(start, LAYERS[0], 1) - vector(received, LAYERS[0], 1)))
        trained = start
    np.testing.assert_allclose(np.divide(leans[1:], leans[:-1]), strength, rtol=1e-4)


def test_a_dense_model_has_nothing_to_retain():
    received = {"model.layers.0.self_attn.q_proj.lora_A": np.ones((2, 4), np.float32)}
    trained = {name: 2 * array for name, array in received.items()}
    method = retention(RetentionKind.paper)
    assert method.remember(received, trained) == {}
    assert second_start(method, received, trained, received) == received


def with_gate_proj(adapter, seed):
    """The same with a second projection of 4 to 3: an expert is both."""
    generator = np.random.default_rng(seed + 100)
    more = {f"{layer}.experts.gate_proj.lora_A": generator.normal(size=(NUM_EXPERTS, 2, 4)) for layer in LAYERS}
    more |= {f"{layer}.experts.gate_proj.lora_B": generator.normal(size=(NUM_EXPERTS, 3, 2)) for layer in LAYERS}
    return adapter | {name: array.astype(np.float32) for name, array in more.items()}


def products(adapter, layer, expert):
    """B A of an expert's projections."""
    prefixes = (f"{layer}.experts.{name}" for name in ("gate_proj", "up_proj"))
    pairs = ((adapter[f"{prefix}.lora_B"], adapter[f"{prefix}.lora_A"]) for prefix in prefixes)
    return [B[expert].astype(np.float64) @ A[expert] for B, A in pairs]


def flat(matrices):
    return np.concatenate([matrix.ravel() for matrix in matrices])


def truncated(matrix, rank=2):
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


@pytest.mark.parametrize("from_zero", [False, True])
@pytest.mark.parametrize("guard", [None, 1.1])
@pytest.mark.parametrize("kind", KINDS)
def test_in_products_every_kind_equals_its_formula_on_dense_matrices(kind, guard, from_zero):
    """Also where the first round began at B = 0, as every run's does."""
    adapters = [with_gate_proj(adapter, index) for index, adapter in enumerate(two_rounds(seed=3, update_scale=0.3))]
    if from_zero:
        adapters[0] = {name: 0 * array if name.endswith("lora_B") else array for name, array in adapters[0].items()}
    start = second_start(retention(kind, 0.8, guard, Space.product), *adapters)
    for layer, expert in experts():
        before, after, theta = (products(adapter, layer, expert) for adapter in adapters)
        added = 0.8 * naive_residual(kind, flat(theta), flat(after) - flat(before), flat(theta) - flat(before))
        if guard is not None and np.linalg.norm(flat(theta) + added) > guard * np.linalg.norm(flat(theta)):
            share = np.linspace(0, 1, 100001)[:, None]
            fitting = np.linalg.norm(flat(theta) + share * added, axis=1) <= guard * np.linalg.norm(flat(theta))
            added = added * share[fitting].max()
        parts = np.split(flat(theta) + added, [theta[0].size])
        expected = [truncated(part.reshape(matrix.shape)) for part, matrix in zip(parts, theta, strict=True)]
        np.testing.assert_allclose(flat(products(start, layer, expert)), flat(expected), rtol=1e-3, atol=1e-3)


def turned(adapter, seed=5):
    """Other factors of the same products."""
    generator, found = np.random.default_rng(seed), dict(adapter)
    for name in adapter:
        if name.endswith(".lora_A") and ".experts." in name:
            by = generator.normal(size=(2, 2)) + 2 * np.eye(2)
            found[name] = (by @ adapter[name]).astype(np.float32)
            B = name.removesuffix("A") + "B"
            found[B] = (adapter[B] @ np.linalg.inv(by)).astype(np.float32)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_in_products_it_does_not_matter_how_the_server_factors(kind):
    first, trained, second = (with_gate_proj(adapter, index) for index, adapter in enumerate(two_rounds(seed=3)))
    one, other = (
        second_start(retention(kind, space=Space.product), first, trained, received)
        for received in (second, turned(second))
    )
    in_factors = second_start(retention(kind), first, trained, turned(second))
    apart = []
    for layer, expert in experts():
        expected = flat(products(one, layer, expert))
        np.testing.assert_allclose(flat(products(other, layer, expert)), expected, rtol=1e-3, atol=1e-3)
        apart.append(np.linalg.norm(flat(products(in_factors, layer, expert)) - expected))
    assert max(apart) > 0.1


def test_in_products_a_small_residual_leaves_a_where_it_was():
    """Factors of one product are as many as rotations: the one nearest to what was received is taken."""
    first, trained, second = two_rounds(seed=3)
    for name in filter(lambda name: ".experts." in name and name.endswith("lora_A"), second):
        second[name] = np.linalg.qr(np.swapaxes(second[name], 1, 2))[0].swapaxes(1, 2).astype(np.float32)
    start = second_start(retention(RetentionKind.filtered, 1e-4, space=Space.product), first, trained, second)
    for name, array in second.items():
        assert abs(start[name] - array).max() < 2e-3, name


@pytest.mark.parametrize("kind", KINDS)
def test_in_products_an_expert_whose_last_update_was_zero_starts_as_received(kind):
    first, trained, second = (with_gate_proj(adapter, index) for index, adapter in enumerate(two_rounds(seed=3)))
    for name in trained:
        if name.startswith(LAYERS[0] + ".experts."):
            trained[name] = trained[name].copy()
            trained[name][1] = first[name][1]
    start = second_start(retention(kind, space=Space.product), first, trained, second)
    np.testing.assert_array_equal(vector(start, LAYERS[0], 1), vector(second, LAYERS[0], 1))


@pytest.mark.parametrize("guard", [None, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_in_products_nothing_is_added_to_an_expert_that_is_still_zero(kind, guard):
    """B = 0 at the start, and no step since: orthogonal alone adds the site's own update, if no guard forbids it."""
    first, trained, _ = (with_gate_proj(adapter, index) for index, adapter in enumerate(two_rounds(seed=3)))
    first = {name: np.zeros_like(array) if name.endswith("lora_B") else array for name, array in first.items()}
    start = second_start(retention(kind, 0.5, guard, Space.product), first, trained, first)
    for layer, expert in experts():
        own = 0.5 * flat(products(trained, layer, expert))
        expected = own if kind is RetentionKind.orthogonal and guard is None else np.zeros_like(own)
        np.testing.assert_allclose(flat(products(start, layer, expert)), expected, atol=1e-5)
        if not expected.any():
            np.testing.assert_array_equal(vector(start, layer, expert), vector(first, layer, expert))
