"""Test runs of ``benchmarks.fc_moe`` computed again on this machine, with the settings that its tuning chose.

    python -m benchmarks.fc_moe_again --workload clinc --strategies fedavg fc_moe_plus_as_shipped --data ../shared/data

Another type of processor or another version of a library rounds differently, and training carries that on. The table
shows what a run comes to then, and whether what one method gains over another is there again. Cells are appended to
``results/again_WORKLOAD_EXPERTS.jsonl``, the table is written beside them; a restart computes what is missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.cells import Outcome, Row, Study, add_arguments, carry_out, stored_rows
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import Cell, run_cell, study_of
from benchmarks.fc_moe_numbers import BySeed, differences, good, results
from benchmarks.fc_moe_tables import BASELINE
from benchmarks.provenance import makers
from benchmarks.render import HERE
from benchmarks.workloads import WORKLOADS
from server.intervals import with_interval


def compared(stored: Mapping[str, Outcome], anew: Mapping[str, Outcome]) -> dict[str, Any]:
    """A table: who was computed again, over the seeds that both have; all differences are paired by seed."""
    both = {name: _of_both(stored[name].rows, anew[name].rows) for name in anew}
    runs = {name: found for name, found in both.items() if found[0]}
    by_accuracy = any(row["accuracy"] for before, _ in runs.values() for row in before.values())
    measure, digits = ("test accuracy, %", 1) if by_accuracy else ("test loss, nats", 3)
    values = {name: [results(rows, by_accuracy) for rows in found] for name, found in runs.items()}
    baseline = values.get(BASELINE, [{}, {}])
    lines = []
    for name, (before, after) in values.items():
        gains = (
            ("", "") if name == BASELINE else (_minus(before, baseline[0], digits), _minus(after, baseline[1], digits))
        )
        means = [with_interval(list(found.values()), digits) for found in (before, after)]
        same = sum(_alike(runs[name][0][seed], runs[name][1][seed]) for seed in before)
        lines.append([CONTENDERS[name].title, len(before), *means, _minus(after, before, digits), same, *gains])
    columns = ["method", "seeds", f"{measure}, stored", "again", "again minus stored", "runs alike to the bit"]
    return {"columns": [*columns, "minus FedAvg, stored", "minus FedAvg, again"], "rows": lines}


def _of_both(stored: Mapping[int, Row], anew: Mapping[int, Row]) -> tuple[dict[int, Row], dict[int, Row]]:
    """Rows of the seeds that both have and on which neither diverged."""
    seeds = sorted(good(stored).keys() & good(anew).keys())
    return {seed: stored[seed] for seed in seeds}, {seed: anew[seed] for seed in seeds}


def _alike(one: Row, other: Row) -> bool:
    """Whether they are the same computation, as far as their curves show it."""
    return all(one[curve] == other[curve] for curve in ("accuracy", "loss"))


def _minus(values: BySeed, others: BySeed, digits: int) -> str:
    found = differences(values, others)
    return with_interval(found, digits, sign="+") if found else ""


def report(names: list[str], stored: Study[Cell], anew: Study[Cell]) -> dict[str, Any]:
    """The results file: by what the runs were made, and the table."""
    tested = {name: anew.tested(name) for name in names}
    made_anew = [row for result in tested.values() for row in result.rows.values()]
    return {
        "seeds": list(anew.seeds),
        "stored_by": makers(stored.rows.values()),
        "made_by": makers(made_anew),
        "table": compared({name: stored.tested(name) for name in names}, tested),
    }


def main() -> None:
    """Compute the runs that are missing as long as there is time; write cells and table."""
    parser = argparse.ArgumentParser(description="runs of FC-MoE's benchmark again")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="clinc")
    parser.add_argument("--experts", choices=["lora", "full"], default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", default="cpu")
    add_arguments(parser, CONTENDERS, tuning_seeds=[100])
    parser.set_defaults(strategies=[BASELINE, "fc_moe_plus_as_shipped"])
    given = parser.parse_args()
    stored, anew = (study_of(given.workload, given.experts, given.seeds, given.tuning_seeds) for _ in range(2))
    for row in stored_rows(HERE / "results" / f"fc_moe_{given.workload}_{given.experts}.jsonl"):
        stored.add(row)
        if row["split"] == "validation":  # the tuning stands
            anew.add(row)
    if untuned := [name for name in given.strategies if stored.tuning(name).missing]:
        parser.error(f"--strategies {' '.join(untuned)}: not tuned in the stored runs")
    run = partial(run_cell, data=given.data, device=given.device)
    path = HERE / "results" / f"again_{given.workload}_{given.experts}.json"
    carry_out(anew, given.strategies, run, partial(report, given.strategies, stored, anew), path, given)


if __name__ == "__main__":
    main()
