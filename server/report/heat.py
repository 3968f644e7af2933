"""Numbers as coloured cells: which of a scale's colours, and the text. ``page/report.js`` does the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, NamedTuple

Value = float | None

_COLOURS = {"d": 11, "s": 9}
MAX_COLUMNS_WITH_TEXT = 16
"""Tables with more columns show colours only; a focused cell tells its number."""


@dataclass(frozen=True)
class Scale:
    """Values to colours."""

    kind: str
    """``d``: diverging from the middle, or ``s``: sequential."""
    low: float
    high: float
    style: str
    """``fixed``: two decimals; ``count``: whole numbers with k and M; ``percent``; ``share``: with a decimal."""

    def colour(self, value: Value) -> str:
        """Class of a cell: ``d0`` to ``d10``, ``s0`` to ``s8``, or ``n`` for no value."""
        if value is None:
            return "n"
        count = _COLOURS[self.kind]
        share = (value - self.low) / (self.high - self.low)
        return f"{self.kind}{min(count - 1, max(0, math.floor(share * count)))}"

    def text(self, value: Value) -> str:
        """The number for people."""
        if value is None:
            return "·"
        if self.style == "percent":
            return f"{_fixed(100 * value, 0)}%"
        if self.style == "share":
            return f"{_fixed(100 * value, 1)}%"
        if self.style == "count":
            return count_text(value)
        return _fixed(value, 2)

    @property
    def middle(self) -> float:
        """The number half-way."""
        return (self.low + self.high) / 2

    @property
    def legend(self) -> list[str]:
        """Classes of all colours, from low to high."""
        return [f"{self.kind}{number}" for number in range(_COLOURS[self.kind])]

    def json(self) -> dict[str, Any]:
        """For the page's script."""
        return asdict(self) | {"count": _COLOURS[self.kind]}


class Cell(NamedTuple):
    """One cell."""

    colour: str
    text: str


@dataclass(frozen=True)
class Heat:
    """A table of coloured cells, the columns of which are experts or sites."""

    name: str
    title: str
    note: str
    """How to read it, in one sentence."""
    scale: Scale
    corner: str
    rows: Sequence[tuple[str, Sequence[Cell]]]
    columns: Sequence[str]

    @property
    def is_wide(self) -> bool:
        """Whether the cells have their colour only."""
        return len(self.columns) > MAX_COLUMNS_WITH_TEXT


def cells(values: Iterable[Value], scale: Scale, num_columns: int = 0) -> list[Cell]:
    """One cell for each value, without text in a table of many columns."""
    is_wide = num_columns > MAX_COLUMNS_WITH_TEXT
    return [Cell(scale.colour(value), "" if is_wide else scale.text(value)) for value in values]


def count_text(value: float) -> str:
    """``999``, ``1.5k``, ``12k``, ``3.0M``."""
    for unit, size in (("", 1.0), ("k", 1e3), ("M", 1e6)):
        if value < 1000 * size or unit == "M":
            small = value / size
            return _fixed(small, 1 if unit and small < 10 else 0) + unit
    raise AssertionError


def _fixed(value: float, decimals: int) -> str:
    """As JavaScript's toFixed, which rounds halves away from zero; with a true minus sign, and no minus zero."""
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-decimals), ROUND_HALF_UP)
    return f"{rounded + 0:f}".replace("-", "\u2212") if rounded else f"{abs(rounded):f}"


def around(middle: float, values: Iterable[Value], least: float) -> Scale:
    """A diverging scale that holds all values, its ends a round number, at least ``least``, from the middle."""
    farthest = max((abs(value - middle) for value in values if value is not None), default=0.0)
    reach = round_up(max(farthest, least))
    return Scale("d", middle - reach, middle + reach, "fixed")


def cosines(values: Sequence[float]) -> Scale:
    """A diverging scale of what most cosines span."""
    reach = min(1.0, around(0.0, near(0.0, values), 0.25).high)
    return Scale("d", -reach, reach, "fixed")


def near(middle: float, values: Sequence[float]) -> list[float]:
    """Those within ten times the median distance from the middle: a scale that holds all the others shows nothing.

    What lies outside has the colour of the scale's end.
    """
    distances = [abs(value - middle) for value in values]
    limit = 10 * statistics.median(distances) if distances else 0.0
    return [value for value, distance in zip(values, distances, strict=True) if distance <= limit]


def from_zero(values: Iterable[Value], style: str, least: float) -> Scale:
    """A sequential scale from 0 that holds all values, and ``least``."""
    return Scale("s", 0.0, round_up(max([least, *(value for value in values if value is not None)])), style)


def round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 2.5, 3, 4, 5, 7.5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(
        factor * power for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if factor * power >= value * (1 - 1e-12)
    )


def flat(nested: Any) -> list[float]:
    """All numbers in nested lists, without None."""
    if isinstance(nested, Mapping):
        nested = list(nested.values())
    if isinstance(nested, list):
        return [number for item in nested for number in flat(item)]
    return [] if nested is None else [float(nested)]
