"""Runs with several objectives side by side: the table that ``bouquet compare`` adds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from server.alignment import alignment_of, fronts, settings_of
from server.report.files import config_of, rows_of
from server.report.runs import labels_of
from server.view import number


def objective_tables(folders: Sequence[Path]) -> list[Table]:
    """One row a run: its last rewards, and what its front dominates; no table if no run has objectives."""
    settings = [settings_of(config_of(folder)) for folder in folders]
    found = [alignment_of(rows_of(folder)[0], one) for folder, one in zip(folders, settings, strict=True)]
    made = fronts(list(zip(settings, found, strict=True)))
    if not made:
        return []
    front_of = {index: front for front in made for index in front.runs}
    first = found[min(front_of)]
    assert first is not None
    table = Table(
        title=f"{first.gauge.told}, last round; hypervolume of a seed's runs with such settings (how many), mean over "
        "seeds",
        title_justify="left",
    )
    table.add_column("run")
    for column in ("preference", *map(escape, first.objectives), "KL", "disagreement", "drift", "hypervolume"):
        table.add_column(column, justify="right")
    labels = labels_of(folders)
    for index, front in sorted(front_of.items()):
        one = found[index]
        assert one is not None
        last = [f"{series[max(series)]:.3g}" if series else "-" for series in (one.kl, one.disagreement, one.drift)]
        table.add_row(
            escape(labels[index]),
            one.preference,
            *map(number, one.ends),
            *last,
            f"{front.hypervolume} ({front.num_preferences})",
        )
    return [table]
