"""FC-MoE and what it must beat, each tuned on validation data and shown on fresh seeds.

    python -m benchmarks.fc_moe --workload clinc --experts lora --data ../shared/data --budget-minutes 60 --jobs 2

Every run is a cell; finished cells are appended to ``results/fc_moe_WORKLOAD_EXPERTS.jsonl``, and a restart computes
what is missing. The tables are made from the cells and written beside them (``.json``) after every cell. For every
method the learning rate and its own knobs are tuned on the validation data of the tuning seeds; the table shows the
test data of other seeds. A run is one of ``bouquet run`` with the cell's settings, played without Flower.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import CONTENDERS, Settings, tuned
from benchmarks.fc_moe_tables import LAST, Outcome, Row, last_rounds, markdown
from benchmarks.federation import simulated
from benchmarks.measures import Judge, Score, expert_norm
from benchmarks.render import HERE, write_results
from benchmarks.workloads import VERSION, WORKLOADS
from client.assemble import held_out_sets
from conf.compose import load_config


@dataclass(frozen=True)
class Cell:
    """One run: equal cells are the same computation."""

    workload: str
    experts: str
    """``lora`` or ``full``."""
    settings: Settings
    """Of the method, tuned values included."""
    seed: int
    split: str
    """What it is judged on: validation or test."""
    version: str = VERSION
    """Of workloads and base model."""

    @classmethod
    def of(cls, row: Row) -> Cell:
        """The cell of a stored row."""
        return cls(row["workload"], row["experts"], tuple(row["settings"]), row["seed"], row["split"], row["version"])


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Its row: the cell, and per round what was measured; ``failed`` says why instead if training diverged."""
    workload = WORKLOADS[cell.workload]
    words = [*workload.overrides(data, cell.seed, cell.split), f"model.experts={cell.experts}", *cell.settings]
    config = load_config(words)
    started = time.perf_counter()
    row: dict[str, Any] = asdict(cell)
    scores: list[Score] = []
    with tempfile.TemporaryDirectory() as private:
        federation = simulated(config, Path(private))
        judge = Judge(federation.adapted, config, held_out_sets(config), workload.labels)
        before = expert_norm(federation.whole_adapter())
        try:
            scores.extend(judge.score(federation) for _ in federation.rounds())
        except ValueError as error:
            return row | {"failed": f"round {federation.server_round + 1}: {error}"}
        after = expert_norm(federation.whole_adapter())
    return row | {
        "accuracy": None if scores[0].accuracy is None else [round(score.accuracy or 0.0, 4) for score in scores],
        "loss": [round(score.loss, 4) for score in scores],
        "sites": {
            name: round(float(np.mean([score.sites[name] for score in scores[-LAST:]])), 4) for name in scores[0].sites
        },
        "bytes": federation.bytes_up + federation.bytes_down,
        "expert_norm": [round(before, 4), round(after, 4)],
        "base_sha256": federation.adapted.base.identity.sha256,
        "seconds": round(time.perf_counter() - started, 1),
    }


class Study:
    """The cells of one workload and one way to train experts."""

    def __init__(self, workload: str, experts: str, seeds: Sequence[int], tuning_seeds: Sequence[int]) -> None:
        self.workload = workload
        self.experts = experts
        self.seeds = seeds
        self.tuning_seeds = tuning_seeds
        self.rows: dict[Cell, Row] = {}

    def add(self, row: Row) -> None:
        """Take a finished cell."""
        self.rows[Cell.of(row)] = row

    def needed(self, name: str) -> list[Cell]:
        """Cells that can be run next for a contender: of its tuning and, when that is done, of its test."""
        tuning = tuned(name, self.experts, self.validation_score)
        split = "validation" if tuning.missing else "test"
        settings = tuning.missing or [tuning.settings]
        seeds = self.tuning_seeds if tuning.missing else self.seeds
        cells = [Cell(self.workload, self.experts, chosen, seed, split) for chosen in settings for seed in seeds]
        return [cell for cell in cells if cell not in self.rows]

    def validation_score(self, settings: Settings) -> float | None:
        """Mean over the tuning seeds of the last rounds' accuracy (or negative loss); None if one is missing."""
        cells = [Cell(self.workload, self.experts, settings, seed, "validation") for seed in self.tuning_seeds]
        rows = [self.rows.get(cell) for cell in cells]
        scores = [None if row is None else _score(row) for row in rows]
        known = [score for score in scores if score is not None]
        return float(np.mean(known)) if len(known) == len(scores) else None

    def tested(self, name: str) -> Outcome:
        """What is known of a contender on the test data; nothing while it is being tuned."""
        tuning = tuned(name, self.experts, self.validation_score)
        cells = [Cell(self.workload, self.experts, tuning.settings, seed, "test") for seed in self.seeds]
        rows = {cell.seed: self.rows[cell] for cell in cells if not tuning.missing and cell in self.rows}
        return Outcome(tuning.settings, rows)

    def report(self) -> dict[str, Any]:
        """The results file: settings of the study, and its tables as Markdown."""
        workload = WORKLOADS[self.workload]
        tested = {name: self.tested(name) for name in CONTENDERS}
        experts = "experts by LoRA" if self.experts == "lora" else "experts in full"
        return {
            "workload": self.workload,
            "experts": self.experts,
            "seeds": list(self.seeds),
            "tuning_seeds": list(self.tuning_seeds),
            "settings": list(workload.settings),
            "runs": len(self.rows),
            "markdown": markdown(f"{workload.title}, {experts}", tested, self.seeds),
        }


def _score(row: Row) -> float:
    if "failed" in row:
        return -float("inf")
    return last_rounds(row["accuracy"]) if row["accuracy"] else -last_rounds(row["loss"])


def finished(cells: Iterable[Cell], data: Path, jobs: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Rows of the cells as they come; none is begun after ``deadline`` (of ``time.monotonic``)."""
    if jobs == 1:
        for cell in cells:
            if time.monotonic() > deadline:
                return
            yield run_cell(cell, data)
        return
    waiting = iter(cells)
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        running = {pool.submit(run_cell, cell, data) for cell, _ in zip(waiting, range(jobs), strict=False)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                following = next(waiting, None) if time.monotonic() < deadline else None
                if following is not None:
                    running.add(pool.submit(run_cell, following, data))


def main() -> None:
    """Run what is missing, as long as there is time; write cells and tables."""
    parser = argparse.ArgumentParser(description="FC-MoE and its rivals")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="clinc")
    parser.add_argument("--experts", choices=["lora", "full"], default="lora")
    parser.add_argument("--strategies", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--tuning-seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=1, help="runs at a time, a core each")
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.budget_minutes
    results = HERE / "results" / f"fc_moe_{given.workload}_{given.experts}.json"
    study = Study(given.workload, given.experts, given.seeds, given.tuning_seeds)
    cells = results.with_suffix(".jsonl")
    cells.parent.mkdir(exist_ok=True)
    for line in cells.read_text().splitlines() if cells.exists() else ():
        study.add(json.loads(line))
    for name in given.strategies:
        while (needed := study.needed(name)) and time.monotonic() < deadline:
            for row in finished(needed, given.data, given.jobs, deadline):
                study.add(row)
                with cells.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row["split"], row["seed"], " ".join(row["settings"]), _score(row), row.get("seconds"), flush=True)
        write_results(results, study.report())
    print(study.report()["markdown"])


if __name__ == "__main__":
    main()
