"""The evaluation matrices of several runs as tables; runs that differ in their seed alone are one line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from client.evaluation.measured import BASE, METRICS, MODELS
from server.intervals import with_interval
from server.report.files import config_of, evaluation_of
from server.report.runs import labels_of
from server.usage import USAGES, usage_of

_DIGITS = {"loss": 4}
_OVER_SITES = {"mean": "mean", "worst": "worst site", "std": "std", "spread": "max - min"}
_NOT_COMPARED = ("seed:", "output:")

Summary = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Model -> metric -> what ``server.evaluation.summarised`` says of it."""


@dataclass(frozen=True)
class Seeds:
    """Runs that differ in their seed alone."""

    names: list[str] = field(default_factory=list)
    """As the page has them."""
    summaries: list[Summary] = field(default_factory=list)
    usages: list[Mapping[str, float]] = field(default_factory=list)
    """What ``server.usage`` says of each."""

    @property
    def title(self) -> str:
        """For people: the run's name, of several without the seed."""
        if len(self.names) == 1:
            return self.names[0]
        return f"{re.sub(r',?seed=[0-9]+', '', self.names[0]).strip(',')} ({len(self.names)} seeds)"


def matrix_tables(folders: Sequence[Path]) -> list[Table]:
    """A table for each metric that any run has: each model over the sites' own data, and on general sets.

    The last one is of how experts were used and what the model in use costs. Several seeds: the mean with its 95 %
    interval (Student's t). The base model has one line if all runs agree on it.
    """
    groups = by_seeds(folders)
    tables = [*(_table(metric, groups) for metric in METRICS), _usage_table(groups)]
    return [table for table in tables if table.row_count]


def by_seeds(folders: Sequence[Path]) -> list[Seeds]:
    """The runs that have a matrix, together where all settings but seed and output are the same."""
    groups: dict[str, Seeds] = {}
    for folder, label in zip(folders, labels_of(folders), strict=True):
        evaluation = evaluation_of(folder)
        if evaluation is None:
            continue
        lines = config_of(folder).splitlines() or [str(folder)]
        settings = "\n".join(line for line in lines if not line.startswith(_NOT_COMPARED))
        group = groups.setdefault(settings, Seeds())
        group.names.append(label)
        group.summaries.append(evaluation["summary"])
        group.usages.append(usage_of(evaluation))
    return list(groups.values())


def _table(metric: str, groups: Sequence[Seeds]) -> Table:
    general = sorted(
        {
            name
            for group in groups
            for summary in group.summaries
            for found in summary.values()
            for name in found.get(metric, {}).get("general", {})
        }
    )
    table = Table(title=f"{METRICS[metric]}: each model on every site's own held-out data", title_justify="left")
    for column in ("run", "model"):
        table.add_column(column)
    for column in (*_OVER_SITES.values(), *general):
        table.add_column(column, justify="right")
    bases: list[list[str]] = []
    for group in groups:
        for model in MODELS:
            found = [summary[model][metric] for summary in group.summaries if metric in summary.get(model, {})]
            if not found:
                continue
            cells = _cells(found, general, _DIGITS.get(metric, 3))
            if model != BASE:
                table.add_row(escape(group.title), model, *cells)
            elif cells not in bases:
                bases.append(cells)
                table.add_row("", model, *cells)
    return table


def _usage_table(groups: Sequence[Seeds]) -> Table:
    table = Table(
        title="routing of held-out tokens; operations and time of a token over those of one adapter",
        title_justify="left",
    )
    table.add_column("run")
    for title in USAGES.values():
        table.add_column(title, justify="right")
    for group in groups:
        if any(group.usages):
            values = ([one[key] for one in group.usages if key in one] for key in USAGES)
            table.add_row(escape(group.title), *(with_interval(found, 3) if found else "-" for found in values))
    return table


def _cells(found: Sequence[Mapping[str, Any]], general: Sequence[str], digits: int) -> list[str]:
    cells = []
    for key in _OVER_SITES:
        values = [one[key] for one in found if key in one]
        sites = {one["worst_site"] for one in found if "worst_site" in one}
        place = f" ({escape(sites.pop())})" if key == "worst" and len(sites) == 1 else ""
        cells.append(with_interval(values, digits) + place if values else "-")
    for name in general:
        values = [one["general"][name] for one in found if name in one["general"]]
        cells.append(with_interval(values, digits) if values else "-")
    return cells
