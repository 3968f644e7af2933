"""Several runs side by side, from their summaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from server.record import RunFolder
from server.view import number, size


def comparison(folders: Sequence[Path]) -> Table:
    """One row a run: losses in nats per response token, bytes per site over the whole run."""
    table = Table(title="held-out loss, nats per response token", title_justify="left")
    table.add_column("run")
    for column in ("global", "sites, mean", "worst site", "up / site", "down / site", "seconds"):
        table.add_column(column, justify="right")
    for folder in folders:
        summary = RunFolder(folder).summary()
        if summary is None or summary["status"] != "completed":
            table.add_row(escape(folder.name), "failed" if summary else "no summary", *[""] * 5)
        else:
            table.add_row(escape(folder.name), *_cells(summary))
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
