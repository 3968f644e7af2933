"""Where lines, ticks and labels of a chart stand."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.report.charts import PANEL, line_chart, nice_ticks, spread, tick_decimals

finite = st.floats(-1e6, 1e6)


def test_path_by_hand():
    """Rounds 0 to 2 span pixels 40 to 224; the axis from 1 to 2 spans 108 up to 10, 1.5 is half-way."""
    chart = line_chart("c", "title", [("a", "run-0", {0: 2.0, 1: 1.5, 2: 1.0})], PANEL, bounds=(1.0, 2.0))
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
    numbers = [float(word) for line in chart.lines for word in re.findall(r"-?[\d.]+", line.path)]
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
