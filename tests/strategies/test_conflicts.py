"""The rules on stacked updates (sites, experts, groups, values), by hand and one vector at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.conflicts import (
    ALONG_CONSENSUS,
    Against,
    Block,
    ConflictConfig,
    Granularity,
    Space,
    join,
    measures,
    resolve,
    scaled,
    split,
    step_scale,
)

seeds = st.integers(0, 2**32 - 1)


def stacked(*vectors):
    """One expert with one group: a row a site."""
    return np.array(vectors, np.float64)[:, None, None, :]


def resolved(updates, weights, against):
    """The step (experts, groups, values) that ``resolve`` makes of the updates, and its verdict."""
    factor, verdict = resolve(np.einsum("cegd,fegd->egcf", updates, updates), weights, against)
    return np.einsum("ceg,cegd->egd", factor, updates), verdict


def equal_weights(num_sites):
    return np.full((num_sites, 1), 1 / num_sites)


def random_case(seed, num_sites=4, num_experts=3, num_groups=2, width=5):
    rng = np.random.default_rng(seed)
    weights_CE = rng.uniform(0.1, 1, (num_sites, num_experts)) * (rng.random((num_sites, num_experts)) < 0.7)
    weights_CE[:, 0] = 0
    weights_CE = weights_CE / np.maximum(weights_CE.sum(axis=0), 1e-300)
    return rng.normal(size=(num_sites, num_experts, num_groups, width)), weights_CE


def test_consensus_by_hand():
    """Sites (5, 1) and (-3, 1), half each: g = (1, 1), of squared length 2. The second conflicts: <d, g> = -2.

    It becomes (-3, 1) + (2 / 2) (1, 1) = (-2, 2), and the sum half (5, 1) + half (-2, 2) = (1.5, 1.5) = 1.5 g.
    """
    step, verdict = resolved(stacked((5, 1), (-3, 1)), equal_weights(2), Against.consensus)
    np.testing.assert_allclose(step, [[[1.5, 1.5]]])
    np.testing.assert_array_equal(verdict.conflict[:, 0, 0], [False, True])


def test_others_by_hand():
    """The same sites, half each: (2.5, .5) and (-1.5, .5) oppose each other, <,> = -3.5, squares 6.5 and 2.5.

    First: (2.5, .5) + 3.5 / 2.5 (-1.5, .5) = (.4, 1.2). Second: (-1.5, .5) + 3.5 / 6.5 (2.5, .5).
    The consensus hides the first one's conflict; here both are seen.
    """
    step, verdict = resolved(stacked((5, 1), (-3, 1)), equal_weights(2), Against.others)
    second = np.array([-1.5, 0.5]) + 7 / 13 * np.array([2.5, 0.5])
    np.testing.assert_allclose(step[0, 0], np.array([0.4, 1.2]) + second)
    assert verdict.conflict.all()


def test_pairwise_by_hand():
    """PCGrad on (2, 0), (-1, 1) and (0, -1), a third each, in this order.

    (2, 0): opposes (-1, 1) by -2, + 2/2 (-1, 1) = (1, 1); that opposes (0, -1) by -1, + (0, -1) = (1, 0).
    (-1, 1): opposes (2, 0) by -2, + 2/4 (2, 0) = (0, 1); that opposes (0, -1), + (0, -1) = (0, 0).
    (0, -1): (2, 0) is orthogonal; opposes (-1, 1) by -1, + 1/2 (-1, 1) = (-.5, -.5).
    """
    step, verdict = resolved(stacked((2, 0), (-1, 1), (0, -1)), equal_weights(3), Against.pairwise)
    np.testing.assert_allclose(step[0, 0], [0.5 / 3, -0.5 / 3])
    assert verdict.conflict.all()


def test_off_reports_conflicts_and_leaves_them():
    step, verdict = resolved(stacked((5, 1), (-3, 1)), equal_weights(2), Against.off)
    np.testing.assert_allclose(step, [[[1, 1]]])
    np.testing.assert_array_equal(verdict.conflict[:, 0, 0], [False, True])


def naive_resolve(vectors, weights, against):
    """One expert and group: projected copies, in plain loops."""
    users = [i for i in range(len(vectors)) if weights[i] > 0]
    consensus = sum((weights[i] * vectors[i] for i in users), np.zeros_like(vectors[0]))
    step = np.zeros_like(consensus)
    for i in users:
        others = [j for j in users if j != i]
        references = {
            Against.consensus: [consensus],
            Against.others: [sum((weights[j] * vectors[j] for j in others), np.zeros_like(consensus))],
            Against.pairwise: [vectors[j] for j in others],
            Against.off: [],
        }[against]
        projected = vectors[i].copy()
        for reference in references:
            if projected @ reference < 0:
                projected = projected - (projected @ reference) / (reference @ reference) * reference
        step += weights[i] * projected
    return step


@pytest.mark.parametrize("against", Against)
@given(seed=seeds)
def test_rules_are_those_of_one_vector_at_a_time(against, seed):
    updates, weights = random_case(seed)
    step, _ = resolved(updates, weights, against)
    for e in range(3):
        for g in range(2):
            np.testing.assert_allclose(step[e, g], naive_resolve(updates[:, e, g], weights[:, e], against), atol=1e-9)


@pytest.mark.parametrize("against", Against)
@given(seed=seeds)
def test_without_conflict_every_rule_is_the_weighted_mean(against, seed):
    updates, weights = random_case(seed)
    updates = abs(updates)
    step, verdict = resolved(updates, weights, against)
    np.testing.assert_allclose(step, np.einsum("ce,cegd->egd", weights, updates), atol=1e-12)
    assert not verdict.conflict.any()


@pytest.mark.parametrize("against", Against)
def test_one_user_is_that_user(against):
    """The second site did not use the expert: what it sends must neither count nor be tested against."""
    updates = stacked((1, 2), (-7, -9))
    step, verdict = resolved(updates, np.array([[1.0], [0.0]]), against)
    np.testing.assert_array_equal(step[0, 0], [1, 2])
    assert not verdict.conflict.any()


@pytest.mark.parametrize("against", Against)
def test_exactly_opposite_updates_cancel(against):
    """The consensus is zero: it gives no direction to project on, and nothing to divide by."""
    step, verdict = resolved(stacked((3, 4), (-3, -4)), equal_weights(2), against)
    np.testing.assert_allclose(step, np.zeros((1, 1, 2)), atol=1e-15)
    found = measures([verdict], equal_weights(2), np.full((2, 1), 5.0))
    assert np.isnan(found["scale"]).all()
    assert np.isnan(found["cosine"]).all()


@pytest.mark.parametrize("width", [2, 4, 96])
@pytest.mark.parametrize("against", Against)
def test_what_rounding_leaves_of_cancelling_updates_is_no_direction(against, width):
    """d_3 = -(d_1 + 2 d_2) / 4, rounded: projected on what that leaves, steps would be up to 1e9 times as long."""
    weights = np.array([[1.0], [2.0], [4.0]]) / 7 * np.ones(500)
    updates = np.random.default_rng(0).normal(size=(3, 500, 1, width)).astype(np.float32)
    updates[2] = -(updates[0] + 2 * updates[1]) / 4
    block = Block(np.ascontiguousarray(np.moveaxis(updates, 0, 2)))
    factor, _ = resolve(block.gram(), weights, against)
    steps = [block.weighted(factor)]
    if against in ALONG_CONSENSUS:
        consensus = block.weighted(weights[..., None])
        scale, verdict = scaled(block.dots(consensus), block.squared, weights, against)
        assert np.isnan(measures([verdict], weights, np.sqrt(block.squared[..., 0]))["scale"]).all()
        steps.append(scale[..., None] * consensus)
    longest = np.sqrt(block.squared.max(axis=0))
    bound = 1e-5 if against in ALONG_CONSENSUS else 3.0
    assert all((np.linalg.norm(step, axis=-1) <= bound * longest).all() for step in steps)


@pytest.mark.parametrize("residual", [0.0, 1e-5, 3e-4, 3e-3])
def test_what_rounding_leaves_of_the_others_is_no_direction(residual):
    """Two of three cancel but for a little: what the third is projected on points nowhere."""
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(3, 2000, 1, 96)).astype(np.float32)
    updates[2] = -updates[1] + np.float32(residual) * rng.normal(size=updates[1].shape).astype(np.float32)
    block = Block(np.ascontiguousarray(np.moveaxis(updates, 0, 2)))
    factor, _ = resolve(block.gram(), np.full((3, 2000), 1 / 3), Against.others)
    longest = np.sqrt(block.squared.max(axis=0))
    assert (np.linalg.norm(block.weighted(factor), axis=-1) < longest).all()


@pytest.mark.parametrize("against", Against)
def test_no_update_gives_no_step(against):
    step, _ = resolved(np.zeros((2, 1, 1, 3)), equal_weights(2), against)
    assert not step.any()


@given(seeds)
def test_scale_is_at_least_one_and_grows_with_conflicts_only(seed):
    updates, weights = random_case(seed)
    consensus = np.einsum("ce,cegd->egd", weights, updates)
    dots = np.einsum("cegd,egd->ceg", updates, consensus)
    scale = step_scale(dots, (consensus**2).sum(-1), weights)
    in_conflict = ((dots < 0) & (weights > 0)[..., None]).any(axis=0)
    assert (scale[~in_conflict] == 1).all()
    assert (scale[in_conflict] > 1).all()


def test_measures_by_hand():
    """d = (5, 1) and (-3, 1), g = (1, 1): cosines 6 / sqrt(26 * 2) and -2 / sqrt(10 * 2), scale 1.5.

    The same vectors in two groups of one value: the first coordinates 5 and -3 conflict (g = 1, s = 1.5, scale
    2.5), the second ones do not (scale 1): mean scale (2.5 * 1 + 1 * 1) / 2, half of the groups in conflict.
    """
    vectors = np.array([(5.0, 1.0), (-3.0, 1.0)])
    norms = np.linalg.norm(vectors, axis=1)[:, None]
    cosine = [[6 / np.sqrt(52)], [-2 / np.sqrt(20)]]
    for groups, conflict, scale in ((1, [[0], [1]], 1.5), (2, [[0], [0.5]], 1.75)):
        _, verdict = resolved(vectors.reshape(2, 1, groups, -1), equal_weights(2), Against.consensus)
        found = measures([verdict], equal_weights(2), norms)
        np.testing.assert_allclose(found["cosine"], cosine)
        np.testing.assert_allclose(found["conflict"], conflict)
        np.testing.assert_allclose(found["scale"], [scale])


NAMES = ["l.experts.down.lora_A", "l.experts.down.lora_B", "l.experts.up.lora_A", "l.experts.up.lora_B"]
SHAPES = [(2, 3), (5, 2), (2, 4), (6, 2)]


@pytest.mark.parametrize(
    ("granularity", "expected"),
    [
        (Granularity.expert, [(4, (1, 6 + 10 + 8 + 12))]),
        (Granularity.matrix, [(2, (1, 6 + 10)), (2, (1, 8 + 12))]),
        (Granularity.component, [(2, (2, 3 + 5)), (2, (2, 4 + 6))]),
        (Granularity.row, [(1, (2, 3)), (1, (5, 2)), (1, (2, 4)), (1, (6, 2))]),
    ],
)
def test_groups_are_experts_matrices_ranks_or_rows(granularity, expected):
    adapter = {name: np.zeros((3, *shape)) for name, shape in zip(NAMES, SHAPES, strict=True)}
    blocks = split(adapter, [adapter] * 7, granularity)
    shapes = {names: block.updates.shape for names, block in blocks.items()}
    assert [(len(names), (shape[1], shape[3])) for names, shape in shapes.items()] == expected
    assert all((shape[0], shape[2]) == (3, 7) for shape in shapes.values())


@pytest.mark.parametrize("granularity", Granularity)
def test_join_undoes_split(granularity):
    rng = np.random.default_rng(0)
    before, after = (
        {name: rng.normal(size=(3, *shape)).astype(np.float32) for name, shape in zip(NAMES, SHAPES, strict=True)}
        for _ in range(2)
    )
    joined = {}
    for names, block in split(before, [before, after], granularity).items():
        joined |= join(names, block.updates[:, :, 1], before, granularity)
        expected = np.einsum("egcd,egbd->egcb", block.updates, block.updates)
        np.testing.assert_allclose(block.gram(), expected, rtol=1e-5)
    assert joined.keys() == before.keys()
    for name in before:
        np.testing.assert_array_equal(joined[name], after[name] - before[name])


@pytest.mark.parametrize("against", sorted(ALONG_CONSENSUS, key=str))
@pytest.mark.parametrize("width", [5, 96, 2 * 1024 + 512])
def test_along_the_consensus_no_inner_products_of_sites_are_needed(against, width):
    updates, weights = random_case(seed=width, width=width)
    block = Block(np.moveaxis(updates, 0, 2).astype(np.float32))
    factor, expected = resolve(block.gram(), weights, against)
    consensus = block.weighted(weights[..., None])
    scale, verdict = scaled(block.dots(consensus), block.squared, weights, against)
    np.testing.assert_allclose(scale[..., None] * consensus, block.weighted(factor), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(verdict.dots, expected.dots, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(verdict.along, expected.along, rtol=1e-4)
    np.testing.assert_array_equal(verdict.conflict, expected.conflict)
    np.testing.assert_allclose(block.squared, (updates**2).sum(axis=-1), rtol=1e-5)


def test_rows_of_a_bias_are_one_group():
    bias = {"l.experts.up_bias": np.zeros((3, 5))}
    (block,) = split(bias, [bias] * 7, Granularity.row).values()
    assert block.updates.shape == (3, 1, 7, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"granularity": Granularity.component},
            "strategy.conflict.granularity must be expert or matrix with strategy.conflict.space=product, got "
            "'component'",
        ),
        ({"granularity": Granularity.row}, "strategy.conflict.granularity must be .* got 'row'"),
    ],
)
def test_product_space_refuses_what_it_cannot_do(settings, message):
    ConflictConfig(**settings)
    with pytest.raises(ValueError, match=message):
        ConflictConfig(space=Space.product, **settings)
