"""From the cells of ``benchmarks.firm`` to its tables: means over seeds with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.render import as_table
from server.intervals import rounded_with_interval, with_interval
from server.pareto import hypervolume

Row = Mapping[str, Any]

ALL_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Preferences for the first of two objectives."""
THREE_SHARES = (0.1, 0.5, 0.9)
EQUAL = (0.5,)
FRONTS = {"at 0.1, 0.5, 0.9": THREE_SHARES, "at equal preference": EQUAL}
"""Column -> preferences whose ends make its fronts: only such as were run with the same ones compare."""
_NOISE = 0.02
"""Of a reward's mean over some 200 answers and three rounds."""


class Runs:
    """A contender's runs."""

    def __init__(self, title: str, shares: tuple[float, ...], rows: Sequence[Row]) -> None:
        """Rows of ``benchmarks.firm``, its own last; ``shares``: the preferences that there are to be runs with."""
        self.title = title
        self.shares = shares
        self.rows = [row for row in rows if "failed" not in row]
        self.failed = [f"{title}, seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row]

    @property
    def own_shares(self) -> list[float]:
        """Preferences of runs that are no other contender's as well, in order: the last rows are a contender's own."""
        return sorted({row["share"] for row in self.rows if row["contender"] == self.rows[-1]["contender"]})

    def at(self, seed: int, shares: Sequence[float]) -> list[Row]:
        """The seed's runs with these preferences; empty if one is missing."""
        found = [row for row in self.rows if row["seed"] == seed and row["share"] in shares]
        return sorted(found, key=lambda row: float(row["share"])) if len(found) == len(shares) else []

    def over_seeds(self, measure: Callable[[Sequence[Row]], float], shares: Sequence[float]) -> list[float]:
        """The measure of each seed that has been run with all these preferences, and of which it can be told."""
        fronts = [self.at(seed, shares) for seed in sorted({row["seed"] for row in self.rows})]
        return [value for front in fronts if front and not np.isnan(value := measure(front))]


Pairing = tuple[Runs, Sequence[Runs]]
"""A leader, its runs with whatever preferences a rival has, and its rivals."""


def markdown(every: Sequence[Runs], pairings: Sequence[Pairing]) -> str:
    """All by their fronts; each leader minus its rivals, paired by seed; where every preference ends.

    Args:
        every: Contenders with the runs that they have, one or more.
        pairings: The rivals are of ``every``.
    """
    found = [runs for runs in every if runs.rows]
    if not found:
        return "No run has finished."
    fronts = as_table(
        [
            "", "preferences", "hypervolume", *FRONTS, "above (0, 0)", "preference respected", "disagreement", "drift",
            "KL", "uploads", "s", "seeds",
        ],
        [_summary(runs) for runs in found],
    )  # fmt: skip
    lines = [fronts, *(line for leader, rivals in pairings for line in _paired(leader, rivals))]
    names = _objectives(found[0].rows[0])
    ends = as_table(
        ["", f"preference for {names[0]}", *names, "KL", "seeds"],
        [_ends(runs, share) for runs in found for share in runs.own_shares],
    )
    starts = np.array([row["start"] for row in {row["seed"]: row for row in found[0].rows}.values()])
    told = zip(names, starts.T.tolist(), strict=True)
    base = f"The untrained base: {', '.join(f'{name} {rounded_with_interval(values)}' for name, values in told)}."
    failed = [line for runs in every for line in runs.failed]
    return "\n".join([*lines, "", ends, "", base, *(["", "Failed: " + "; ".join(failed)] if failed else [])])


def _summary(runs: Runs) -> list[str]:
    volumes = [runs.over_seeds(_volume, shares) for shares in (runs.shares, *FRONTS.values())]
    volumes.append(runs.over_seeds(_volume_above_zero, runs.shares))
    respected = runs.over_seeds(_respected, runs.shares) if len(runs.shares) > 1 else []
    means = [runs.over_seeds(measure, runs.shares) for measure in (_disagreement, _drift, _kl)]
    sizes = [np.mean([row[key] for row in runs.rows]) for key in ("uploads", "seconds")]
    return [
        runs.title, str(len(runs.shares)), *map(_told, volumes), f"{np.mean(respected):.2f}" if respected else "",
        *map(_told, means), f"{sizes[0]:.2f}", f"{sizes[1]:.0f}",
        str(len(runs.over_seeds(_drift, runs.shares))),
    ]  # fmt: skip


def _paired(leader: Runs, rivals: Sequence[Runs]) -> list[str]:
    """A blank line and the table of the leader minus its rivals; nothing if no seed has both."""
    pairs = [
        cells for runs in rivals for shares in _compared(leader, runs) if (cells := _differences(leader, runs, shares))
    ]
    head = [f"{leader.title}, minus", "preferences", "hypervolume", "above (0, 0)", "drift", "disagreement", "seeds"]
    return ["", as_table(head, pairs)] if pairs else []


def _compared(leader: Runs, rival: Runs) -> list[tuple[float, ...]]:
    """The leader's preferences for a pair: the rival's; all as well, where that has one end whatever is preferred."""
    return [rival.shares] if len(rival.shares) > 1 else [rival.shares, leader.shares]


def _differences(leader: Runs, rival: Runs, shares: tuple[float, ...]) -> list[str]:
    """Of the seeds in which both have been run, the leader with ``shares``; empty if there are none."""
    columns = [
        [measure(ours) - measure(theirs) for measure in (_volume, _volume_above_zero, _drift, _disagreement)]
        for seed in sorted({row["seed"] for row in rival.rows})
        if (ours := leader.at(seed, shares)) and (theirs := rival.at(seed, rival.shares))
    ]
    if not columns:
        return []
    told = [
        "" if np.isnan(column).any() else with_interval(column, 4, sign="+") for column in np.array(columns).T.tolist()
    ]
    preferences = ", ".join(f"{share:g}" for share in shares)
    against = "" if shares == rival.shares else " against its one end"
    return [rival.title, preferences + against, *told, str(len(columns))]


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


def _volume_above_zero(front: Sequence[Row]) -> float:
    return hypervolume(np.array([_end(row) for row in front]), np.zeros(len(front[0]["start"])))


def _respected(front: Sequence[Row]) -> float:
    """Share of the steps to a higher preference that neither lower its reward nor raise the other by more than noise.

    Each reward counts by itself.
    """
    steps = np.diff([_end(row) for row in front], axis=0)
    return float(np.mean([steps[:, 0] > -_NOISE, steps[:, 1] < _NOISE]))


def _disagreement(front: Sequence[Row]) -> float:
    return float(np.mean([np.mean(row["disagreement"]) if row["disagreement"] else np.nan for row in front]))


def _drift(front: Sequence[Row]) -> float:
    return float(np.mean([np.mean(row["drift"]) for row in front]))


def _kl(front: Sequence[Row]) -> float:
    return float(np.mean([end["kl"] for row in front for end in row["ends"]]))


def _told(values: Sequence[float]) -> str:
    return rounded_with_interval(values) if values else ""
