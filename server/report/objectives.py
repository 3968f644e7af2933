"""The part of a page for runs with several objectives: rewards, the sites' weights, disagreement, drift, KL, fronts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from server.alignment import Alignment, Front, Gauge, Series, alignment_of, fronts
from server.pareto import non_dominated
from server.report.charts import PANEL, Axis, Chart, Size, line_chart, nice_ticks, spread
from server.report.runs import Run, natural

WIDE_PANEL = PANEL._replace(width=336, height=142, left=56, right=126, bottom=34)
"""Room for labels at the lines' ends."""
SCATTER = Size(440, 310, 48, 130, 24, 40)


@dataclass(frozen=True)
class Point:
    """A run's end among the rewards of two objectives."""

    label: str
    style: str
    x: float
    y: float
    label_y: float | None
    """None: too many to name beside the plot."""


@dataclass(frozen=True)
class Scatter:
    """Ends of runs, and for each front and seed a line through those that no other run of it beats."""

    title: str
    across: str
    upward: str
    size: Size
    x: Axis
    y: Axis
    points: list[Point]
    paths: list[str]


@dataclass(frozen=True)
class RunWeights:
    """Weights of every site of one run."""

    index: int
    label: str
    panels: list[Chart]


@dataclass(frozen=True)
class End:
    """A run's last numbers: a row of the table beside the fronts."""

    label: str
    style: str
    preference: str
    rewards: list[float]
    kl: float | None
    disagreement: float | None
    drift: float | None


@dataclass(frozen=True)
class ObjectivesView:
    """What the page shows."""

    names: tuple[str, ...]
    gauge: Gauge
    rewards: list[Chart]
    measures: list[Chart]
    """KL, disagreement and drift, as far as they were measured."""
    weights: list[RunWeights]
    scatters: list[Scatter]
    fronts: list[Front]
    ends: list[End]
    front_styles: list[str]
    """One for each front where runs have its colour; empty where each run has one of its own."""

    @property
    def charts(self) -> list[Chart]:
        """All that follow the chosen round."""
        return [*self.rewards, *self.measures, *(panel for run in self.weights for panel in run.panels)]


def objectives_view(runs: Sequence[Run]) -> ObjectivesView | None:
    """Of the runs that have the first aligned run's objectives; None if no run has any."""
    settings, found = _aligned(runs)
    first = next((one for one in found if one), None)
    if first is None:
        return None
    measures = {
        "kl": ("KL to the base model", lambda one: one.kl),
        "disagreement": ("Disagreement", lambda one: one.disagreement),
        "drift": ("Drift", lambda one: one.drift),
    }
    made = fronts(list(zip(settings, found, strict=True)))
    styles = [f"run-{index}" for index in range(len(runs))]
    return ObjectivesView(
        names=first.objectives,
        gauge=first.gauge,
        rewards=_charts(
            runs, found, {f"reward-{i}": (name, _reward_of(name)) for i, name in enumerate(first.objectives)}
        ),
        measures=_charts(runs, found, measures),
        weights=[
            _weights(index, run, one)
            for index, (run, one) in enumerate(zip(runs, found, strict=True))
            if one and one.weights
        ],
        scatters=_scatters(runs, made, first.objectives, styles),
        fronts=made,
        ends=_ends(runs, found, styles),
        front_styles=[],
    )


def fronts_view(runs: Sequence[Run], num_colours: int) -> ObjectivesView | None:
    """Of too many runs to have a colour each: where they end, in the colours of their fronts."""
    settings, found = _aligned(runs)
    first = next((one for one in found if one), None)
    if first is None:
        return None
    made = fronts(list(zip(settings, found, strict=True)))
    colours = [f"run-{number % num_colours}" for number in range(len(made))]
    styles = {index: colour for front, colour in zip(made, colours, strict=True) for index in front.runs}
    return ObjectivesView(
        names=first.objectives,
        gauge=first.gauge,
        rewards=[],
        measures=[],
        weights=[],
        scatters=_scatters(runs, made, first.objectives, styles, labelled=False),
        fronts=made,
        ends=_ends(runs, found, styles),
        front_styles=colours,
    )


def _aligned(runs: Sequence[Run]) -> tuple[list[Mapping[str, Any]], list[Alignment | None]]:
    """Settings and objectives of each run; None if it has none, or is told otherwise than the first that has any."""
    settings = [run.settings for run in runs]
    found = [alignment_of(run.rows, of_run) for run, of_run in zip(runs, settings, strict=True)]
    first = next(((one.objectives, one.gauge) for one in found if one), None)
    return settings, [one if one and (one.objectives, one.gauge) == first else None for one in found]


_Of = Callable[[Alignment], Series]


def _reward_of(name: str) -> _Of:
    return lambda one: one.rewards[name]


def _charts(runs: Sequence[Run], found: Sequence[Alignment | None], wanted: dict[str, tuple[str, _Of]]) -> list[Chart]:
    """A chart for each number, a line for each run."""
    charts = []
    for name, (title, series_of) in wanted.items():
        series = [
            (run.label, f"run-{index}", series_of(one) if one else {})
            for index, (run, one) in enumerate(zip(runs, found, strict=True))
        ]
        charts.append(line_chart(name, title, series, WIDE_PANEL))
    return [chart for chart in charts if chart]


def _weights(index: int, run: Run, one: Alignment) -> RunWeights:
    """A panel for each site, a line for each objective."""
    panels = [
        line_chart(
            f"weights-{index}-{place}",
            site,
            [(name, f"run-{number}", series) for number, (name, series) in enumerate(of_site.items())],
            WIDE_PANEL,
            nice_ticks(0.0, 1.0, 3),
        )
        for place, (site, of_site) in enumerate(sorted(one.weights.items(), key=lambda item: natural(item[0])))
    ]
    return RunWeights(index, run.label, [panel for panel in panels if panel])


_Styles = Mapping[int, str] | Sequence[str]
"""Place in the list of runs -> colour."""


def _scatters(
    runs: Sequence[Run], made: Sequence[Front], names: Sequence[str], styles: _Styles, *, labelled: bool = True
) -> list[Scatter]:
    """One for each pair of objectives."""
    pairs = combinations(range(len(names)), 2)
    return [_scatter(runs, made, pair, names, styles, labelled=labelled) for pair in pairs]


def _scatter(
    runs: Sequence[Run],
    made: Sequence[Front],
    pair: tuple[int, int],
    names: Sequence[str],
    styles: _Styles,
    *,
    labelled: bool,
) -> Scatter:
    across, upward = pair
    every = np.concatenate([front.points_NM for front in made])[:, [across, upward]]
    (left, bottom), (right, top) = every.min(axis=0), every.max(axis=0)
    columns, lines = nice_ticks(left, right, 4), nice_ticks(bottom, top, 5)
    size = SCATTER
    x = Axis(columns[0], columns[-1], size.left, size.width - size.right, columns)
    y = Axis(lines[0], lines[-1], size.height - size.bottom, size.top, lines)
    places = [
        (index, x.at(point[across]), y.at(point[upward]))
        for front in made
        for index, point in zip(front.runs, front.points_NM, strict=True)
    ]
    labels: Sequence[float | None] = [None] * len(places)
    if labelled:
        labels = spread([place[2] for place in places], 13.0, size.top, size.height - size.bottom)
    points = [
        Point(runs[index].label, styles[index], at_x, at_y, label_y)
        for (index, at_x, at_y), label_y in zip(places, labels, strict=True)
    ]
    paths = [
        _front_path(front.points_NM[front.seeds_N == seed][:, [across, upward]], x, y)
        for front in made
        for seed in np.unique(front.seeds_N)
    ]
    title = f"{names[across]} and {names[upward]}"
    return Scatter(title, names[across], names[upward], size, x, y, points, paths)


def _front_path(points_N2: np.ndarray, x: Axis, y: Axis) -> str:
    best = sorted(points_N2[non_dominated(points_N2)].tolist())
    return "M" + "L".join(f"{x.at(across):g} {y.at(upward):g}" for across, upward in best)


def _ends(runs: Sequence[Run], found: Sequence[Alignment | None], styles: _Styles) -> list[End]:
    pairs = enumerate(zip(runs, found, strict=True))
    return [_end(run, one, styles[index]) for index, (run, one) in pairs if one]


def _end(run: Run, one: Alignment, style: str) -> End:
    last = [series[max(series)] if series else None for series in (one.kl, one.disagreement, one.drift)]
    return End(run.label, style, one.preference, list(one.ends), *last)
