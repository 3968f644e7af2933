"""Bounds on what a reply says of its site."""

import math

import pytest

from client.foreign import LARGEST_METRIC, LONGEST_NAME, MOST_METRICS, check_metrics, checked_name


def test_metrics_within_bounds_pass():
    check_metrics({f"lambda/{i}": (-1) ** i * LARGEST_METRIC for i in range(MOST_METRICS)})
    check_metrics({})


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({str(i): 0.0 for i in range(201)}, "^201 metrics; at most 200 are possible$"),
        ({"x" * 201: 0.0}, "^a metric's name must be at most 200 printable characters, got 'xxxx"),
        ({"a\nb": 0.0}, r"printable characters, got 'a\\nb'$"),
        ({"dropped": 1.0}, "^metric dropped has the name of a column of the server's own$"),
        ({"rejected": 1.0}, "^metric rejected has"),
        ({"train_loss": math.nan}, r"^metric train_loss is nan; it must be finite and at most 1e\+18$"),
        ({"train_loss": 1e308}, r"^metric train_loss is 1e\+308; "),
    ],
)
def test_metrics_out_of_bounds_are_named(metrics, told):
    with pytest.raises(ValueError, match=told):
        check_metrics(metrics)


def test_name_comes_back_or_is_refused():
    assert checked_name("a name", "ward-7") == "ward-7"
    for name in ("x" * (LONGEST_NAME + 1), "a\nBOUQUET {}", "a\x1b[2J"):
        with pytest.raises(ValueError, match="a name must be at most 200 printable characters"):
            checked_name("a name", name)
