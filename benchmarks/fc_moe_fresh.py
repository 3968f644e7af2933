"""Tests of ``benchmarks.fc_moe`` with seeds that nobody had looked at while a rule and its values were chosen.

    python -m benchmarks.fc_moe_fresh --workload clinc --strategies fedavg fedavgm fc_moe_plus_as_shipped \
      --seeds 10 11 12 13 14 --data ../shared/data

Everyone has the settings that the stored runs' tuning chose; seeds of stored tests and of tuning are refused (LOG.md
tells that 101 to 103 were looked at, too). Cells are appended to ``results/fresh_WORKLOAD_EXPERTS.jsonl``, the table is
written beside them; a restart computes what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cells import Outcome
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import stored
from benchmarks.fc_moe_numbers import on_sites, results
from benchmarks.fc_moe_tested import arguments, run_tests
from benchmarks.fc_moe_told import (
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
    by_accuracy = judged_by_accuracy(fresh)
    digits, lines = digits_of(by_accuracy), []
    for name, result in fresh.items():
        if result.rows:
            values = results(result.rows, by_accuracy)
            told = summed_up(values, digits, len(result.rows) - len(values))
            beside = _beside_baseline(name, before, fresh, by_accuracy)
            lines.append([CONTENDERS[name].title, len(result.rows), told, *beside])
    columns = ["method", "fresh seeds", measure_of(by_accuracy), "minus FedAvg", "minus FedAvg, the seeds looked at"]
    return {"columns": [*columns, "on sites' own data: mean / worst, minus FedAvg", ROUNDS], "rows": lines}


def _beside_baseline(
    name: str, before: Mapping[str, Outcome], fresh: Mapping[str, Outcome], by_accuracy: bool
) -> list[str]:
    """Differences to FedAvg, paired by seed: of fresh seeds, of stored ones, on sites' own data; and its rounds."""
    rows, baseline = fresh[name].rows, fresh[BASELINE].rows if BASELINE in fresh else {}
    if name == BASELINE or not baseline:
        return [""] * 4
    digits = digits_of(by_accuracy)
    gains = [
        difference(results(of[name].rows, by_accuracy), results(of[BASELINE].rows, by_accuracy), digits)
        for of in (fresh, before)
    ]
    mean_and_worst = zip(on_sites(rows, by_accuracy)[:2], on_sites(baseline, by_accuracy)[:2], strict=True)
    at_sites = " / ".join(difference(own, others, digits) for own, others in mean_and_worst)
    return [*gains, at_sites, rounds_told(rows, baseline, by_accuracy)]


def report(before: Mapping[str, Outcome], fresh: Mapping[str, Outcome]) -> dict[str, Any]:
    """The results file: by what the runs were made, and the table."""
    made_by = makers(row for result in fresh.values() for row in result.rows.values())
    return {"made_by": made_by, "table": compared(before, fresh)}


def main() -> None:
    """Compute the runs that are missing; write cells and table."""
    parser = arguments("FC-MoE's benchmark with fresh seeds")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    given = parser.parse_args()
    before = stored(given.workload, given.experts, [], given.tuning_seeds)
    if looked_at := sorted({*before.all_seeds(), *given.tuning_seeds} & {*given.seeds}):
        parser.error(f"--seeds {' '.join(map(str, looked_at))}: not fresh, used in tuning or in stored tests")
    run_tests("fresh", parser, given, before, report)


if __name__ == "__main__":
    main()
