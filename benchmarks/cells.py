"""Runs that are computed once: each is a cell with its row, kept line by line, so that a restart does what is missing.

A cell knows settings, data and base model, not the code: whoever changes what a rule does deletes its rows.

For every contender the learning rate and its own knobs are tuned on the validation data of the tuning seeds; the test
data of other seeds are looked at with the tuned values only.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from benchmarks.provenance import MADE_BY
from benchmarks.render import write_results
from benchmarks.tuning import LEARNING_RATE, Contender, Knob, Settings, Tuning, tuned

Row = Mapping[str, Any]
"""What is known of a finished cell, as JSON values."""


class Cell(Protocol, Hashable):
    """One run: equal cells are the same computation."""

    @property
    def seed(self) -> int:
        """Of the run."""


C = TypeVar("C", bound=Cell)


@dataclass(frozen=True)
class Outcome:
    """A contender on the test data."""

    settings: Settings
    rows: Mapping[int, Row]
    """Seed -> its row, as far as there are any."""


@dataclass(frozen=True)
class Study(Generic[C]):
    """Contenders, tuned and tested on the same data."""

    contenders: Mapping[str, Contender]
    cell: Callable[[Settings, int, str], C]
    """The cell of settings, seed and split (``validation`` or ``test``)."""
    cell_of: Callable[[Row], C]
    """The cell of a stored row."""
    score: Callable[[Row], float]
    """Of a row on validation data, higher is better."""
    seeds: Sequence[int]
    """That are to be tested; those with finished cells are told of too."""
    tuning_seeds: Sequence[int]
    """None: nothing is tuned, every knob stays where it starts."""
    learning_rate: Knob = LEARNING_RATE
    """How it is tuned."""
    more_seeds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Contender -> seeds that it is to be tested with besides."""
    rows: dict[C, Row] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Take a finished cell; one of another version of the workload is not this study's."""
        cell = self.cell_of(row)
        if cell == self.cell(tuple(row["settings"]), row["seed"], row["split"]):
            self.rows[cell] = row

    def needed(self, name: str) -> list[C]:
        """Cells that can be run next for a contender: of its tuning and, when that is done, of its test."""
        tuning = self.tuning(name)
        split = "validation" if tuning.missing else "test"
        settings = tuning.missing or [tuning.settings]
        seeds = self.tuning_seeds if tuning.missing else [*self.seeds, *self.more_seeds.get(name, ())]
        cells = [self.cell(chosen, seed, split) for chosen in settings for seed in seeds]
        return [cell for cell in cells if cell not in self.rows]

    def tuning(self, name: str) -> Tuning:
        """How far a contender's tuning is."""
        return tuned(name, self.validation_score, self.contenders, self.learning_rate)

    def validation_score(self, settings: Settings) -> float | None:
        """Mean score over the tuning seeds; None if one is missing, 0 if nothing is tuned."""
        if not self.tuning_seeds:
            return 0.0
        rows = [self.rows.get(self.cell(settings, seed, "validation")) for seed in self.tuning_seeds]
        scores = [None if row is None else self.score(row) for row in rows]
        known = [score for score in scores if score is not None]
        return float(np.mean(known)) if len(known) == len(scores) else None

    def all_seeds(self) -> list[int]:
        """Those to be tested and those that have been, of any contender."""
        more = (seed for seeds in self.more_seeds.values() for seed in seeds)
        tested = (row["seed"] for row in self.rows.values() if row["split"] == "test")
        return sorted({*self.seeds, *more, *tested})

    def tested(self, name: str) -> Outcome:
        """What is known of a contender on the test data; nothing while it is being tuned."""
        tuning = self.tuning(name)
        cells = [self.cell(tuning.settings, seed, "test") for seed in self.all_seeds()]
        rows = {cell.seed: self.rows[cell] for cell in cells if not tuning.missing and cell in self.rows}
        return Outcome(tuning.settings, rows)


def carry_out(
    study: Study[C],
    names: Iterable[str],
    run: Callable[[C], Row],
    report: Callable[[], Mapping[str, Any]],
    results: Path,
    given: argparse.Namespace,
) -> None:
    """Run what is missing as long as there is time; append cells to ``.jsonl``, write the report after each.

    Args:
        study: What is to be known; its rows are read from the file first.
        names: Contenders, in the order in which they are run.
        run: Computes a cell; in a process of its own with several jobs.
        report: Makes the results file's content of ``study``.
        results: The results file; its cells lie beside it.
        given: ``add_arguments``' values.
    """
    deadline = time.monotonic() + 60 * given.budget_minutes
    cells = results.with_suffix(".jsonl")
    cells.parent.mkdir(exist_ok=True)
    for row in rows_to_go_on_from(cells):
        study.add(row)
    for name in names:
        while (needed := study.needed(name)) and time.monotonic() < deadline:
            for row in finished(needed, run, given.jobs, deadline):
                study.add(row)
                with cells.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    row["split"],
                    row["seed"],
                    " ".join(row["settings"]),
                    study.score(row),
                    row.get("seconds"),
                    flush=True,
                )
                write_results(results, report())
    write_results(results, report())


def stored_rows(path: Path) -> list[Row]:
    """The cells of a ``.jsonl``, but for a last one that is half-written."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def rows_to_go_on_from(path: Path) -> list[Row]:
    """The cells of a ``.jsonl`` that is to grow: one that a kill left half-written is cut off, and computed again."""
    whole, _, cut = path.read_text().rpartition("\n") if path.exists() else ("", "", "")
    if cut:
        path.write_text(f"{whole}\n" if whole else "")
    return stored_rows(path)


def add_arguments(parser: argparse.ArgumentParser, names: Iterable[str], tuning_seeds: Sequence[int]) -> None:
    """What every study can be told."""
    parser.add_argument("--strategies", nargs="+", choices=list(names), help="default: all")
    parser.add_argument("--tuning-seeds", type=int, nargs="*", default=list(tuning_seeds))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=1, help="runs at a time, a core each")


def finished(cells: Iterable[C], run: Callable[[C], Row], jobs: int, deadline: float) -> Iterator[Row]:
    """Rows of the cells as they come, with ``made_by``; none is begun after ``deadline`` (of ``time.monotonic``)."""
    if jobs == 1:
        for cell in cells:
            if time.monotonic() > deadline:
                return
            yield _run(run, cell)
        return
    waiting = iter(cells)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        running = {pool.submit(_run, run, cell) for _, cell in zip(range(jobs), waiting, strict=False)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                following = next(waiting, None) if time.monotonic() < deadline else None
                if following is not None:
                    running.add(pool.submit(_run, run, following))


def _run(run: Callable[[C], Row], cell: C) -> Row:
    """In the process that computes: its code is what counts."""
    return {**run(cell), "made_by": MADE_BY}
