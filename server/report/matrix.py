"""The part of a report that is about the evaluation matrix: each model on each set, and what the sites have of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client.evaluation.measured import LOWER_IS_BETTER, METRICS, PERSONAL, is_general
from server.report.heat import Cell, Heat, Scale, Value, cells, round_up
from server.report.runs import Run, natural
from server.usage import usage_of

Row = Mapping[str, Any]


@dataclass(frozen=True)
class MatrixView:
    """One run's part."""

    run: Run
    index: int
    summary: list[dict[str, str]]
    """A line for each model and measure."""
    heats: list[Heat]
    """One for each measure, and the experts' load."""
    notes: list[str]


def matrix_views(runs: Sequence[Run]) -> list[MatrixView]:
    """Of the runs that have a matrix; one scale for each measure, the same for all of them."""
    scores = {index: run.evaluation["scores"] for index, run in enumerate(runs) if run.evaluation is not None}
    scales = {metric: _scale(metric, [row[metric] for rows in scores.values() for row in rows]) for metric in METRICS}
    return [_view(runs[index], index, rows, scales) for index, rows in scores.items()]


def _view(run: Run, index: int, rows: Sequence[Row], scales: Mapping[str, Scale | None]) -> MatrixView:
    assert run.evaluation is not None
    heats = [_heat(metric, rows, scale) for metric, scale in scales.items() if scale is not None]
    return MatrixView(
        run,
        index,
        summary=list(_summary(run.evaluation["summary"])),
        heats=[heat for heat in [*heats, *_load(run.evaluation["routing"])] if heat.rows],
        notes=list(_notes(run.evaluation)),
    )


def _scale(metric: str, values: Iterable[Value]) -> Scale | None:
    """From the least to the greatest value for losses, which are far from 0; else from 0. None without values."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if metric not in LOWER_IS_BETTER:
        return Scale("s", 0.0, round_up(max(*known, 0.01)), "fixed")
    return Scale("s", min(known), max(*known, min(known) + 0.01), "fixed")


def _heat(metric: str, rows: Sequence[Row], scale: Scale) -> Heat:
    """Model x set; personal models are named after their sites."""
    measured = [row for row in rows if row[metric] is not None]
    sets = sorted({row["on"] for row in measured}, key=lambda name: (is_general(name), natural(name)))
    models = dict.fromkeys(_name(row) for row in measured)
    known = {(_name(row), row["on"]): row[metric] for row in measured}
    digits = 3
    lines = [(model, [_cell(known.get((model, on)), scale, digits) for on in sets]) for model in models]
    better = "lower" if metric in LOWER_IS_BETTER else "higher"
    return Heat(
        metric,
        METRICS[metric][:1].upper() + METRICS[metric][1:],
        f"The {better} the better.",
        scale,
        "model",
        lines,
        sets,
    )


def _load(routing: Mapping[str, Mapping[str, Any]]) -> Iterable[Heat]:
    """Layer x expert; none of a dense model."""
    loads = {layer: found["load"] for layer, found in routing.items() if "load" in found}  # new in run folders
    if not loads:
        return
    scale = Scale("s", 0.0, round_up(max(share for load in loads.values() for share in load)), "percent")
    count = max(map(len, loads.values()))
    rows = [(layer, cells([*load, *[None] * (count - len(load))], scale)) for layer, load in loads.items()]
    note = "Share of held-out tokens that each expert gets from the model in use, mean over the sites."
    yield Heat("held_out_load", "Expert load", note, scale, "layer", rows, [str(expert) for expert in range(count)])


def _name(row: Row) -> str:
    return f"of {row['of']}" if row["model"] == PERSONAL else str(row["model"])


def _cell(value: Value, scale: Scale, digits: int) -> Cell:
    return Cell(scale.colour(value), "·" if value is None else f"{value:.{digits}f}")


def _summary(summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterable[dict[str, str]]:
    for model, metrics in summary.items():
        for metric, found in metrics.items():
            if "mean" in found:
                numbers = {key: f"{found[key]:.3f}" for key in ("mean", "worst", "std", "spread")}
                yield {"model": model, "measure": METRICS[metric], "worst_site": found["worst_site"], **numbers}


def _notes(evaluation: Mapping[str, Any]) -> Iterable[str]:
    """What a personal model costs, and how tokens were spread over the experts."""
    found = usage_of(evaluation)
    if "flops" in found:
        yield (
            f"A personal model takes {found['flops']:.2f} times one adapter's operations and {found['seconds']:.2f} "
            "times its time."
        )
    if "entropy" in found:
        yield (
            f"Routing of held-out tokens: entropy {found['entropy']:.2f} of that of equal use (mean over sites and "
            f"layers), busiest expert {100 * found['largest_share']:.0f} % of a site's tokens in a layer."
        )
