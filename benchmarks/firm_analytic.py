"""FIRM and its rivals where the Pareto set is known: distance to it, preferences, disagreement, drift, hypervolume.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.firm_analytic --json benchmarks/results/firm_analytic.json

Every seed draws the problem, its sites and the noise anew; shown are means over seeds with their 95 % intervals. Sweeps
change one of beta, the number of sites and the number of local steps, and leave the rest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.firm_methods import Play, Schedule, fedcmoo, firm, fsmgda, scalarised, spread
from benchmarks.firm_problems import Array, Bandit, Bumps, Problem, Quadratics, distance_to_pareto_set
from benchmarks.provenance import MADE_BY
from benchmarks.render import as_table, write_results
from server.intervals import interval
from server.pareto import hypervolume
from strategies.simplex import Weights

ROUNDS = 60
BETAS = (0.0, 0.03, 0.1, 1.0, 10.0)
BETA = 1.0
"""Of the comparison with other methods, where nothing else is said."""
NUM_SITES = 8
SITES = (2, NUM_SITES, 16)
LOCAL_STEPS = (1, Schedule().local_steps, 20)

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Preference for the first objective; the others share the rest."""
MANY_SHARES = tuple(count / 20 for count in range(1, 20))
"""In search of ends between those of ``SHARES``."""


@dataclass(frozen=True)
class Bed:
    """A family of problems."""

    title: str
    draw: Callable[[np.random.Generator, int], Problem]
    """From the number of sites."""
    schedule: Schedule
    num_objectives: int
    beta: float = BETA
    """Of the comparison with other methods."""


BEDS = {
    "quadratics_2": Bed("Two quadratics", lambda rng, sites: Quadratics.drawn(rng, 2, sites), Schedule(), 2),
    "quadratics_3": Bed("Three quadratics", lambda rng, sites: Quadratics.drawn(rng, 3, sites), Schedule(), 3),
    "bandit": Bed(
        "Bandits, softmax policy, two rewards",
        lambda rng, sites: Bandit.drawn(rng, num_sites=sites),
        Schedule(learning_rate=2.0),
        2,
    ),
    # Held to the preference as firmly as elsewhere, it goes where weighted sums go: to the ends. Chosen on other seeds.
    "bumps": Bed("Two bumps, a concave front", Bumps.drawn, Schedule(), 2, beta=0.03),
}

Method = Callable[[Weights, Schedule], Play]
"""From the preference, which those that take none ignore."""


def anchored(beta: float) -> Method:
    """FIRM, held to the preference."""
    return lambda preference, schedule: firm("anchor", beta, preference, schedule)


def with_preference(beta: float) -> dict[str, Method]:
    """Methods that take a preference."""
    return {
        LEADER: anchored(beta),
        "FIRM, weighted": lambda preference, schedule: firm("weighted", beta, preference, schedule),
        "linear scalarisation": scalarised,
    }


def without_preference(beta: float) -> dict[str, Method]:
    """Methods that take none."""
    return {
        "FIRM, ridge": lambda _, schedule: firm("ridge", beta, None, schedule),
        "local MGDA": lambda _, schedule: firm("ridge", 0.0, None, schedule),
        "FSMGDA": lambda _, schedule: fsmgda(schedule),
        "FedCMOO, svd": lambda _, schedule: fedcmoo("svd", schedule),
        "FedCMOO, topk": lambda _, schedule: fedcmoo("topk", schedule),
        "FedCMOO, whole gradients": lambda _, schedule: fedcmoo("none", schedule),
    }


LEADER = "FIRM, anchor"
SWEPT = (LEADER, "linear scalarisation", "local MGDA")
"""Methods whose sites and local steps are varied, at equal preference; the others are subtracted from the first."""
MANY = f", {len(MANY_SHARES)} preferences"

MEASURES = ("distance", "disagreement", "drift", "uploads", "bound")
COLUMNS = {
    "distance": "distance to the Pareto set",
    "hypervolume": "share of the hypervolume",
    "equal": "at equal preference",
    "respected": "preference respected",
    "disagreement": "disagreement",
    "drift": "drift",
    "bound": "of the bound",
    "uploads": "uploads",
}
SWEEPS = {"FIRM, anchor, beta": "betas", "sites, equal preference": "sites", "local steps, equal preference": "steps"}


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


def preferences(num_objectives: int, shares: Sequence[float] = SHARES) -> list[Weights]:
    """For the first objective as in ``shares``, the others alike."""
    rest = num_objectives - 1
    return [np.array([share, *[(1 - share) / rest] * rest]) for share in shares]


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
    steps = 200 if num_objectives == 2 else 72
    heads = product(range(steps + 1), repeat=num_objectives - 1)
    return [np.array([*head, steps - sum(head)]) / steps for head in heads if sum(head) <= steps]


Measured = dict[str, float]


def of_seed(bed: Bed, seed: int) -> dict[str, dict[str, Measured]]:
    """Table -> row -> measures, of one draw of the problem."""
    draws = {count: Draw(bed, seed, count) for count in SITES}
    draw, schedule = draws[NUM_SITES], bed.schedule
    steps = {count: replace(schedule, local_steps=count) for count in LOCAL_STEPS}
    led, others = with_preference(bed.beta), without_preference(bed.beta)
    swept = {title: (led | others)[title] for title in SWEPT}
    return {
        "methods": {"optima of the weighted sums": draw.exact()}
        | {title: draw.measured(method, schedule) for title, method in led.items()}
        | {f"{title}{MANY}": draw.measured(led[title], schedule, MANY_SHARES) for title in SWEPT[:2]}
        | {title: draw.measured_once(method, schedule) for title, method in others.items()},
        "betas": {f"{beta:g}": draw.measured(anchored(beta), schedule) for beta in BETAS},
        "sites": {f"{n}, {title}": draws[n].at_equal(one, schedule) for n in SITES for title, one in swept.items()},
        "steps": {f"{n}, {title}": draw.at_equal(one, steps[n]) for n in LOCAL_STEPS for title, one in swept.items()},
    }


class Draw:
    """A bed's problem, drawn for a seed and a number of sites."""

    def __init__(self, bed: Bed, seed: int, num_sites: int) -> None:
        self._problem = bed.draw(np.random.default_rng([seed, 0]), num_sites)
        self._front = Front(self._problem)
        self._seed = seed
        self._num_objectives = bed.num_objectives
        self._equal = np.full(bed.num_objectives, 1 / bed.num_objectives)

    def measured(self, method: Method, schedule: Schedule, shares: Sequence[float] = SHARES) -> Measured:
        """Means over the runs with all preferences, the hypervolume of their ends, and of the equal preference's."""
        runs = [self._run(method, wish, schedule) for wish in preferences(self._num_objectives, shares)]
        ends = [one["losses"] for one in runs]
        return _means(runs) | {
            "hypervolume": self._front.share(ends),
            "respected": _respected(ends),
            "equal": self.at_equal(method, schedule)["equal"],
        }

    def measured_once(self, method: Method, schedule: Schedule) -> Measured:
        """The same of a method that takes no preference."""
        found = self.at_equal(method, schedule)
        return found | {"hypervolume": found["equal"]}

    def at_equal(self, method: Method, schedule: Schedule) -> Measured:
        """Of the run with equal preferences alone."""
        run = self._run(method, self._equal, schedule)
        return _means([run]) | {"equal": self._front.share([run["losses"]])}

    def exact(self) -> Measured:
        """Of the points that linear scalarisation aims at."""
        wishes = preferences(self._num_objectives)
        *ends, equal = [self._problem.losses(self._problem.best(wish)) for wish in (*wishes, self._equal)]
        shares = {"hypervolume": self._front.share(ends), "equal": self._front.share([equal])}
        return shares | {"respected": _respected(ends)}

    def _run(self, method: Method, wish: Weights, schedule: Schedule) -> dict[str, Any]:
        rng = np.random.default_rng([self._seed, 1])
        return play(self._problem, method(wish, schedule), len(wish), rng)


def _means(runs: Sequence[Mapping[str, Any]]) -> Measured:
    return {key: float((np.max if key == "bound" else np.mean)([one[key] for one in runs])) for key in MEASURES}


def _respected(losses: Sequence[Array]) -> float:
    """Share of the steps from one preference to the next, higher one that lower the first loss."""
    first = [one[0] for one in losses]
    return float(np.mean(np.diff(first) < 0))


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
    """For each bed the methods and the sweeps, in Markdown."""
    lines = []
    for name, found in results["beds"].items():
        lines += [f"**{BEDS[name].title}, beta {BEDS[name].beta:g}**", "", _table("", found["methods"]), ""]
        lines += [_differences(found["methods"]), ""]
        for title, table in SWEEPS.items():
            lines += [_table(title, found[table]), ""]
    return "\n".join(lines)


def _table(corner: str, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    head = [corner, *COLUMNS.values()]
    cells = [[name, *(_cell(key, measures.get(key)) for key in COLUMNS)] for name, measures in rows.items()]
    return as_table(head, cells)


def _differences(rows: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """``LEADER`` minus its rivals, paired by seed."""
    keys = ("hypervolume", "equal", "drift", "disagreement")
    lines = []
    for leader, rival in (*((LEADER, rival) for rival in SWEPT[1:]), (f"{LEADER}{MANY}", f"{SWEPT[1]}{MANY}")):
        pairs = [np.subtract(rows[leader][key], rows[rival][key]).tolist() for key in keys]
        lines.append([rival, *(f"{mean:+.3g} ± {half:.2g}" for mean, half in map(interval, pairs))])
    return as_table([f"{LEADER}, minus", *(COLUMNS[key] for key in keys)], lines)


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
        write_results(given.json, results | {"made_by": MADE_BY, "markdown": tables(results)})
    print(tables(results))


if __name__ == "__main__":
    main()
