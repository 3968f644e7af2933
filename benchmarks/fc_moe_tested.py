"""What commands have in common that run tests of ``benchmarks.fc_moe`` with the settings that its tuning chose."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from benchmarks.cells import Outcome, Study, add_arguments, carry_out
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import Cell, compared, run_cell, study_of, tested_of
from benchmarks.render import HERE
from benchmarks.workloads import WORKLOADS

Report = Callable[[Mapping[str, Outcome], Mapping[str, Outcome]], dict[str, Any]]
"""The results file's content, from what is known of the stored tests and of those that are run now."""


def arguments(description: str) -> argparse.ArgumentParser:
    """Of such a command: all but which seeds it takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workload", choices=list(WORKLOADS), default="clinc")
    parser.add_argument("--experts", choices=["lora", "full"], default="lora")
    parser.add_argument("--device", default="cpu")
    add_arguments(parser, CONTENDERS, tuning_seeds=[100])
    return parser


def tuned_names(given: argparse.Namespace, before: Study[Cell]) -> list[str]:
    """Who is to be run: whom the command names, else everyone who has been tested.

    Raises:
        ValueError: If somebody is not compared there, or not tuned in the stored runs.
    """
    of = given.workload, given.experts
    names = given.strategies or [name for name, result in tested_of(before, *of).items() if result.rows]
    if strangers := [name for name in names if name not in compared(*of)]:
        raise ValueError(f"--strategies {' '.join(strangers)}: not compared on {given.workload} {given.experts}")
    if untuned := [name for name in names if before.tuning(name).missing]:
        raise ValueError(f"--strategies {' '.join(untuned)}: not tuned in the stored runs")
    return names


def tuning_of(before: Study[Cell], now: Study[Cell]) -> Study[Cell]:
    """The new study with the stored runs' tuning, and none of their tests."""
    for row in before.rows.values():
        if row["split"] == "validation":
            now.add(row)
    return now


def run_tests(
    kind: str, parser: argparse.ArgumentParser, given: argparse.Namespace, before: Study[Cell], reported: Report
) -> None:
    """Compute the tests that are missing as long as there is time; write cells and results file.

    Args:
        kind: What the results file's name begins with.
        parser: Of ``arguments``; says why a command is refused.
        given: What the command was told.
        before: The stored runs: their tuning stands.
        reported: Makes the results file's content.
    """
    try:
        names = tuned_names(given, before)
    except ValueError as error:
        parser.error(str(error))
    of = given.workload, given.experts
    now = tuning_of(before, study_of(*of, given.seeds, given.tuning_seeds))
    path = HERE / "results" / f"{kind}_{given.workload}_{given.experts}.json"
    run = partial(run_cell, data=given.data, device=given.device)
    carry_out(now, names, run, lambda: reported(tested_of(before, *of), tested_of(now, *of)), path, given)
