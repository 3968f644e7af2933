import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from strategies.adapters import (
    LARGEST,
    check_finite,
    check_same_layout,
    check_size,
    difference,
    dot,
    norm,
    spread,
    weighted_mean,
)

adapters = st.builds(lambda a: {"w": a}, arrays(np.float32, (2, 3), elements=st.floats(-100, 100, width=32)))
weights = st.floats(0.1, 100)


@given(st.lists(st.tuples(adapters, weights), min_size=1, max_size=6))
def test_weighted_mean_lies_between_its_terms(pairs):
    terms, w = zip(*pairs, strict=True)
    mean = weighted_mean(terms, w)["w"]
    assert mean.dtype == np.float32
    assert (mean >= np.min([t["w"] for t in terms], axis=0) - 1e-4).all()
    assert (mean <= np.max([t["w"] for t in terms], axis=0) + 1e-4).all()


@given(adapters, st.lists(weights, min_size=1, max_size=5))
def test_weighted_mean_of_equal_terms_is_that_term(term, w):
    np.testing.assert_allclose(weighted_mean([term] * len(w), w)["w"], term["w"], rtol=1e-6)


def test_weighted_mean_sums_in_float64():
    """(2**24 + 1 + 1 + 1) / 4 = 4194304.75; float32 would drop each 1 that it adds to 2**24."""
    terms = [{"w": np.array([value], np.float32)} for value in (2.0**24, 1, 1, 1)]
    assert weighted_mean(terms, [1, 1, 1, 1])["w"] == np.float32(4194304.75)


@pytest.mark.parametrize(
    ("w", "message"),
    [([0, 0], "all 0"), ([-1, 2], ">= 0"), ([float("nan"), 1], "finite"), ([1], "2 terms but 1 weights")],
)
def test_weighted_mean_rejects_bad_weights(w, message):
    with pytest.raises(ValueError, match=message):
        weighted_mean([{"w": np.ones(1)}] * 2, w)


def test_weighted_mean_rejects_nothing():
    with pytest.raises(ValueError, match="0 terms"):
        weighted_mean([], [])


def test_other_ranks_are_not_broadcast():
    with pytest.raises(ValueError, match=r"shapes of lora_A differ: \(8, 4\) and \(1, 4\)"):
        weighted_mean([{"lora_A": np.ones((8, 4))}, {"lora_A": np.ones((1, 4))}], [1, 1])


def test_other_names_are_named():
    with pytest.raises(ValueError, match=r"array names differ: \['b', 'c'\]"):
        check_same_layout({"a": np.ones(1), "b": np.ones(1)}, {"a": np.ones(1), "c": np.ones(1)})


def test_difference_dot_and_norm_treat_all_arrays_as_one_vector():
    """(5, 1, 2) - (2, 1, -2) = (3, 0, 4), of length 5; its product with (1, 1, 1) is 7."""
    left = {"a": np.array([5.0, 1.0]), "b": np.array([[2.0]])}
    change = difference(left, {"a": np.array([2.0, 1.0]), "b": np.array([[-2.0]])})
    assert norm(change) == 5
    assert dot(change, {"a": np.ones(2), "b": np.ones((1, 1))}) == 7


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_finite_names_the_array(value):
    with pytest.raises(ValueError, match="bad holds NaN or infinity"):
        check_finite({"good": np.ones(2), "bad": np.array([1.0, value])})


def test_check_size_names_the_array_its_value_and_the_limit():
    check_size({"empty": np.zeros((0, 2)), "edge": np.array([-LARGEST, LARGEST])})
    for value, message in [
        (2e6, "bad holds 2e\\+06; weights must be at most 1e\\+06"),
        (np.nan, "bad holds NaN or inf"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_size({"good": np.ones(2), "bad": np.array([1.0, -value])})


def test_spread_is_the_mean_squared_distance_to_the_mean():
    """Two arrays at -1 and +1 of their mean in one value, and at -2 and +2 in another: 1 + 4."""
    left, right = {"a": np.array([1.0]), "b": np.array([[0.0]])}, {"a": np.array([3.0]), "b": np.array([[4.0]])}
    assert spread([left, right]) == 5
    assert spread([left]) == spread([left] * 3) == 0
    with pytest.raises(ValueError, match="names differ"):
        spread([left, {"a": np.array([1.0])}])
