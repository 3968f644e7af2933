import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies import experts

A = "model.layers.0.mlp.experts.gate_up_proj.lora_A"
B = "model.layers.0.mlp.experts.gate_up_proj.lora_B"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (A, "model.layers.0.mlp"),
        ("model.layers.11.mlp.experts.down_proj", "model.layers.11.mlp"),
        ("model.layers.1.block_sparse_moe.experts.up.lora_B", "model.layers.1.block_sparse_moe"),
    ],
)
def test_expert_arrays_know_their_layer(name, layer):
    assert experts.is_expert_array(name)
    assert experts.layer_of(name) == layer


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.lora_A",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.shared_experts.up_proj.lora_A",
    ],
)
def test_attention_routers_and_shared_experts_have_no_expert_axis(name):
    assert not experts.is_expert_array(name)
    with pytest.raises(ValueError, match="has no expert axis"):
        experts.layer_of(name)


def test_by_layer_groups_expert_arrays_only():
    names = [B, A, "model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.lora_A"]
    layers = experts.by_layer({name: np.zeros((2, 1)) for name in names})
    assert {layer: list(arrays) for layer, arrays in layers.items()} == {
        "model.layers.0.mlp": [A, B],
        "model.layers.1.mlp": ["model.layers.1.mlp.experts.down_proj"],
    }


@given(st.integers(0, 2**32 - 1))
def test_dots_are_those_of_flattened_experts(seed):
    rng = np.random.default_rng(seed)
    left, right = ({A: rng.normal(size=(3, 2, 4)), B: rng.normal(size=(3, 5, 2))} for _ in range(2))
    for e in range(3):
        flat = [np.concatenate([arrays[A][e].ravel(), arrays[B][e].ravel()]) for arrays in (left, right)]
        np.testing.assert_allclose(experts.dots(left, right)[e], flat[0] @ flat[1], rtol=1e-10)
        np.testing.assert_allclose(experts.norms(left)[e], np.linalg.norm(flat[0]), rtol=1e-10)


def test_shares_sum_to_one_or_are_zero():
    """Column 0: 1 and 3 of 4; column 1: nobody; column 2: only the first."""
    shares = experts.shares(np.array([[1.0, 0, 5], [3, 0, 0]]))
    np.testing.assert_array_equal(shares, [[0.25, 0, 1], [0.75, 0, 0]])


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_shares_rejects_what_is_no_weight(value):
    with pytest.raises(ValueError, match="importance must be finite and >= 0"):
        experts.shares(np.array([[1.0], [value]]))


def test_each_expert_has_its_own_mean():
    """Expert 0: (1 * 4 + 3 * 8) / 4 = 7. Expert 1: only the second site, 9. Expert 2: nobody, stays 5."""
    received = {"l.experts.w": np.full((3, 2), 5, np.float32)}
    trained = [{"l.experts.w": np.full((3, 2), 1, np.float32) * value} for value in ([[4], [6], [7]], [[8], [9], [0]])]
    mean = experts.weighted_mean(received, trained, np.array([[1.0, 0, 0], [3, 2, 0]]))
    np.testing.assert_array_equal(mean["l.experts.w"], [[7, 7], [9, 9], [5, 5]])


def test_weighted_mean_rejects_weights_of_another_shape():
    received = {"l.experts.w": np.ones((3, 2), np.float32)}
    with pytest.raises(ValueError, match=r"\(sites, experts\) = \(1, 3\), got \(1, 2\)"):
        experts.weighted_mean(received, [received], np.ones((1, 2)))


def test_arrays_of_one_layer_must_agree_on_the_number_of_experts():
    with pytest.raises(ValueError, match="same number of experts"):
        experts.num_experts({"l.experts.a": np.ones((2, 1)), "l.experts.b": np.ones((3, 1))})


@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 100))
def test_slices_cover_every_expert_once_within_the_limit_and_are_alike(count, num_sites, limit):
    slices = experts.expert_slices({"l.experts.w": np.zeros((count, 5))}, num_sites, limit)
    assert [e for chosen in slices for e in range(count)[chosen]] == list(range(count))
    sizes = [chosen.stop - chosen.start for chosen in slices]
    assert max(sizes) == 1 or max(sizes) * num_sites * 5 <= limit
    assert max(sizes) - min(sizes) <= 1
