"""What counts in the rows of ``benchmarks.fc_moe``: numbers by seed, so that they can be paired."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.cells import Row

LAST = 5
"""Rounds at the end whose mean is what counts."""

BySeed = dict[int, float]


def last_rounds(curve: Sequence[float]) -> float:
    """Mean of the last rounds of a curve."""
    return float(np.mean(curve[-LAST:]))


def rounds_to(curve: Sequence[float], target: float, *, higher: bool) -> int | None:
    """First round, from 1, at which the curve is as good as ``target``; None if it never is."""
    reached = [value >= target if higher else value <= target for value in curve]
    return reached.index(True) + 1 if any(reached) else None


def good(rows: Mapping[int, Row]) -> dict[int, Row]:
    """Those that did not diverge."""
    return {seed: row for seed, row in rows.items() if "failed" not in row}


def results(rows: Mapping[int, Row], by_accuracy: bool) -> BySeed:
    """What counts first: accuracy in percent or loss in nats."""
    curve, scale = ("accuracy", 100) if by_accuracy else ("loss", 1)
    return {seed: scale * last_rounds(row[curve]) for seed, row in good(rows).items()}


def on_sites(rows: Mapping[int, Row], by_accuracy: bool) -> tuple[BySeed, BySeed, BySeed]:
    """Mean, worst and standard deviation over the sites, in percent or nats."""
    scale = 100 if by_accuracy else 1
    sites = {seed: scale * np.array(list(row["sites"].values())) for seed, row in good(rows).items()}
    return (
        {seed: float(values.mean()) for seed, values in sites.items()},
        {seed: float(values.min() if by_accuracy else values.max()) for seed, values in sites.items()},
        {seed: float(values.std()) for seed, values in sites.items()},
    )


def rounds_needed(
    rows: Mapping[int, Row], baseline: Mapping[int, Row], by_accuracy: bool
) -> tuple[dict[int, int | None], BySeed]:
    """Rounds to the baseline's end, None where that is not reached; where it is, also over the baseline's own."""
    curve = "accuracy" if by_accuracy else "loss"
    rows, baseline = good(rows), good(baseline)
    needed: dict[int, int | None] = {}
    ratio = {}
    for seed in sorted(rows.keys() & baseline.keys()):
        target = last_rounds(baseline[seed][curve])
        needed[seed] = count = rounds_to(rows[seed][curve], target, higher=by_accuracy)
        own = rounds_to(baseline[seed][curve], target, higher=by_accuracy)
        if count is not None and own is not None:
            ratio[seed] = count / own
    return needed, ratio


def growth(row: Row) -> float | None:
    """Of the experts' weights of the global model; None where there is none, or it was not measured.

    Older rows have the length of what is trained before and after: by LoRA, of factors.
    """
    if "strategy=local_only" in row["settings"]:
        return None
    if "expert_growth" in row:
        return float(row["expert_growth"])
    before, after = row["expert_norm"]
    return float(after / before) if row["experts"] == "full" else None


def differences(values: BySeed, others: BySeed) -> list[float]:
    """Of the one to the other, paired by seed."""
    return [value - others[seed] for seed, value in values.items() if seed in others]
