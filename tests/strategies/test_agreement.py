"""How far FC-MoE plus goes, by what sites had in common in the last round."""

from dataclasses import replace

import numpy as np
import pytest

from strategies.base import ClientUpdate
from strategies.fc_moe_plus import FcMoePlus
from tests.strategies.naive_fc_moe import LAYERS


def one_layer(*updates):
    """A round of whole experts of zeros in which each site's update of the only expert is given, (O, I)."""
    name, tokens = f"{LAYERS[0]}.experts.up_proj", {LAYERS[0]: np.ones(1)}
    trained = [np.array(update, np.float32)[None] for update in updates]
    return {name: np.zeros_like(trained[0])}, [
        ClientUpdate(site=f"{i}", adapter={name: array}, num_examples=1, expert_tokens=tokens)
        for i, array in enumerate(trained)
    ]


@pytest.mark.parametrize(
    ("cosine", "taken"),
    [
        (1.0, 1.0),  # all of the mean is common
        (1 / 7, 1.0),  # 2 p / (1 + p) = 1/4, half of what one of two sites weighs, and so as much as is asked for
        (1 / 15, 0.5),  # 1/8
        (0.0, 0.25),  # never less
        (-0.9, 0.25),
    ],
)
def test_step_is_taken_as_far_as_the_sites_had_something_in_common(cosine, taken):
    """Two sites whose updates had that cosine in the last round; in this one they are orthogonal. At first: half."""
    adapter, last = one_layer([[1.0, 0.0]], [[cosine, np.sqrt(1 - cosine**2)]])
    rule = FcMoePlus(flatten=0.0, momentum=0.0, step=1.0, agreement=0.5)
    state = rule.aggregate(adapter, {}, last).state
    assert [array.item() for array in state.values()] == [pytest.approx(cosine, abs=1e-6)]
    _, updates = one_layer([[4.0, 0.0]], [[0.0, 4.0]])
    (stepped,) = rule.aggregate(adapter, state, updates).adapter.values()
    np.testing.assert_allclose(stepped[0], taken * np.array([[2.0, 2.0]]), rtol=1e-5)
    (begun,) = rule.aggregate(adapter, {}, updates).adapter.values()
    np.testing.assert_allclose(begun[0], [[1.0, 1.0]], rtol=1e-5)
    (whole,) = replace(rule, agreement=None).aggregate(adapter, state, updates).adapter.values()
    np.testing.assert_allclose(whole[0], [[2.0, 2.0]], rtol=1e-5)
    # As much as three of two sites is all there is.
    (of_all,) = replace(rule, agreement=3.0).aggregate(adapter, state, updates).adapter.values()
    np.testing.assert_allclose(of_all[0], np.full((1, 2), 2 * max(0.25, 2 * max(cosine, 0) / (1 + cosine))), rtol=1e-5)


@pytest.mark.parametrize(("cosine", "taken"), [(1.0, 1.0), (1 / 15, 0.5), (0.0, 0.25), (None, 0.5)])
def test_spectrum_is_flattened_as_far_as_the_sites_had_something_in_common(cosine, taken):
    """Two sites send the same diagonal update, 8 and 1 long: of the ratio 8 remains 8^(1 - taken). None: at first."""
    adapter, updates = one_layer(*2 * [np.diag([8.0, 1.0])])
    rule = FcMoePlus(momentum=0.0, agreement=0.5)
    state = {} if cosine is None else {"pair_cosine": np.array([cosine])}
    (stepped,) = rule.aggregate(adapter, state, updates).adapter.values()
    assert stepped[0, 0, 0] / stepped[0, 1, 1] == pytest.approx(8 ** (1 - taken), rel=1e-5)
    (half,) = replace(rule, flatten=0.5).aggregate(adapter, state, updates).adapter.values()
    assert half[0, 0, 0] / half[0, 1, 1] == pytest.approx(8 ** (1 - taken / 2), rel=1e-5)
    (always,) = replace(rule, agreement=None).aggregate(adapter, state, updates).adapter.values()
    assert always[0, 0, 0] == pytest.approx(always[0, 1, 1], rel=1e-5)


@pytest.mark.parametrize("num_sites", [2, 3, 10])
def test_step_is_whole_where_what_is_common_weighs_as_much_as_one_site(num_sites):
    """Sites along their own axes and, by sqrt(p), a common one: of their mean's squared length p is common, a C-th.

    C p / (1 + (C - 1) p) = 1 / C gives p = 1 / (C^2 - C + 1).
    """
    p = 1 / (num_sites**2 - num_sites + 1)
    own, common = np.eye(num_sites), np.ones((num_sites, 1))
    adapter, updates = one_layer(*np.hstack([np.sqrt(p) * common, np.sqrt(1 - p) * own])[:, None])
    rule = FcMoePlus(flatten=0.0, momentum=0.0, step=1.0)
    state = rule.aggregate(adapter, {}, updates).state
    mean = np.mean([update.adapter[f"{LAYERS[0]}.experts.up_proj"] for update in updates], axis=0)
    assert p == pytest.approx((mean**2).sum() / num_sites)
    lengths = []
    for in_common in (1.01, 1.0, 0.9):
        known = {"pair_cosine": in_common * state["pair_cosine"]}
        (stepped,) = rule.aggregate(adapter, known, updates).adapter.values()
        lengths.append(np.linalg.norm(stepped))
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-5)
    assert lengths[2] < 0.999 * lengths[1]


def test_an_expert_of_one_site_is_taken_whole_whatever_was_in_common():
    adapter, (update,) = one_layer([[4.0, 0.0]])
    state = {"pair_cosine": np.array([-0.5])}
    (stepped,) = FcMoePlus(flatten=0.0).aggregate(adapter, state, [update]).adapter.values()
    np.testing.assert_allclose(stepped, update.adapter[f"{LAYERS[0]}.experts.up_proj"])
    # Nothing was learnt of what sites have in common: what was known stays.
    assert FcMoePlus(momentum=0.0).aggregate(adapter, state, [update]).state == state
    earlier = {f"previous/{name}": array - 1 for name, array in adapter.items()}
    (stepped,) = FcMoePlus(flatten=0.0, momentum=0.5).aggregate(adapter, state | earlier, [update]).adapter.values()
    np.testing.assert_allclose(stepped[0], [[4.5, 0.5]])
    # A site that changed nothing has no say, nor is it somebody to differ from.
    adapter, both = one_layer([[4.0, 0.0]], [[0.0, 0.0]])
    (stepped,) = FcMoePlus(flatten=0.0, step=1.0).aggregate(adapter, state, both).adapter.values()
    np.testing.assert_allclose(stepped[0], [[4.0, 0.0]])
