"""From the cells of ``benchmarks.flex`` to its tables: what the sites have, what is forgotten, what it costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.cells import Outcome, Row
from benchmarks.contenders import PERSONAL
from benchmarks.render import as_table
from client.evaluation.measured import BASE, GLOBAL
from client.evaluation.measured import PERSONAL as OWN
from server.intervals import with_interval
from server.usage import usage_of

BASELINE = "fedavg"

Number = Callable[[Row], float | None]
"""A number of a run; None if it has none."""


def markdown(title: str, tested: Mapping[str, Outcome], seeds: Sequence[int]) -> str:
    """Two tables: ROUGE-L and loss on the sites' own data; knowledge kept, traffic and cost."""
    done = {name: good_rows(outcome) for name, outcome in tested.items()}
    sites = sorted({site for rows in done.values() for row in rows.values() for site in own_scores(row, "rouge_l")})
    return f"{title}, {len(seeds)} seeds\n\n{_quality(tested, done, sites, seeds)}\n\n{_costs(done)}"


def good_rows(outcome: Outcome) -> dict[int, Row]:
    """Seed -> row of the runs that did not diverge."""
    return {seed: row for seed, row in outcome.rows.items() if "failed" not in row}


def in_use(row: Row) -> str:
    """The model that the run's sites use."""
    return next(model for model in (OWN, GLOBAL) if model in row["evaluation"]["summary"])


def own_scores(row: Row, metric: str) -> dict[str, float]:
    """Site -> the number of the model in use there on its own data."""
    model = in_use(row)
    scores = [score for score in row["evaluation"]["scores"] if score["model"] == model and score[metric] is not None]
    return {
        score["on"]: score[metric] for score in scores if score["of"] in {None, score["on"]} and score["on"][0] != "*"
    }


def _quality(
    tested: Mapping[str, Outcome], done: Mapping[str, Mapping[int, Row]], sites: Sequence[str], seeds: Sequence[int]
) -> str:
    per_site = sites if len(sites) <= 4 else ()
    columns = ["method", "ROUGE-L", "minus FedAvg", *per_site, "worst site", "std", "loss", "minus FedAvg", "tuned"]
    lines = []
    base = next((rows for rows in done.values() if rows), {})
    lines.append(["base model", *_of_model(base, BASE, per_site), ""])
    for name, outcome in tested.items():
        rows = done[name]
        missing = len(seeds) - len(outcome.rows)
        title = PERSONAL[name].title + (
            f" ({missing} of {len(seeds)} seeds missing)" if 0 < missing < len(seeds) else ""
        )
        if rows:
            cells = _of_model(rows, None, per_site)
            if name != BASELINE:
                cells[1], cells[-1] = (_minus_baseline(rows, done[BASELINE], metric) for metric in ("rouge_l", "loss"))
        else:
            cells = ["diverged" if outcome.rows else "missing", *[""] * (len(columns) - 3)]
        lines.append([title, *cells, _tuned(outcome) if rows else ""])
    return as_table(columns, lines)


def _of_model(rows: Mapping[int, Row], model: str | None, sites: Sequence[str]) -> list[str]:
    """Cells of a model (None: of that in use): ROUGE-L, an empty one, each site, worst site, std, loss, an empty."""

    def summary(row: Row, metric: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = row["evaluation"]["summary"][model or in_use(row)].get(metric, {})
        return found

    def mean(metric: str, key: str) -> str:
        return _over_seeds(rows, lambda row: summary(row, metric).get(key))

    def at(site: str) -> str:
        return _over_seeds(rows, lambda row: own_scores(row, "rouge_l").get(site)) if model is None else ""

    return [mean("rouge_l", "mean"), "", *map(at, sites), *(mean("rouge_l", key) for key in ("worst", "std")),
            mean("loss", "mean"), ""]  # fmt: skip


def _minus_baseline(rows: Mapping[int, Row], baseline: Mapping[int, Row], metric: str) -> str:
    """Difference of the sites' means, paired by seed."""

    def mean(row: Row) -> float:
        return statistics.fmean(own_scores(row, metric).values())

    differences = [mean(row) - mean(baseline[seed]) for seed, row in rows.items() if seed in baseline]
    return with_interval(differences, 4, sign="+") if differences else ""


def _costs(done: Mapping[str, Mapping[int, Row]]) -> str:
    general = sorted(
        {
            (metric, name)
            for rows in done.values()
            for row in rows.values()
            for metric, found in row["evaluation"]["summary"][BASE].items()
            for name in found["general"]
        }
    )
    columns = ["method", *(f"{name.strip('*')}: {metric.replace('_', '-')}" for metric, name in general),
               "kB up", "kB down", "routing entropy", "busiest expert", "operations", "time",
               "spread of the choice"]  # fmt: skip
    lines = []
    base = next((rows for rows in done.values() if rows), {})
    lines.append(["base model", *(_over_seeds(base, _general(BASE, *each)) for each in general), *[""] * 7])
    for name, rows in done.items():
        if rows:
            kept = [_over_seeds(rows, _general(None, *each)) for each in general]
            lines.append(
                [PERSONAL[name].title, *kept, *(_over_seeds(rows, number, digits) for number, digits in _COSTS)]
            )
    return as_table(columns, lines)


def _general(model: str | None, metric: str, name: str) -> Number:
    """The number of a model (None: of that in use) on a general set."""

    def number(row: Row) -> float | None:
        found = row["evaluation"]["summary"][model or in_use(row)].get(metric, {})
        value: float | None = found.get("general", {}).get(name)
        return value

    return number


def _usage(key: str, otherwise: float | None = None) -> Number:
    return lambda row: usage_of(row["evaluation"]).get(key, otherwise)


def _graft_spread(row: Row) -> float | None:
    return statistics.fmean(row["graft_spread"].values()) if row["graft_spread"] else None


_COSTS: tuple[tuple[Number, int], ...] = (
    (lambda row: row["bytes_up"] / 1e3, 1),
    (lambda row: row["bytes_down"] / 1e3, 1),
    (_usage("entropy"), 3),
    (_usage("largest_share"), 3),
    (_usage("flops", 1.0), 3),
    (_usage("seconds", 1.0), 2),
    (_graft_spread, 4),
)
"""Bytes of a site and round, both ways; ``server.usage.USAGES``; by how much the grafted expert won the choice."""


def _over_seeds(rows: Mapping[int, Row], number: Number, digits: int = 4) -> str:
    values = [value for value in map(number, rows.values()) if value is not None]
    return with_interval(values, digits) if values else ""


def _tuned(outcome: Outcome) -> str:
    return ", ".join(
        word.replace("train.learning_rate", "lr").removeprefix("strategy.")
        for word in outcome.settings
        if word.partition("=")[0] in _KNOBS
    )


_KNOBS = {"train.learning_rate"} | {knob.key for contender in PERSONAL.values() for knob in contender.knobs}
