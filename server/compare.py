"""Several runs side by side, from their summaries."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from server.record import RunFolder
from server.view import number, size


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
