"""Several runs side by side: a table from their summaries, and the page of ``server.report``."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.alignment import settings_of
from server.compare_matrix import matrix_tables
from server.compare_objectives import objective_tables
from server.report.differences import incomparable
from server.report.files import METRICS, config_of, cut_off, losses_of, rows_of, summary_of
from server.report.runs import labels_of, run_folders
from server.view import number, size

RunFolders = Annotated[list[Path], typer.Argument(help="Run folders, or one folder of them.")]


def compare(
    folders: RunFolders,
    html: Annotated[
        Path | None, typer.Option(help="The page; default: compare.html in the only folder given, else here.")
    ] = None,
) -> None:
    """Show several runs side by side, and their evaluation matrices; runs that differ in the seed alone together.

    Write the page of `bouquet report` too.
    """
    runs = run_folders(folders)
    _console().print(comparison(runs), *matrix_tables(runs), *objective_tables(runs))
    _write_page(folders, html or _beside(folders) / "compare.html", told="page: ")


def report(
    folders: RunFolders,
    output: Annotated[
        Path | None, typer.Option(help="The page; default: report.html in the only folder given, else here.")
    ] = None,
) -> None:
    """Write a page that opens from disk: convergence, experts, who pulls against whom, bytes."""
    _write_page(folders, output or _beside(folders) / "report.html")


def comparison(folders: Sequence[Path]) -> Table:
    """One row a run: losses in nats per response token, bytes per site over the whole run.

    Tokens a second are the median of the sites' rounds, peak memory is the largest of any. Below the table: what was
    left out of a run's files, and whether the losses are of one thing.
    """
    table = Table(title="held-out loss, nats per response token", title_justify="left", caption_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("strategy", overflow="fold")
    for column in _NUMBERS:
        table.add_column(column, justify="right", overflow="fold")
    notes = []
    for folder, label in zip(folders, labels_of(folders), strict=True):
        summary, (rows, is_cut) = summary_of(folder), rows_of(folder)
        if is_cut:
            notes.append(f"{label}: {cut_off(METRICS)}")
        done = max((row["round"] for row in rows if row.get("type") == "round"), default=0)
        strategy = escape(str((summary or {}).get("strategy", "-")))
        if summary is None or summary["status"] != "completed":
            table.add_row(escape(label + _reason(summary)), strategy, str(done), "failed" if summary else "no summary")
        else:
            table.add_row(escape(label), strategy, str(done), *_cells(summary), *_effort(rows))
    notes += filter(None, [incomparable([settings_of(config_of(folder)) for folder in folders])])
    table.caption = escape("\n".join(notes)) or None
    return table


_NUMBERS = (
    "rounds",
    "global",
    "sites, mean",
    "worst site",
    "up / site",
    "down / site",
    "seconds",
    "tokens / s",
    "peak memory",
)


def _reason(summary: Mapping[str, Any] | None) -> str:
    """Why a run failed, in the line below its name."""
    return f"\n{shorten(str(summary['error']), 80, placeholder='…')}" if summary else ""


def _cells(summary: Mapping[str, Any]) -> list[str]:
    losses = losses_of(summary)
    worst = max(losses, key=losses.__getitem__) if losses else None
    num_sites = summary["num_sites"] or 1
    return [
        number(summary["global_loss"]),
        number(sum(losses.values()) / len(losses)) if losses else "-",
        f"{number(losses[worst])} ({escape(worst)})" if worst else "-",
        size(summary["bytes_up"] / num_sites),
        size(summary["bytes_down"] / num_sites),
        f"{summary['wall_seconds']:.0f}",
    ]


def _effort(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    trained = [row for row in rows if {"tokens_per_second", "peak_memory_bytes"} <= row.keys()]
    if not trained:
        return ["-", "-"]
    speed = statistics.median(row["tokens_per_second"] for row in trained)
    return [f"{speed:.0f}", size(max(row["peak_memory_bytes"] for row in trained))]


def _beside(folders: Sequence[Path]) -> Path:
    """Where a page goes if nobody says."""
    return folders[0] if len(folders) == 1 else Path()


def _write_page(folders: Sequence[Path], page: Path, told: str = "") -> None:
    from server.report.page import write_report  # noqa: PLC0415 - only needed here

    write_report(folders, page)
    _console().print(told + escape(str(page)), soft_wrap=True)


def _console() -> Console:
    # A log file is as wide as its lines; a terminal tells its width.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 140)
