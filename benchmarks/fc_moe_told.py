"""How results of ``benchmarks.fc_moe`` are told in a cell of a table: means, intervals, differences paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.cells import Outcome, Row
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe_numbers import BySeed, differences, good, rounds_needed
from server.intervals import with_interval

BASELINE = "fedavg"
ROUNDS = "rounds to FedAvg's end, x its own"


def titled(name: str, result: Outcome, num_seeds: int) -> str:
    """What it is called, and of how many seeds its row tells if not of all."""
    count = len(result.rows)
    return CONTENDERS[name].title + (f" ({count} of {num_seeds} seeds)" if 0 < count < num_seeds else "")


def mean_of_known(values: Sequence[float | None], digits: int, before: str = "") -> str:
    """Mean of those that are known, and of how many if not of all."""
    known = [value for value in values if value is not None]
    told = f" (of {len(known)})" if len(known) < len(values) else ""
    return f"{before}{np.mean(known):.{digits}f}{told}" if known else ""


def done(tested: Mapping[str, Outcome]) -> list[Row]:
    """All runs that did not diverge."""
    return [row for result in tested.values() for row in good(result.rows).values()]


def judged_by_accuracy(tested: Mapping[str, Outcome]) -> bool:
    """Whether by accuracy; else by loss."""
    return any(row["accuracy"] for row in done(tested))


def digits_of(by_accuracy: bool) -> int:
    """How many to show behind the point, of what counts."""
    return 1 if by_accuracy else 3


def measure_of(by_accuracy: bool) -> str:
    """What counts, and in what unit."""
    return "test accuracy, %" if by_accuracy else "test loss, nats"


def mean_told(values: BySeed, digits: int) -> str:
    """Mean with its 95 % interval; empty if there is nothing."""
    return with_interval(list(values.values()), digits) if values else ""


def difference(values: BySeed, others: BySeed, digits: int) -> str:
    """Of the one to the other, paired by seed."""
    found = differences(values, others)
    return with_interval(found, digits, sign="+") if found else ""


def summed_up(values: BySeed, digits: int, failed: int) -> str:
    """Mean with its interval, and how many runs diverged; ``missing`` if there is no run."""
    if not values:
        return "diverged" if failed else "missing"
    return mean_told(values, digits) + (f" ({failed} diverged)" if failed else "")


def rounds_told(rows: Mapping[int, Row], baseline: Mapping[int, Row], by_accuracy: bool) -> str:
    """To the baseline's end: mean over the seeds that get there, how many do, of several the ratio to its own."""
    needed, ratio = rounds_needed(rows, baseline, by_accuracy)
    reached = [count for count in needed.values() if count is not None]
    if not reached:
        return f"never (0 of {len(needed)})"
    count = f" ({len(reached)} of {len(needed)})" if len(reached) < len(needed) else ""
    paired = f", x {mean_told(ratio, 2)}" if rows is not baseline and len(ratio) > 1 else ""
    return mean_of_known(reached, 1) + count + paired
