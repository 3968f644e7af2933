"""From the cells of ``benchmarks.firm`` to its tables: means over seeds with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
FRONTS = {"hypervolume": ALL_SHARES, "of 0.1, 0.5, 0.9": THREE_SHARES, "at equal preference": EQUAL}
"""Column -> the preferences whose ends make its fronts: only such as were run with the same ones compare."""
LEADER = "firm"
"""Contender that the others are subtracted from."""


def markdown(rows: Sequence[Row], titles: Mapping[str, str], rivals: Sequence[str]) -> str:
    """Contenders by their fronts; ``LEADER`` minus each of ``rivals``, paired by seed; where every preference ends."""
    good = [row for row in rows if "failed" not in row]
    if not good:
        return "No run has finished."
    objectives = [key for key in good[0]["ends"][0] if key.startswith("reward/")]
    reference = np.min([_end(row, objectives) for row in good], axis=0)
    found = {name: [row for row in good if row["contender"] == name] for name in titles}
    lines = _table(
        ["", *FRONTS, "preference respected", "disagreement", "drift", "KL", "uploads", "s"],
        [[titles[name], *_summary(of_name, objectives, reference)] for name, of_name in found.items() if of_name],
    )
    leader = found.get(LEADER, [])
    pairs = {name: _differences(leader, found[name], objectives, reference) for name in rivals if name in found}
    lines += ["", *_table(
        [f"{titles[LEADER]}, minus", "preferences", "hypervolume", "drift", "disagreement", "seeds"],
        [[titles[name], *cells] for name, cells in pairs.items() if cells],
    )] if any(pairs.values()) else []  # fmt: skip
    names = [objective.removeprefix("reward/") for objective in objectives]
    ends = _table(
        ["", f"preference for {names[0]}", *names, "seeds"],
        [
            [titles[name], f"{share:g}", *_rewards(of_name, share, objectives)]
            for name, of_name in found.items()
            for share in sorted({row["share"] for row in of_name})
        ],
    )
    failed = [f"{titles[row['contender']]}, seed {row['seed']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n".join([*lines, "", *ends, *(["", "Failed: " + "; ".join(failed)] if failed else [])])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def _summary(rows: Sequence[Row], objectives: Sequence[str], reference: NDArray[np.float64]) -> list[str]:
    by_seed: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["share"]):
        by_seed.setdefault(row["seed"], []).append(row)
    fronts = [
        _with_interval(_volumes([*by_seed.values()], shares, objectives, reference)) for shares in FRONTS.values()
    ]
    steps = [np.diff([_end(row, objectives)[0] for row in of_seed]) > 0 for of_seed in by_seed.values()]
    respected = np.concatenate(steps)
    means = [
        [float(np.mean([np.mean(row[key]) for row in of_seed])) for of_seed in by_seed.values() if of_seed[0][key]]
        for key in ("disagreement", "drift")
    ]
    kl = [float(np.mean([end["kl"] for row in of_seed for end in row["ends"]])) for of_seed in by_seed.values()]
    sizes = [np.mean([row[key] for row in rows]) for key in ("uploads", "seconds")]
    return [
        *fronts, f"{respected.mean():.2f}" if len(respected) else "", *map(_with_interval, means), _with_interval(kl),
        f"{sizes[0]:.2f}", f"{sizes[1]:.0f}",
    ]  # fmt: skip


def _volumes(
    by_seed: Sequence[Sequence[Row]],
    shares: Sequence[float],
    objectives: Sequence[str],
    reference: NDArray[np.float64],
) -> list[float]:
    """Of each seed that has been run with all these preferences."""
    chosen = [[row for row in of_seed if row["share"] in shares] for of_seed in by_seed]
    return [
        hypervolume(np.array([_end(row, objectives) for row in of_seed]), reference)
        for of_seed in chosen
        if len(of_seed) == len(shares)
    ]


def _differences(
    leader: Sequence[Row], rival: Sequence[Row], objectives: Sequence[str], reference: NDArray[np.float64]
) -> list[str]:
    """Over the preferences that the rival was run with, of the seeds in which both were; empty if there are none."""
    shares = sorted({row["share"] for row in rival})
    differences = []
    for seed in sorted({row["seed"] for row in rival}):
        both = [[row for row in rows if row["seed"] == seed and row["share"] in shares] for rows in (leader, rival)]
        if not all(len(rows) == len(shares) for rows in both):
            continue
        volumes = [hypervolume(np.array([_end(row, objectives) for row in rows]), reference) for rows in both]
        drifts, disagreements = (
            [np.mean([np.mean(row[key]) if row[key] else np.nan for row in rows]) for rows in both]
            for key in ("drift", "disagreement")
        )
        differences.append([float(left) - float(right) for left, right in (volumes, drifts, disagreements)])
    if not differences:
        return []
    columns = np.array(differences).T
    told = ["" if np.isnan(column).any() else with_interval(column.tolist(), 4, sign="+") for column in columns]
    return [", ".join(f"{share:g}" for share in shares), *told, str(len(differences))]


def _rewards(rows: Sequence[Row], share: float, objectives: Sequence[str]) -> list[str]:
    ends = np.array([_end(row, objectives) for row in rows if row["share"] == share])
    return [*(_with_interval(column) for column in ends.T.tolist()), str(len(ends))]


def _end(row: Row, objectives: Sequence[str]) -> NDArray[np.float64]:
    return np.array([np.mean([end[name] for end in row["ends"]]) for name in objectives])


def _with_interval(values: Sequence[float]) -> str:
    return rounded_with_interval(values) if values else ""
