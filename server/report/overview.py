"""Numbers of whole runs: how each ended, and what it sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.report.files import losses_of
from server.report.panels import left_out
from server.report.runs import Run

KINDS = ("experts", "attention", "router", "other", "extras")
REST, ALL = "counts, framing", "all"


@dataclass(frozen=True)
class Traffic:
    """Bytes of one run by kind, both ways."""

    run: Run
    rows: list[tuple[str, dict[str, int]]]
    """Kind, then bytes by way; the sum is the last one."""
    most: int


def overview(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How each run ended."""
    return [_row(run) for run in runs]


def _row(run: Run) -> dict[str, Any]:
    """Numbers of the run's end, None where there are none yet."""
    summary = run.summary or {}
    losses = losses_of(summary)
    worst = max(losses, key=losses.__getitem__) if losses else None
    num_sites = len(run.sites) or 1
    return {
        "label": run.label,
        "strategy": summary.get("strategy", "-"),
        "status": summary.get("status", "not ended"),
        "rounds": max((row["round"] for row in run.rounds), default=0),
        "sites": len(run.sites),
        "dropped": sum(len(rounds) for site in run.sites for rounds in left_out(run, site).values()),
        "global_loss": summary.get("global_loss"),
        "mean_loss": sum(losses.values()) / len(losses) if losses else None,
        "worst": worst,
        "worst_loss": losses[worst] if worst else None,
        "up": sum(row["bytes_up"] for row in run.rounds) / num_sites,
        "down": sum(row["bytes_down"] for row in run.rounds) / num_sites,
        "seconds": summary.get("wall_seconds"),
    }


def traffic(run: Run) -> Traffic:
    """Bytes of all rounds; what is no adapter, or was not counted by kind, is the rest."""
    ways = ("up", "down")
    total = {way: sum(row[f"bytes_{way}"] for row in run.rounds) for way in ways}
    counted = [row["bytes_by_kind"] for row in run.rounds if "bytes_by_kind" in row]
    rows = [(kind, {way: sum(one[way].get(kind, 0) for one in counted) for way in ways}) for kind in KINDS]
    rows.append((REST, {way: total[way] - sum(row[way] for _, row in rows) for way in ways}))
    kinds = [row for row in rows if any(row[1].values())] if counted else []
    return Traffic(run, [*kinds, (ALL, total)], max(1, *total.values()))
