"""From the cells of ``benchmarks.firm`` to its tables: means over seeds with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.intervals import rounded_with_interval, with_interval
from server.pareto import hypervolume

Row = Mapping[str, Any]

ALL_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Preferences for the first of two objectives."""
THREE_SHARES = (0.1, 0.5, 0.9)
EQUAL = (0.5,)
FRONTS = {"at 0.1, 0.5, 0.9": THREE_SHARES, "at equal preference": EQUAL}
"""Column -> preferences whose ends make its fronts: only such as were run with the same ones compare."""
LEADER = "firm_halves"
"""Contender that the others are subtracted from."""


@dataclass(frozen=True)
class Runs:
    """A contender's runs that did not fail."""

    title: str
    shares: tuple[float, ...]
    """Preferences that it is to be run with."""
    rows: Sequence[Row]

    def at(self, seed: int, shares: Sequence[float]) -> list[Row]:
        """The seed's runs with these preferences; empty if one is missing."""
        found = [row for row in self.rows if row["seed"] == seed and row["share"] in shares]
        return sorted(found, key=lambda row: float(row["share"])) if len(found) == len(shares) else []

    def over_seeds(self, measure: Callable[[Sequence[Row]], float], shares: Sequence[float]) -> list[float]:
        """The measure of each seed that has been run with all these preferences, and of which it can be told."""
        fronts = [self.at(seed, shares) for seed in sorted({row["seed"] for row in self.rows})]
        return [value for front in fronts if front and not np.isnan(value := measure(front))]


def markdown(
    rows: Sequence[Row], titles: Mapping[str, str], shares: Mapping[str, tuple[float, ...]], rivals: Sequence[str]
) -> str:
    """Contenders by their fronts; ``LEADER`` minus each of ``rivals``, paired by seed; where every preference ends."""
    good = [row for row in rows if "failed" not in row]
    if not good:
        return "No run has finished."
    every = {
        name: Runs(title, shares[name], [row for row in good if row["contender"] == name])
        for name, title in titles.items()
    }
    found = {name: runs for name, runs in every.items() if runs.rows}
    lines = _table(
        [
            "", "preferences", "hypervolume", *FRONTS, "preference respected", "disagreement", "drift", "KL", "uploads",
            "s",
        ],
        [_summary(runs) for runs in found.values()],
    )  # fmt: skip
    pairs = [_differences(found[LEADER], found[name]) for name in rivals if name in found] if LEADER in found else []
    lines += ["", *_table(
        [f"{titles[LEADER]}, minus", "hypervolume", "at its preferences", "drift", "disagreement", "seeds"],
        [cells for cells in pairs if cells],
    )] if any(pairs) else []  # fmt: skip
    names = _objectives(good[0])
    ends = _table(
        ["", f"preference for {names[0]}", *names, "KL", "seeds"],
        [_ends(runs, share) for runs in found.values() for share in sorted({row["share"] for row in runs.rows})],
    )
    starts = np.array([row["start"] for row in {row["seed"]: row for row in good}.values()])
    told = zip(names, starts.T.tolist(), strict=True)
    base = f"The untrained base: {', '.join(f'{name} {rounded_with_interval(values)}' for name, values in told)}."
    failed = [f"{titles[row['contender']]}, seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join([*lines, "", *ends, "", base, *(["", "Failed: " + "; ".join(failed)] if failed else [])])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def _summary(runs: Runs) -> list[str]:
    volumes = [runs.over_seeds(_volume, shares) for shares in (runs.shares, *FRONTS.values())]
    respected = runs.over_seeds(_respected, runs.shares) if len(runs.shares) > 1 else []
    means = [runs.over_seeds(measure, runs.shares) for measure in (_disagreement, _drift, _kl)]
    sizes = [np.mean([row[key] for row in runs.rows]) for key in ("uploads", "seconds")]
    return [
        runs.title, str(len(runs.shares)), *map(_told, volumes), f"{np.mean(respected):.2f}" if respected else "",
        *map(_told, means), f"{sizes[0]:.2f}", f"{sizes[1]:.0f}",
    ]  # fmt: skip


def _differences(leader: Runs, rival: Runs) -> list[str]:
    """Of the seeds in which both have been run with all their preferences; empty if there are none."""
    columns: list[list[float]] = []
    for seed in sorted({row["seed"] for row in rival.rows}):
        whole, theirs = leader.at(seed, leader.shares), rival.at(seed, rival.shares)
        alike = leader.at(seed, rival.shares)
        if whole and theirs:
            fronts = [_volume(whole) - _volume(theirs), _volume(alike) - _volume(theirs) if alike else np.nan]
            rest = [measure(alike or whole) - measure(theirs) for measure in (_drift, _disagreement)]
            columns.append(fronts + rest)
    if not columns:
        return []
    told = [
        "" if np.isnan(column).any() else with_interval(column, 4, sign="+") for column in np.array(columns).T.tolist()
    ]
    return [rival.title, *told, str(len(columns))]


def _ends(runs: Runs, share: float) -> list[str]:
    chosen = [row for row in runs.rows if row["share"] == share]
    ends = np.array([_end(row) for row in chosen])
    rewards = [_told(column) for column in ends.T.tolist()]
    return [runs.title, f"{share:g}", *rewards, _told([_kl([row]) for row in chosen]), str(len(ends))]


def _objectives(row: Row) -> list[str]:
    return [key.removeprefix("reward/") for key in row["ends"][0] if key.startswith("reward/")]


def _end(row: Row) -> NDArray[np.float64]:
    return np.array([np.mean([end[f"reward/{name}"] for end in row["ends"]]) for name in _objectives(row)])


def _volume(front: Sequence[Row]) -> float:
    """Above the untrained base: what it is worse in, however little, dominates nothing."""
    return hypervolume(np.array([_end(row) for row in front]), np.array(front[0]["start"]))


def _respected(front: Sequence[Row]) -> float:
    """Share of the steps to a higher preference that raise its reward."""
    return float(np.mean(np.diff([_end(row)[0] for row in front]) > 0))


def _disagreement(front: Sequence[Row]) -> float:
    return float(np.mean([np.mean(row["disagreement"]) if row["disagreement"] else np.nan for row in front]))


def _drift(front: Sequence[Row]) -> float:
    return float(np.mean([np.mean(row["drift"]) for row in front]))


def _kl(front: Sequence[Row]) -> float:
    return float(np.mean([end["kl"] for row in front for end in row["ends"]]))


def _told(values: Sequence[float]) -> str:
    return rounded_with_interval(values) if values else ""
