"""Where lines, ticks and labels of a chart stand."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report.charts import (
    LARGE,
    PANEL,
    alike_ticks,
    line_chart,
    nice_ticks,
    shortened,
    spread,
    tick_decimals,
    tick_text,
)

finite = st.floats(-1e6, 1e6)


def test_path_by_hand():
    """Rounds 0 to 2 span pixels 40 to 224; the axis from 1 to 2 spans 108 up to 10, 1.5 is half-way."""
    chart = line_chart("c", "title", [("a", "run-0", {0: 2.0, 1: 1.5, 2: 1.0})], PANEL, ticks=(1.0, 1.5, 2.0))
    assert chart.lines[0].path == "M40 10L132 59L224 108"
    assert chart.lines[0].end == (224.0, 108.0)
    assert chart.x.ticks == (0, 1, 2)


def test_line_goes_on_where_a_site_was_not_asked_and_values_tell_it():
    (line, _) = line_chart("c", "t", [("a", "", {1: 1.0, 3: 2.0}), ("b", "", {2: 1.5})], PANEL).lines
    assert line.values == [1.0, None, 2.0]
    assert line.last == 2.0
    assert len(re.findall("[ML]", line.path)) == 2


def test_chart_of_nothing_is_none():
    assert line_chart("c", "t", [("a", "", {})], PANEL) is None


@given(st.dictionaries(st.integers(0, 300), finite, min_size=1), st.dictionaries(st.integers(0, 300), finite))
def test_everything_stays_inside_the_chart(first, second):
    chart = line_chart("c", "t", [("a", "", first), ("b", "", second)], PANEL)
    paths = [line.path.removesuffix("h0") for line in chart.lines]
    numbers = [float(word) for path in paths for word in re.findall(r"-?[\d.]+", path)]
    assert all(PANEL.left <= x <= PANEL.width - PANEL.right for x in numbers[::2])
    assert all(PANEL.top <= y <= PANEL.height - PANEL.bottom for y in numbers[1::2])
    ticks = [chart.x.at(tick) for tick in chart.x.ticks]
    assert all(after - before >= 20 for before, after in pairwise(ticks))


@given(finite, finite, st.integers(2, 6))
def test_ticks_enclose_the_values_evenly_and_read_apart(one, other, count):
    low, high = sorted((one, other))
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= count + 3
    steps = [after - before for before, after in pairwise(ticks)]
    assert max(steps) - min(steps) <= 1e-6 * max(steps) + slack
    if steps[0] > 1e-3:
        assert len({f"{tick:.{tick_decimals(ticks)}f}" for tick in ticks}) == len(ticks)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, (0, 0.2, 0.4, 0.6, 0.8, 1)), (0.9, 3.1, (0.5, 1, 1.5, 2, 2.5, 3, 3.5))]
)
def test_ticks_by_hand(low, high, expected):
    assert nice_ticks(low, high, 5) == pytest.approx(expected)


@given(st.lists(st.floats(0, 200), max_size=8))
def test_labels_stand_apart_in_their_order_and_inside(positions):
    moved = spread(positions, 15.0, 0.0, 200.0)
    order = sorted(range(len(positions)), key=positions.__getitem__)
    assert all(moved[after] - moved[before] >= 14.8 for before, after in pairwise(order))
    assert all(-0.1 <= place <= 200.1 for place in moved)


def test_labels_with_room_stay_where_they_are():
    assert spread([100.0, 10.0, 50.0], 15.0, 0.0, 200.0) == [100.0, 10.0, 50.0]
    assert spread([50.0, 50.0], 15.0, 0.0, 200.0) == [50.0, 65.0]
    assert math.isclose(spread([195.0, 198.0], 15.0, 0.0, 200.0)[1], 200.0)


def test_labels_of_close_values_have_room_on_the_left():
    """Ticks of five decimals are seven characters wide."""
    wide = line_chart("c", "c", [("a", "s", {0: 0.13938, 1: 0.13944})], PANEL)
    assert wide.decimals >= 5
    assert wide.size.left >= 7 * len(f"{wide.y.ticks[0]:.{wide.decimals}f}") + 6
    assert wide.x.start == wide.size.left
    assert line_chart("c", "c", [("a", "s", {0: 1.0, 1: 2.0})], PANEL).size == PANEL


def test_single_point_is_a_line_of_no_length():
    """Nothing is drawn of a path that only moves."""
    (line,) = line_chart("c", "c", [("a", "s", {0: 1.0})], PANEL).lines
    assert re.fullmatch(r"M[\d.]+ [\d.]+h0", line.path)


def test_label_of_a_line_that_ends_early_stands_in_the_margin_with_a_leader():
    chart = line_chart("c", "c", [("a", "s", {0: 1.0, 1: 2.0}), ("b", "s", {0: 1.0, 4: 1.5})], LARGE)
    early, whole = chart.lines
    assert whole.leader == ""
    assert early.leader == f"M{early.end[0] + 4:g} {early.end[1]:g}L{chart.label_x - 3} {early.label_y:g}"
    assert chart.label_x > chart.x.end > early.end[0]


ends = st.tuples(st.floats(-1e5, 1e5), st.floats(0, 1e3)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(st.lists(ends, min_size=1, max_size=9))
def test_axes_of_one_span_hold_their_own_values(ranges):
    every = alike_ticks(ranges, 3)
    spans = [ticks[-1] - ticks[0] for ticks in every]
    assert max(spans) - min(spans) <= 1e-6 * max(spans)
    assert len({len(ticks) for ticks in every}) == 1
    for (low, high), ticks in zip(ranges, every, strict=True):
        slack = 1e-6 * max(1.0, abs(low), abs(high))
        assert ticks[0] - slack <= low <= high <= ticks[-1] + slack


def test_axes_of_one_span_by_hand():
    """The widest, 3 to 5, has steps of 1; the other one has as many around 9.2."""
    assert alike_ticks([(3.0, 5.0), (9.2, 9.3)], 3) == [(3.0, 4.0, 5.0), (9.0, 10.0, 11.0)]


def test_losses_through_the_roof_still_make_a_chart():
    chart = line_chart("c", "c", [("a", "s", {0: 1.0, 1: 1e30})], PANEL)
    assert chart.tick(chart.y.ticks[-1]) == "1.00e+30"
    assert (tick_text(2.5, 1), tick_text(999_999, 0), tick_text(-3e6, 0)) == ("2.5", "999999", "-3.00e+06")


@pytest.mark.parametrize(
    ("text", "most", "short"), [("fc_moe-seed-120", 10, "fc_mo…-120"), ("abcdefghij", 10, "abcdefghij"), ("", 3, "")]
)
def test_names_are_shortened_in_the_middle(text, most, short):
    assert shortened(text, most) == short
    assert len(short) <= most
