"""FIRM and its rivals where the Pareto set is known: distance to it, preferences, disagreement, drift, hypervolume.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.firm_analytic --json benchmarks/results/firm_analytic.json

Every seed draws the problem, its sites and the noise anew; shown are means over seeds with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.firm_methods import Play, Schedule, fedcmoo, firm, fsmgda, scalarised, spread
from benchmarks.firm_problems import Array, Bandit, Problem, Quadratics, distance_to_pareto_set
from benchmarks.render import write_results
from server.intervals import interval
from server.pareto import hypervolume
from strategies.simplex import Weights

ROUNDS = 60
BETAS = (0.0, 0.1, 1.0, 10.0)
BETA = 1.0
"""Of the comparison with other methods."""

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Preference for the first objective; the others share the rest."""


@dataclass(frozen=True)
class Bed:
    """A family of problems."""

    title: str
    draw: Callable[[np.random.Generator], Problem]
    schedule: Schedule
    num_objectives: int


BEDS = {
    "quadratics_2": Bed("Two quadratics", lambda rng: Quadratics.drawn(rng, 2), Schedule(), 2),
    "quadratics_3": Bed("Three quadratics", lambda rng: Quadratics.drawn(rng, 3), Schedule(), 3),
    "bandit": Bed("Bandits, softmax policy, two rewards", Bandit.drawn, Schedule(learning_rate=2.0), 2),
}

METHODS: Mapping[str, Callable[[Weights, Schedule], Play]] = {
    "FIRM, anchor": lambda preference, schedule: firm("anchor", BETA, preference, schedule),
    "FIRM, weighted": lambda preference, schedule: firm("weighted", BETA, preference, schedule),
    "linear scalarisation": scalarised,
}
"""Methods that take a preference."""

WITHOUT_PREFERENCE: Mapping[str, Callable[[Schedule], Play]] = {
    "FIRM, ridge": lambda schedule: firm("ridge", BETA, None, schedule),
    "local MGDA": lambda schedule: firm("ridge", 0.0, None, schedule),
    "FSMGDA": fsmgda,
    "FedCMOO, svd": lambda schedule: fedcmoo("svd", schedule),
    "FedCMOO, topk": lambda schedule: fedcmoo("topk", schedule),
    "FedCMOO, whole gradients": lambda schedule: fedcmoo("none", schedule),
}


MEASURES = ("distance", "disagreement", "drift", "uploads", "bound")
COLUMNS = {
    "distance": "distance to the Pareto set",
    "hypervolume": "share of the hypervolume",
    "respected": "preference respected",
    "disagreement": "disagreement",
    "drift": "drift",
    "bound": "of the bound",
    "uploads": "uploads",
}


def play(problem: Problem, method: Play, num_objectives: int, rng: np.random.Generator) -> dict[str, Any]:
    """One run: where it ends, and means over its rounds."""
    point, weights = problem.start, np.full(num_objectives, 1 / num_objectives)
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(method(problem, point, weights, rng))
        point, weights = rounds[-1].point_D, rounds[-1].weights_CM.mean(axis=0)
    last = rounds[-10:]
    end = np.mean([one.point_D for one in last], axis=0)
    return {
        "losses": problem.losses(end),
        "distance": distance_to_pareto_set(problem, end),
        "disagreement": float(np.mean([spread(one.weights_CM) for one in rounds])),
        "drift": float(np.mean([one.drift for one in rounds])),
        "uploads": rounds[-1].numbers_up / len(point),
        "bound": max(one.bound for one in rounds) or np.nan,
    }


def preferences(num_objectives: int) -> list[Weights]:
    """For the first objective as in ``SHARES``, the others alike."""
    rest = num_objectives - 1
    return [np.array([share, *[(1 - share) / rest] * rest]) for share in SHARES]


class Front:
    """Hypervolume above the worst that the optima of single objectives reach, relative to the best front's."""

    def __init__(self, problem: Problem) -> None:
        optima = problem.optima
        self._reference = -np.max([problem.losses(optimum) for optimum in optima], axis=0)
        self._whole = self._volume([problem.losses(weights @ optima) for weights in _grid(len(optima))])

    def _volume(self, losses: Sequence[Array]) -> float:
        return hypervolume(-np.array(losses), self._reference)

    def share(self, losses: Sequence[Array]) -> float:
        """Of the whole front's volume, what these points dominate."""
        return self._volume(losses) / self._whole


def _grid(num_objectives: int) -> list[Weights]:
    """Weights all over the simplex."""
    steps = 200 if num_objectives == 2 else 24
    heads = product(range(steps + 1), repeat=num_objectives - 1)
    return [np.array([*head, steps - sum(head)]) / steps for head in heads if sum(head) <= steps]


def of_seed(bed: Bed, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Table -> row -> measures, of one draw of the problem."""
    problem = bed.draw(np.random.default_rng([seed, 0]))
    front, wishes = Front(problem), preferences(bed.num_objectives)

    def measured(*methods: Play) -> dict[str, float]:
        """Means over the runs; the hypervolume of the points where they end."""
        runs = [play(problem, one, bed.num_objectives, np.random.default_rng([seed, 1])) for one in methods]
        means = {key: float(np.mean([one[key] for one in runs])) for key in MEASURES}
        ends = [one["losses"] for one in runs]
        return means | {"hypervolume": front.share(ends), "respected": _respected(ends)}

    exact = [problem.losses(problem.best(wish)) for wish in wishes]
    methods = {"optima of the weighted sums": {"hypervolume": front.share(exact), "respected": _respected(exact)}}
    for title, with_preference in METHODS.items():
        methods[title] = measured(*(with_preference(wish, bed.schedule) for wish in wishes))
    for title, without in WITHOUT_PREFERENCE.items():
        methods[title] = measured(without(bed.schedule))
    betas = {f"{beta:g}": measured(*(firm("anchor", beta, wish, bed.schedule) for wish in wishes)) for beta in BETAS}
    return {"methods": methods, "betas": betas}


def _respected(losses: Sequence[Array]) -> float:
    """Share of the steps from one preference to the next, higher one that lower the first loss."""
    first = [one[0] for one in losses]
    return float(np.mean(np.diff(first) < 0)) if len(first) > 1 else np.nan


def run(seeds: Sequence[int]) -> dict[str, Any]:
    """Every bed and seed; each measure as the list of its values by seed."""
    found: dict[str, Any] = {}
    for name, bed in BEDS.items():
        started = time.perf_counter()
        draws = [of_seed(bed, seed) for seed in seeds]
        found[name] = {
            table: {
                row: {key: [draw[table][row][key] for draw in draws] for key in measures}
                for row, measures in draws[0][table].items()
            }
            for table in draws[0]
        }
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return {"benchmark": "firm_analytic", "rounds": ROUNDS, "beta": BETA, "seeds": list(seeds), "beds": found}


def tables(results: Mapping[str, Any]) -> str:
    """For each bed the methods, and FIRM over beta, in Markdown."""
    lines = []
    for name, found in results["beds"].items():
        lines += [f"**{BEDS[name].title}**", "", *_table("", found["methods"]), ""]
        lines += [*_table("FIRM, anchor, beta", found["betas"]), ""]
    return "\n".join(lines)


def _table(corner: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    head = [corner, *COLUMNS.values()]
    cells = [[name, *(_cell(key, measures.get(key)) for key in COLUMNS)] for name, measures in rows.items()]
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *cells]]


def _cell(key: str, values: Sequence[float] | None) -> str:
    if values is None or np.isnan(values).any():
        return ""
    mean, half = interval(values)
    if key in {"uploads", "respected"}:
        return f"{mean:.2f}"
    if key == "bound":
        return f"{max(values):.2f}"
    return f"{mean:.3g} ± {half:.2g}" if mean > 1e-12 else "0"


def main() -> None:
    """Run, write and print the tables."""
    parser = argparse.ArgumentParser(description="FIRM where the Pareto set is known")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results = run(given.seeds)
    if given.json:
        write_results(given.json, results | {"markdown": tables(results)})
    print(tables(results))


if __name__ == "__main__":
    main()
