"""Geometry of line charts: numbers in, coordinates and paths out. Template and style sheet draw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

Series = Mapping[int, float]
"""Round -> value."""


@dataclass(frozen=True)
class Axis:
    """A linear axis from values to pixels."""

    low: float
    high: float
    start: float
    """Pixel of ``low``."""
    end: float
    """Pixel of ``high``."""
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Pixel of a value, to a tenth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


class Size(NamedTuple):
    """A chart's size and margins in pixels."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int


LARGE = Size(560, 280, 52, 66, 12, 34)
PANEL = Size(236, 132, 40, 12, 10, 24)
_DIGIT_WIDTH = 7
"""Pixels of the page's type, rounded up."""


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    label: str
    style: str
    """Class that colours it."""
    path: str
    end: tuple[float, float] | None
    """Its last point."""
    label_y: float
    """Where its label stands in the right margin: near its end, apart from the other labels."""
    leader: str
    """SVG path to the label of a line that ends early; empty if the label stands beside its end."""
    values: list[float | None]
    """One for each of the chart's rounds."""

    @property
    def last(self) -> float | None:
        """The last value there is."""
        return next((value for value in reversed(self.values) if value is not None), None)


@dataclass(frozen=True)
class Chart:
    """Lines over rounds."""

    name: str
    title: str
    size: Size
    x: Axis
    y: Axis
    decimals: int
    rounds: list[int]
    lines: list[Line]

    @property
    def label_x(self) -> int:
        """Where labels begin."""
        return _label_x(self.size)

    def tick(self, value: float) -> str:
        """A tick of the upright axis for people."""
        return tick_text(value, self.decimals)


def line_chart(
    name: str,
    title: str,
    series: Sequence[tuple[str, str, Series]],
    size: Size,
    ticks: tuple[float, ...] | None = None,
) -> Chart | None:
    """A chart of (label, style, values by round) lines; None if there is no value.

    ``ticks``: of the upright axis, if other charts are to share it.
    """
    rounds = sorted({number for _, _, values in series for number in values})
    if not rounds:
        return None
    if ticks is None:
        ticks = nice_ticks(*bounds_of([values for _, _, values in series]), 5 if size.height > 200 else 3)
    longest = max(len(tick_text(tick, tick_decimals(ticks))) for tick in ticks)
    size = size._replace(left=max(size.left, _DIGIT_WIDTH * longest + 8))
    x = Axis(rounds[0], max(rounds[-1], rounds[0] + 1), size.left, size.width - size.right, _whole_ticks(rounds, size))
    y = Axis(ticks[0], ticks[-1], size.height - size.bottom, size.top, ticks)
    ends = [_end(values, x, y) for _, _, values in series]
    labels = spread([end[1] if end else 0.0 for end in ends], 15.0, size.top, size.height - size.bottom)
    lines = [
        Line(
            label,
            style,
            path_of(values, rounds, x, y),
            end,
            label_y,
            _leader(end, x, _label_x(size), label_y),
            [values.get(number) for number in rounds],
        )
        for (label, style, values), end, label_y in zip(series, ends, labels, strict=True)
    ]
    return Chart(name, title, size, x, y, tick_decimals(ticks), rounds, lines)


def bounds_of(series: Iterable[Series]) -> tuple[float, float]:
    """Lowest and highest value of all."""
    values = [value for one in series for value in one.values()]
    return (min(values), max(values)) if values else (0.0, 1.0)


def nice_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """About ``count`` steps of 1, 2 or 5 times a power of ten, that enclose both ends."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1.0):
        margin = abs(low) * 0.05 if abs(low) > 1e-6 else 0.5
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(number * step, 12) for number in range(first, last + 1))


def alike_ticks(ranges: Sequence[tuple[float, float]], count: int) -> list[tuple[float, ...]]:
    """Ticks for each (low, high), as many of one step: axes of one span, each around its own values."""
    widest = nice_ticks(*max(ranges, key=lambda ends: ends[1] - ends[0]), count)
    step = widest[1] - widest[0]
    ends = [(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)) for low, high in ranges]
    most = max(len(widest) - 1, *(last - first for first, last in ends))
    starts = [first - (most - (last - first)) // 2 for first, last in ends]
    return [tuple(round(number * step, 12) for number in range(start, start + most + 1)) for start in starts]


def tick_text(tick: float, decimals: int) -> str:
    """A tick with so many decimals; short where losses have gone through the roof."""
    return f"{tick:.{decimals}f}" if abs(tick) < 1e6 else f"{tick:.2e}"


def shortened(text: str, most: int) -> str:
    """Text of at most so many characters: what is left out is in the middle, since names often differ in their ends."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - 1) // 2 :]}"


def tick_decimals(ticks: Sequence[float]) -> int:
    """Decimals that tell the ticks apart."""
    step = min(abs(right - left) for left, right in pairwise(ticks))
    return max(0, -math.floor(math.log10(step) + 1e-9))


def path_of(values: Series, rounds: Sequence[int], x: Axis, y: Axis) -> str:
    """SVG path through the values; where a round in between has none because a site was not asked, the line goes on.

    A single point is a line of no length, which round caps make a dot.
    """
    points = [f"{x.at(number):g} {y.at(values[number]):g}" for number in rounds if number in values]
    return f"M{'L'.join(points)}{'h0' * (len(points) == 1)}" if points else ""


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as need be to stand ``gap`` apart, inside [low, high] as long as there is room."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    overflow = moved[order[-1]] - high if order else 0.0
    if overflow > 0:
        moved[order[-1]] -= overflow
        for after, before in pairwise(order[::-1]):
            moved[before] = min(moved[before], moved[after] - gap)
    lowest = moved[order[0]] if order else low
    return [round(position + max(0.0, low - lowest), 1) for position in moved]


def _end(values: Series, x: Axis, y: Axis) -> tuple[float, float] | None:
    return (x.at(max(values)), y.at(values[max(values)])) if values else None


def _label_x(size: Size) -> int:
    return size.width - size.right + 8


def _leader(end: tuple[float, float] | None, x: Axis, label_x: int, label_y: float) -> str:
    return f"M{end[0] + 4:g} {end[1]:g}L{label_x - 3} {label_y:g}" if end and end[0] < x.end - 1 else ""


def _whole_ticks(rounds: Sequence[int], size: Size) -> tuple[float, ...]:
    """Rounds to name on the axis: the first, the last and whole steps in between, apart from each other."""
    first, last = rounds[0], rounds[-1]
    room = (size.width - size.left - size.right) / 34
    step = next(step for step in _STEPS if (last - first) / step <= room)
    inner = [number for number in range(first, last) if number % step == 0 and last - number >= step * 0.7]
    return tuple(
        sorted({first, last, *(number for number in inner if number == first or number - first >= step * 0.7)})
    )


_STEPS = tuple(factor * 10**power for power in range(9) for factor in (1, 2, 5))
