"""Several runs side by side: a table from their summaries, and the page of ``server.report``."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from server.compare_matrix import matrix_tables
from server.compare_objectives import objective_tables
from server.record import RunFolder
from server.report.runs import run_folders
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

    Tokens a second are the median of the sites' rounds, peak memory is the largest of any.
    """
    table = Table(title="held-out loss, nats per response token", title_justify="left")
    table.add_column("run")
    for column in (
        "global",
        "sites, mean",
        "worst site",
        "up / site",
        "down / site",
        "seconds",
        "tokens / s",
        "peak memory",
    ):
        table.add_column(column, justify="right")
    for folder in folders:
        summary = RunFolder(folder).summary()
        if summary is None or summary["status"] != "completed":
            table.add_row(escape(folder.name), "failed" if summary else "no summary", *[""] * 7)
        else:
            table.add_row(escape(folder.name), *_cells(summary), *_effort(RunFolder(folder).rows()))
    return table


def _cells(summary: Mapping[str, Any]) -> list[str]:
    losses: Mapping[str, float] = summary["site_loss"]
    worst = max(losses, key=lambda site: losses[site]) if losses else None
    return [
        number(summary["global_loss"]),
        number(sum(losses.values()) / len(losses)) if losses else "-",
        f"{number(losses[worst])} ({escape(worst)})" if worst else "-",
        size(summary["bytes_up"] / summary["num_sites"]),
        size(summary["bytes_down"] / summary["num_sites"]),
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
