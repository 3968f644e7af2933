"""Tests of ``benchmarks.fc_moe`` with seeds that nobody had looked at while a rule and its values were chosen.

    python -m benchmarks.fc_moe_fresh --workload clinc --strategies fedavg fedavgm fc_moe_plus_as_shipped \
      --seeds 10 11 12 13 14 --data ../shared/data

Everyone has the settings that the stored runs' tuning chose; seeds of stored tests are refused. Cells are appended to
``results/fresh_WORKLOAD_EXPERTS.jsonl``, the table is written beside them; a restart computes what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cells import Outcome
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import stored
from benchmarks.fc_moe_again import arguments, tested_now
from benchmarks.fc_moe_numbers import on_sites, results
from benchmarks.fc_moe_tables import (
    BASELINE,
    ROUNDS,
    difference,
    digits_of,
    judged_by_accuracy,
    measure_of,
    rounds_told,
    summed_up,
)
from benchmarks.provenance import makers


def compared(before: Mapping[str, Outcome], fresh: Mapping[str, Outcome]) -> dict[str, Any]:
    """A table with a line for each who has been run with fresh seeds, and what the stored ones had shown beside it."""
    run = {name: result.rows for name, result in fresh.items() if result.rows}
    by_accuracy = judged_by_accuracy(fresh)
    digits, lines = digits_of(by_accuracy), []
    for name, rows in run.items():
        of_all = results(rows, by_accuracy), results(before[name].rows, by_accuracy)
        cells = [summed_up(of_all[0], digits, len(rows) - len(of_all[0]))]
        beside = ["", "", "", ""]
        if name != BASELINE and BASELINE in run:
            sites = zip(on_sites(rows, by_accuracy)[:2], on_sites(run[BASELINE], by_accuracy)[:2], strict=True)
            baselines = results(run[BASELINE], by_accuracy), results(before[BASELINE].rows, by_accuracy)
            gains = [difference(values, others, digits) for values, others in zip(of_all, baselines, strict=True)]
            beside = [*gains, " / ".join(difference(values, others, digits) for values, others in sites)]
            beside.append(rounds_told(rows, run[BASELINE], by_accuracy))
        lines.append([CONTENDERS[name].title, len(rows), *cells, *beside])
    columns = ["method", "fresh seeds", measure_of(by_accuracy), "minus FedAvg", "minus FedAvg, the seeds looked at"]
    return {"columns": [*columns, "on sites' own data: mean / worst, minus FedAvg", ROUNDS], "rows": lines}


def report(before: Mapping[str, Outcome], fresh: Mapping[str, Outcome]) -> dict[str, Any]:
    """The results file: by what the runs were made, and the table."""
    made_by = makers(row for result in fresh.values() for row in result.rows.values())
    return {"made_by": made_by, "table": compared(before, fresh)}


def main() -> None:
    """Compute the runs that are missing; write cells and table."""
    parser = arguments("FC-MoE's benchmark with fresh seeds")
    given = parser.parse_args()
    before = stored(given.workload, given.experts, [], given.tuning_seeds)
    if looked_at := sorted({*before.all_seeds()} & {*given.seeds}):
        parser.error(f"--seeds: {' '.join(map(str, looked_at))} are not fresh, tests of them are stored")
    tested_now("fresh", parser, before, report)


if __name__ == "__main__":
    main()
