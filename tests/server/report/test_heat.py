"""Colours and texts of cells, and that the colours can be read by everybody in both themes."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import server.report
from server.report.heat import Scale, around, cosines, count_text, flat, from_zero, near, round_up
from server.report.page import MAX_RUNS

COSINE = Scale("d", -1.0, 1.0, "fixed")
STYLE = (Path(server.report.__file__).parent / "page" / "report.css").read_text()


@pytest.mark.parametrize(
    ("value", "colour", "text"),
    [
        (-1.0, "d0", "\u22121.00"), (0.0, "d5", "0.00"), (-0.001, "d5", "0.00"), (1.0, "d10", "1.00"),
        (7.0, "d10", "7.00"), (-7.0, "d0", "\u22127.00"), (0.125, "d6", "0.13"), (None, "n", "·"),
    ],
)  # fmt: skip
def test_cell_by_hand(value, colour, text):
    """Eleven colours for -1 to 1: the middle one from -1/11 to 1/11. 0.125 is a half and goes away from zero."""
    assert (COSINE.colour(value), COSINE.text(value)) == (colour, text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1250, "1.3k"), (9940, "9.9k"), (12345, "12k"), (2_500_000, "2.5M"), (2.5e9, "2500M")],
)
def test_counts_are_short(value, text):
    assert count_text(value) == text


@given(st.lists(st.floats(0, 1e9), max_size=9), st.floats(0.01, 10))
def test_scale_holds_its_values_and_its_ends_are_round(values, least):
    scale = around(1.0, values, least)
    assert scale.low + scale.high == pytest.approx(2.0)
    assert all(scale.low - 1e-6 <= value <= scale.high * (1 + 1e-9) for value in values)
    assert scale.high - 1.0 >= least * (1 - 1e-9)
    top = from_zero(values, "count", 1.0).high
    assert all(value <= top * (1 + 1e-9) for value in values)
    assert f"{top:.6e}"[:3] in {"1.0", "1.5", "2.0", "2.5", "3.0", "4.0", "5.0", "7.5"}


@pytest.mark.parametrize(("value", "up"), [(0.3, 0.3), (0.31, 0.4), (9.1, 10.0), (1.0, 1.0), (120.0, 150.0)])
def test_round_numbers_by_hand(value, up):
    assert round_up(value) == pytest.approx(up)


def test_one_value_far_out_does_not_set_the_scale():
    """Distances 0.6, 0, 0.6 and 249: the median is 0.6, so 7 would stay and 250 does not; it has the last colour."""
    values = near(1.0, [0.4, 1.0, 1.6, 250.0])
    assert values == [0.4, 1.0, 1.6]
    assert [around(1.0, values, 0.1).colour(value) for value in (0.4, 1.0, 1.6, 250.0)] == ["d1", "d5", "d9", "d10"]
    assert near(1.0, [7.0, 1.6, 0.4]) == [7.0, 1.6, 0.4]
    assert near(1.0, []) == []


def test_scale_of_cosines_is_of_what_most_span():
    """Distances 0.1, 0.2 and 3: the median is 0.2, so 3 is far out; from 0.25 on, and never beyond 1."""
    assert (cosines([0.1, -0.2]).low, cosines([0.1, -0.2]).high) == (-0.25, 0.25)
    assert cosines([0.1, -0.4, 0.3]).high == 0.4
    assert cosines([0.01] * 5 + [0.9]).high == 0.25
    assert cosines([0.99, -1.0]).high == cosines([1.2]).high == 1.0
    assert cosines([]).middle == 0.0


def test_small_shares_read_apart():
    """1/60 and 1/45 are 2 % both."""
    scale = from_zero([1 / 45], "share", 0.05)
    assert [scale.text(value) for value in (1 / 60, 1 / 45, 0.125, None)] == ["1.7%", "2.2%", "12.5%", "·"]


def test_numbers_of_nested_lists_come_without_gaps():
    assert flat([[1, None], [[2.5]], []]) == [1.0, 2.5]
    assert flat(None) == []


def themes():
    """Custom property -> linear RGB, of the light theme and of the dark one."""
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")
    found = []
    for text in (light, dark.split("* { box-sizing")[0]):
        colours = re.findall(r"--([\w-]+): #(\w{6})", text)
        found.append({name: linear(code) for name, code in colours})
    return found


def linear(code):
    srgb = np.array([int(code[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def luminance(colour):
    return float(colour @ [0.2126, 0.7152, 0.0722])


def contrast(one, other):
    """WCAG 2.2's ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_text_can_be_read_on_every_colour(theme):
    """4.5 as WCAG AA asks for text; 3 for lines."""
    strong = re.search(r"((?:\.[ds]\d+,? ?)+)\{ color: var\(--on-strong\);", STYLE).group(1)
    for name in [*(f"d{i}" for i in range(11)), *(f"s{i}" for i in range(9))]:
        ink = theme["on-strong" if f".{name}" in re.split(", ?| ", strong) else "on-pale"]
        assert contrast(ink, theme[name]) >= 4.5, name
    for name in ("ink", "muted"):
        assert contrast(theme[name], theme["paper"]) >= 4.5, name
    for run in range(MAX_RUNS):
        assert contrast(theme[f"run-{run}"], theme["paper"]) >= 4.5, run


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_lines_of_experts_can_be_seen(theme):
    rule = re.search(r"\.line\.expert \{([^}]*)\}", STYLE).group(1)
    assert "opacity" not in rule
    assert contrast(theme[re.search(r"--colour: var\(--(\w+)\)", rule).group(1)], theme["paper"]) >= 3.0


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_steps_of_the_sequential_scale_are_of_even_lightness(theme):
    lightness = [lab(theme[f"s{i}"])[0] for i in range(9)]
    steps = [abs(after - before) for before, after in pairwise(lightness)]
    assert max(steps) < 1.8 * min(steps)


def test_colours_that_mean_something_stay_in_print_and_where_colours_are_forced():
    (names,) = re.findall(r"\n([^\n{]*) \{ forced-color-adjust: none;[^}]* print-color-adjust: exact; \}", STYLE)
    assert names == ".cells td, .legend i, .bars i, .swatch"


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_lightness_alone_orders_each_scale(theme):
    steps = [luminance(theme[f"s{i}"]) for i in range(9)]
    assert sorted(steps) in (steps, steps[::-1])
    halves = [[luminance(theme[f"d{i}"]) for i in order] for order in (range(5, -1, -1), range(5, 11))]
    assert all(sorted(half) in (half, half[::-1]) for half in halves)
    assert all(abs(right - left) > 0.003 for half in [*halves, steps] for left, right in pairwise(half))


# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB. https://doi.org/10.1109/TVCG.2009.113
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_both_sides_of_zero_differ_for_colour_blind_people(theme, blindness):
    """By more than twice a just noticeable difference (2.3 in CIELAB), at each distance from the middle."""
    matrix = np.array(BLINDNESS[blindness])
    for step in range(1, 6):
        sides = [lab(np.clip(matrix @ theme[f"d{5 + sign * step}"], 0, 1)) for sign in (-1, 1)]
        assert np.linalg.norm(sides[0] - sides[1]) > 5, step


def dashes(kind):
    """Run -> how its line, or its swatch, is broken; whole ones are left out."""
    rules = re.findall(rf"((?:\.{kind}\.run-\d,? ?)+)\{{ (?:stroke-dasharray|background): ([^;]*);", STYLE)
    return {int(run): how for names, how in rules for run in re.findall(r"\d", names)}


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
@pytest.mark.parametrize("blindness", [*BLINDNESS, "none"])
def test_any_two_runs_differ_by_dash_or_by_colour_for_everybody(theme, blindness):
    """By more than four times a just noticeable difference (2.3 in CIELAB)."""
    matrix = np.array(BLINDNESS.get(blindness, np.eye(3)))
    seen = [lab(np.clip(matrix @ theme[f"run-{run}"], 0, 1)) for run in range(MAX_RUNS)]
    for one, other in combinations(range(MAX_RUNS), 2):
        differ = [dashes(kind).get(one) != dashes(kind).get(other) for kind in ("line", "swatch")]
        assert all(differ) or np.linalg.norm(seen[one] - seen[other]) > 10, (one, other)


def lab(colour):
    """CIELAB (D65) of linear RGB."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ colour
    ratio = xyz / [0.9505, 1.0, 1.089]
    root = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])
