"""Test runs of ``benchmarks.fc_moe`` computed again on this machine, with the settings that its tuning chose.

    python -m benchmarks.fc_moe_again --workload clinc --strategies fedavg fc_moe_plus_as_shipped --data ../shared/data

Another type of processor or another version of a library rounds differently, and training carries that on. The table
shows what a run comes to then, and whether what one method gains over another is there again. Cells are appended to
``results/again_WORKLOAD_EXPERTS.jsonl``, the table is written beside them; a restart computes what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.cells import Outcome, Row
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import stored
from benchmarks.fc_moe_numbers import results
from benchmarks.fc_moe_tested import arguments, run_tests
from benchmarks.fc_moe_told import BASELINE, difference, digits_of, judged_by_accuracy, measure_of, summed_up
from benchmarks.provenance import makers

Both = tuple[dict[int, Row], dict[int, Row]]
"""A contender's rows as they were stored, and again, of the same seeds."""


def of_both(before: Mapping[str, Outcome], again: Mapping[str, Outcome]) -> dict[str, Both]:
    """Contender -> its rows of the seeds that it was run with twice; nobody who was not."""
    found = {}
    for name in again:
        one, other = before[name].rows, again[name].rows
        if seeds := sorted(one.keys() & other.keys()):
            found[name] = {seed: one[seed] for seed in seeds}, {seed: other[seed] for seed in seeds}
    return found


def compared(twice: Mapping[str, Both]) -> dict[str, Any]:
    """A table with a line for each; all differences are paired by seed."""
    by_accuracy = judged_by_accuracy({name: Outcome((), {**one, **other}) for name, (one, other) in twice.items()})
    digits = digits_of(by_accuracy)
    values = {name: [results(rows, by_accuracy) for rows in both] for name, both in twice.items()}
    lines = []
    for name, both in twice.items():
        gains = ["", ""]
        if name != BASELINE and BASELINE in values:
            gains = [difference(*pair, digits) for pair in zip(values[name], values[BASELINE], strict=True)]
        means = [summed_up(of, digits, len(rows) - len(of)) for of, rows in zip(values[name], both, strict=True)]
        alike = sum(_alike(one, other) for one, other in zip(*(rows.values() for rows in both), strict=True))
        change = difference(values[name][1], values[name][0], digits)
        lines.append([CONTENDERS[name].title, len(both[0]), *means, change, alike, *gains])
    columns = ["method", "seeds", f"{measure_of(by_accuracy)}, stored", "again", "again minus stored"]
    rest = ["runs with equal curves", "minus FedAvg, stored", "minus FedAvg, again"]
    return {"columns": [*columns, *rest], "rows": lines}


def _alike(before: Row, again: Row) -> bool:
    """Whether they are the same computation, as far as curves of four digits show it."""
    return all(before.get(what) == again.get(what) for what in ("accuracy", "loss", "failed"))


def report(before: Mapping[str, Outcome], again: Mapping[str, Outcome]) -> dict[str, Any]:
    """The results file: by what the runs were made, and the table of those who were run again."""
    twice = of_both(before, again)
    stored_by, made_by = (makers(row for both in twice.values() for row in both[i].values()) for i in (0, 1))
    return {"stored_by": stored_by, "made_by": made_by, "table": compared(twice)}


def main() -> None:
    """Compute the runs that are missing; write cells and table."""
    parser = arguments("runs of FC-MoE's benchmark again")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    before = stored(given.workload, given.experts, given.seeds, given.tuning_seeds)
    run_tests("again", parser, given, before, report)


if __name__ == "__main__":
    main()
