"""All tables of ``benchmarks.fc_moe`` in a line each: what helps on which workload, and how far the aim is reached.

    python -m benchmarks.fc_moe_overview        # from the stored cells, in seconds

Whoever runs more of that study, or adds a contender, makes it anew, and then the pages (``benchmarks.render``).
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.cells import Outcome
from benchmarks.fc_moe import stored_tests
from benchmarks.fc_moe_numbers import BySeed, differences, good, results
from benchmarks.fc_moe_told import (
    BASELINE,
    ROUNDS,
    difference,
    digits_of,
    judged_by_accuracy,
    mean_of_known,
    rounds_told,
    summed_up,
    titled,
)
from benchmarks.render import HERE, as_table, write_results
from benchmarks.workloads import WORKLOADS
from server.intervals import interval

AIMED = {"fc_moe_plus_as_shipped": "as shipped", "fc_moe_plus": "tuned"}
"""Who is held against the aim."""
NO_BASELINES = {"noise", "flattening", "local_only", "centralised"}
"""Bounds, and what is there to explain; so is whatever is FC-MoE's but the method itself."""


@dataclass(frozen=True)
class Found:
    """What has been run on a workload, with experts trained in one way."""

    title: str
    experts: str
    """How they were trained."""
    tested: Mapping[str, Outcome]
    """Contender -> its test runs, one at least."""

    @cached_property
    def by_accuracy(self) -> bool:
        """Whether it is judged so, in percent; else by loss, in nats."""
        return judged_by_accuracy(self.tested)

    def values(self, name: str) -> BySeed:
        """What counts of a contender, by seed; empty if it has not been run, or diverged."""
        return results(self.tested[name].rows, self.by_accuracy) if name in self.tested else {}

    def baselines(self, beside: str) -> list[str]:
        """Whom FC-MoE plus is to beat, as far as they have two seeds in common with ``beside``: one has no interval."""
        ours = {name for name in self.tested if name.startswith("fc_moe_")}
        names = [name for name in self.tested if name not in NO_BASELINES | ours]
        return [name for name in names if len(differences(self.values(name), self.values(beside))) > 1]

    def gain(self, name: str, over: str) -> tuple[float, float]:
        """By how much the one is better than the other, paired by seed, and half the width of its 95 % interval."""
        mean, half = interval(differences(self.values(name), self.values(over)))
        return (mean if self.by_accuracy else -mean), half

    def apart(self, name: str, other: str) -> bool:
        """Whether the one is better and their 95 % intervals do not touch."""
        ours, theirs = (interval(list(self.values(each).values())) for each in (name, other))
        return (ours[0] - theirs[0]) * (1 if self.by_accuracy else -1) > ours[1] + theirs[1]

    def minus_baseline(self, name: str) -> str:
        """A contender beside FedAvg, paired by seed."""
        if name not in self.tested:
            return "missing"
        return difference(self.values(name), self.values(BASELINE), digits_of(self.by_accuracy)) or "diverged"

    def titles(self, names: Iterable[str]) -> str:
        """What they are called, and of how many seeds they are if not of FedAvg's."""
        num_seeds = len(self.tested[BASELINE].rows)
        return "; ".join(titled(name, self.tested[name], num_seeds) for name in names)


def read() -> Iterator[Found]:
    """Every table of ``benchmarks.fc_moe`` with a baseline, from its stored cells."""
    for (name, workload), experts in itertools.product(WORKLOADS.items(), ("lora", "full")):
        run = {contender: result for contender, result in stored_tests(name, experts).items() if result.rows}
        if good(run.get(BASELINE, Outcome((), {})).rows):
            yield Found(workload.title, "LoRA" if experts == "lora" else experts, run)


def gains(every: Sequence[Found]) -> str:
    """How alike sites' updates are, what FedAvg comes to, and what others gain over it."""
    lines = []
    for found in every:
        rows = found.tested[BASELINE].rows
        values = found.values(BASELINE)
        cosines = [(row.get("averaging") or {}).get("pairs") for row in good(rows).values()]
        others = [name for name in found.baselines(BASELINE) if name not in (BASELINE, "fc_moe")]
        best = max(others, key=lambda name: found.gain(name, BASELINE)[0], default=None)
        told = summed_up(values, digits_of(found.by_accuracy), len(rows) - len(values))
        lines.append([
            found.title, found.experts, str(len(rows)), mean_of_known(cosines, 3),
            f"{told} {'%' if found.by_accuracy else 'nats'}",
            f"{found.minus_baseline(best)}, {found.titles([best])}" if best else "missing",
            *(found.minus_baseline(name) for name in ("fc_moe", *AIMED)),
        ])  # fmt: skip
    ours = (f"FC-MoE plus, {which}" for which in AIMED.values())
    columns = ["", "experts", "seeds", "cosine of two sites", "FedAvg", "the best other baseline", "FC-MoE", *ours]
    return as_table(columns, lines)


def aim(name: str, every: Sequence[Found]) -> str:
    """From which baselines one of ``AIMED`` is apart, below which it is, and FedAvg's end in how many of its rounds."""
    lines = []
    for found in every:
        cells = _aim(name, found) if found.values(name) else [found.minus_baseline(name), "", "", ""]
        lines.append([found.title, found.experts, *cells])
    table = as_table(
        ["", "experts", "interval apart from", "above, paired by seed", "below, paired by seed", ROUNDS], lines
    )
    return f"FC-MoE plus, {AIMED[name]}, beside the baselines that were run\n\n{table}"


def _aim(name: str, found: Found) -> list[str]:
    baselines = found.baselines(name)
    apart = [other for other in baselines if found.apart(name, other)]
    gained = {other: found.gain(name, other) for other in baselines}
    above = [other for other, (mean, half) in gained.items() if mean > half]
    below = [other for other, (mean, half) in gained.items() if mean < -half]
    rounds = rounds_told(found.tested[name].rows, found.tested[BASELINE].rows, found.by_accuracy)
    counted = (_counted(those, baselines, found) for those in (apart, above))
    return [*counted, found.titles(below) or "none", rounds] if baselines else ["", "", "", rounds]


def _counted(those: Sequence[str], every: Sequence[str], found: Found) -> str:
    """How many, and who else if they are few."""
    others = [name for name in every if name not in those]
    return f"{len(those)} of {len(every)}" + (f", not {found.titles(others)}" if 0 < len(others) <= 3 else "")


def report() -> dict[str, Any]:
    """The results file."""
    every = list(read())
    summary = gains(every)
    return {"markdown": "\n\n".join([summary, *(aim(name, every) for name in AIMED)]), "summary": summary}


def main() -> None:
    """Write the tables."""
    argparse.ArgumentParser(description="FC-MoE's tables in short").parse_args()
    write_results(HERE / "results" / "overview_fc_moe.json", report())


if __name__ == "__main__":
    main()
