"""All tables of ``benchmarks.fc_moe`` in a line each: what helps on which workload, and how far the aim is reached.

python -m benchmarks.fc_moe_overview        # from the stored cells, in seconds
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.cells import Outcome, stored_rows
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import compared, study_of
from benchmarks.fc_moe_numbers import BySeed, differences, good, results
from benchmarks.fc_moe_tables import BASELINE, rounds_told
from benchmarks.render import HERE, as_table, write_results
from benchmarks.workloads import WORKLOADS
from server.intervals import interval, with_interval

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
    by_accuracy: bool
    """In percent; else by loss, in nats."""

    def values(self, name: str) -> BySeed:
        """What counts of a contender, by seed; empty if it has not been run."""
        return results(self.tested[name].rows, self.by_accuracy) if name in self.tested else {}

    def baselines(self) -> list[str]:
        """Whom FC-MoE plus is to beat."""
        ours = {name for name in self.tested if name.startswith("fc_moe_")}
        return [name for name in self.tested if name not in NO_BASELINES | ours]

    def gain(self, name: str, over: str) -> tuple[float, float]:
        """By how much the one is better than the other, paired by seed, and half the width of its 95 % interval."""
        mean, half = interval(differences(self.values(name), self.values(over)))
        return (mean if self.by_accuracy else -mean), half

    def apart(self, name: str, other: str) -> bool:
        """Whether the one is better and their 95 % intervals do not touch."""
        ours, theirs = (interval(list(self.values(each).values())) for each in (name, other))
        return (ours[0] - theirs[0]) * (1 if self.by_accuracy else -1) > ours[1] + theirs[1]

    def told(self, values: Iterable[float], sign: str = "") -> str:
        """Mean with its interval."""
        return with_interval(list(values), 1 if self.by_accuracy else 4, sign)

    def minus_baseline(self, name: str) -> str:
        """A contender beside FedAvg, paired by seed."""
        found = differences(self.values(name), self.values(BASELINE))
        return self.told(found, sign="+") if found else "missing"


def read() -> Iterator[Found]:
    """Every table of ``benchmarks.fc_moe`` that has a baseline, from its stored cells."""
    stored = [json.loads(path.read_text()) for path in (HERE / "results").glob("fc_moe_*.json")]
    order = list(WORKLOADS)
    for of in sorted(stored, key=lambda of: (order.index(of["workload"]), of["experts"] == "full")):
        name, experts = of["workload"], of["experts"]
        study = study_of(name, experts, of["seeds"], of["tuning_seeds"])
        for row in stored_rows(HERE / "results" / f"fc_moe_{name}_{experts}.jsonl"):
            study.add(row)
        tested = {contender: study.tested(contender) for contender in compared(name, experts)}
        run = {contender: result for contender, result in tested.items() if good(result.rows)}
        workload = WORKLOADS[name]
        if BASELINE in run:
            yield Found(workload.title, {"lora": "LoRA"}.get(experts, experts), run, bool(workload.labels))


def gains(every: Sequence[Found]) -> str:
    """How alike sites' updates are, what FedAvg comes to, and what others gain over it."""
    lines = []
    for found in every:
        rows = good(found.tested[BASELINE].rows).values()
        cosines = [row["averaging"]["pairs"] for row in rows if row.get("averaging")]
        others = [name for name in found.baselines() if name not in (BASELINE, "fc_moe")]
        best = max(others, key=lambda name: found.gain(name, BASELINE)[0], default=BASELINE)
        lines.append([
            found.title, found.experts, str(len(rows)), f"{np.mean(cosines):.3f}" if cosines else "",
            f"{found.told(found.values(BASELINE).values())} {'%' if found.by_accuracy else 'nats'}",
            f"{found.minus_baseline(best)}, {CONTENDERS[best].title}" if best != BASELINE else "missing",
            *(found.minus_baseline(name) for name in ("fc_moe", *AIMED)),
        ])  # fmt: skip
    ours = (f"FC-MoE plus, {which}" for which in AIMED.values())
    columns = ["", "experts", "seeds", "cosine of two sites", "FedAvg", "the best other baseline", "FC-MoE", *ours]
    return as_table(columns, lines)


def aim(name: str, every: Sequence[Found]) -> str:
    """From which baselines one of ``AIMED`` is apart, below which it is, and FedAvg's end in how many of its rounds."""
    lines = []
    for found in every:
        cells = _aim(name, found) if name in found.tested else ["missing", "", "", ""]
        lines.append([found.title, found.experts, *cells])
    columns = [
        "interval apart from",
        "above, paired by seed",
        "below, paired by seed",
        "rounds to FedAvg's end, x its own",
    ]
    table = as_table(["", "experts", *columns], lines)
    return f"FC-MoE plus, {AIMED[name]}, beside the baselines that were run\n\n{table}"


def _aim(name: str, found: Found) -> list[str]:
    baselines = found.baselines()
    apart = [other for other in baselines if found.apart(name, other)]
    gained = {other: found.gain(name, other) for other in baselines}
    above = [other for other, (mean, half) in gained.items() if mean > half]
    below = [other for other, (mean, half) in gained.items() if mean < -half]
    rounds = rounds_told(found.tested[name].rows, found.tested[BASELINE].rows, found.by_accuracy)
    return [_counted(apart, baselines), _counted(above, baselines), _titles(below) or "none", rounds]


def _counted(those: Sequence[str], every: Sequence[str]) -> str:
    """How many, and who else if they are few."""
    others = [name for name in every if name not in those]
    return f"{len(those)} of {len(every)}" + (f", not {_titles(others)}" if those and 0 < len(others) <= 3 else "")


def _titles(names: Iterable[str]) -> str:
    return "; ".join(CONTENDERS[name].title for name in names)


def report() -> dict[str, Any]:
    """The results file."""
    every = list(read())
    return {"markdown": "\n\n".join([gains(every), *(aim(name, every) for name in AIMED)]), "summary": gains(every)}


def main() -> None:
    """Write the tables."""
    argparse.ArgumentParser(description="FC-MoE's tables in short").parse_args()
    write_results(HERE / "results" / "overview_fc_moe.json", report())


if __name__ == "__main__":
    main()
