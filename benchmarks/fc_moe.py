"""FC-MoE and what it must beat, each tuned on validation data and shown on other seeds.

    python -m benchmarks.fc_moe --workload clinc --experts lora --data ../shared/data --budget-minutes 60 --jobs 2

``--workload`` and ``--experts`` take several values: one table after the other, in one budget.

Every run is a cell; finished cells are appended to ``results/fc_moe_WORKLOAD_EXPERTS.jsonl``, and a restart computes
what is missing. The tables are made from the cells and written beside them (``.json``) after every cell. For every
method the learning rate and its own knobs are tuned on the validation data of the tuning seeds; the table shows the
test data of other seeds. A run is one of ``bouquet run`` with the cell's settings, played without Flower.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fc_moe_averaging, fc_moe_printed
from benchmarks.cells import Outcome, Row, Study, add_arguments, carry_out, stored_rows
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe_numbers import LAST, last_rounds
from benchmarks.fc_moe_overtaken import overtaken
from benchmarks.fc_moe_seeds import table_seeds
from benchmarks.fc_moe_tables import markdown, summary
from benchmarks.federation import simulated
from benchmarks.measures import Judge, Score, expert_norm
from benchmarks.provenance import makers
from benchmarks.render import HERE
from benchmarks.tuning import LEARNING_RATE, LEARNING_RATE_BY_LOSS, Settings
from benchmarks.workloads import WORKLOADS
from client.assemble import held_out_sets
from conf.compose import load_config
from strategies.adapters import NotFiniteError


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
    version: str
    """Of the workload and its base model."""

    @classmethod
    def of(cls, row: Row) -> Cell:
        """The cell of a stored row."""
        return cls(row["workload"], row["experts"], tuple(row["settings"]), row["seed"], row["split"], row["version"])


def run_cell(cell: Cell, data: Path, device: str = "cpu") -> dict[str, Any]:
    """Its row: the cell, and per round what was measured; ``failed`` says why instead if training diverged.

    On the validation split these are the last rounds alone.
    """
    workload = WORKLOADS[cell.workload]
    words = [*workload.overrides(data, cell.seed, cell.split, device), f"model.experts={cell.experts}", *cell.settings]
    config = load_config(words)
    started = time.perf_counter()
    row: dict[str, Any] = asdict(cell)
    scores: list[Score] = []
    with tempfile.TemporaryDirectory() as private:
        federation = simulated(config, Path(private))
        averaged: list[fc_moe_averaging.Found] = []
        if cell.split == "test":
            federation.watch = lambda *of_round: averaged.append(fc_moe_averaging.of_round(*of_round))
        judge = Judge(federation.adapted, config, held_out_sets(config), workload.labels)
        before = expert_norm(federation.whole_adapter(), federation.adapted, config.lora)
        while federation.server_round < config.rounds:
            try:
                federation.play()
            except NotFiniteError as error:
                return row | {"failed": f"round {federation.server_round + 1}: {error}"}
            # What tuning chooses by is the mean of the last rounds.
            if cell.split == "test" or federation.server_round > config.rounds - LAST:
                scores.append(judge.score(federation))
        after = expert_norm(federation.whole_adapter(), federation.adapted, config.lora)
        answers = judge.rouge_l(federation) if cell.split == "test" and not workload.labels else None
    return row | {
        "accuracy": None if scores[0].accuracy is None else [round(score.accuracy or 0.0, 4) for score in scores],
        "loss": [round(score.loss, 4) for score in scores],
        "rouge_l": answers and round(answers, 4),
        "sites": {
            name: round(float(np.mean([score.sites[name] for score in scores[-LAST:]])), 4) for name in scores[0].sites
        },
        "bytes": federation.bytes_up + federation.bytes_down,
        "expert_growth": round(after / before, 4),
        "averaging": fc_moe_averaging.mean_of(averaged) if averaged else None,
        "base_sha256": federation.adapted.base.identity.sha256,
        "seconds": round(time.perf_counter() - started, 1),
    }


def study_of(workload: str, experts: str, seeds: Sequence[int] | None, tuning_seeds: Sequence[int]) -> Study[Cell]:
    """The cells of one workload and one way to train experts; without ``seeds`` with those of ``fc_moe_seeds``."""
    few, more = (seeds, {}) if seeds is not None else table_seeds(workload, experts)
    version = WORKLOADS[workload].version
    return Study(
        CONTENDERS,
        cell=lambda settings, seed, split: Cell(workload, experts, settings, seed, split, version),
        cell_of=Cell.of,
        score=_score,
        seeds=few,
        tuning_seeds=tuning_seeds,
        more_seeds=more,
        learning_rate=LEARNING_RATE if WORKLOADS[workload].labels else LEARNING_RATE_BY_LOSS,
    )


def results_of(workload: str, experts: str) -> Path:
    """The results file; its cells lie beside it, as ``.jsonl``."""
    return HERE / "results" / f"fc_moe_{workload}_{experts}.json"


def stored(workload: str, experts: str, seeds: Sequence[int] | None, tuning_seeds: Sequence[int]) -> Study[Cell]:
    """The study with its finished cells."""
    study = study_of(workload, experts, seeds, tuning_seeds)
    for row in stored_rows(results_of(workload, experts).with_suffix(".jsonl")):
        study.add(row)
    return study


def stored_tests(workload: str, experts: str) -> dict[str, Outcome]:
    """What is known on test data of a table that has been made, from its cells; empty if it has not."""
    path = results_of(workload, experts)
    if not path.exists():
        return {}
    written = json.loads(path.read_text())
    return tested_of(stored(workload, experts, written["seeds"], written["tuning_seeds"]), workload, experts)


def tested_of(study: Study[Cell], workload: str, experts: str) -> dict[str, Outcome]:
    """What is known on test data of those who are compared."""
    return {name: study.tested(name) for name in compared(workload, experts)}


def compared(workload: str, experts: str) -> list[str]:
    """Names of those who are compared on a workload with experts trained so."""
    names = WORKLOADS[workload].contenders
    return [name for name in names if experts == "lora" or not CONTENDERS[name].of_factors]


def report(study: Study[Cell], name: str, experts: str) -> dict[str, Any]:
    """The results file: settings of a workload's study, how its experts were trained, and its tables as Markdown."""
    workload = WORKLOADS[name]
    tested = tested_of(study, name, experts)
    seeds, before = study.all_seeds(), overtaken(tested, study.rows.values())
    title = f"{workload.title}, {'experts by LoRA' if experts == 'lora' else 'experts in full'}"
    return {
        "workload": name,
        "experts": experts,
        "seeds": seeds,
        "tuning_seeds": list(study.tuning_seeds),
        "settings": list(workload.settings),
        "runs": len(study.rows),
        "made_by": makers(study.rows.values()),
        "markdown": markdown(title, tested, seeds, fc_moe_printed.of_workload(name), before),
        "summary": summary(title, tested),
    }


def _score(row: Row) -> float:
    if "failed" in row:
        return -float("inf")
    return last_rounds(row["accuracy"]) if row["accuracy"] else -last_rounds(row["loss"])


def main() -> None:
    """Run what is missing, one table after the other, as long as there is time; write cells and tables."""
    parser = argparse.ArgumentParser(description="FC-MoE and its rivals")
    parser.add_argument("--workload", choices=list(WORKLOADS), nargs="+", default=["clinc"])
    parser.add_argument("--experts", choices=["lora", "full"], nargs="+", default=["lora"])
    parser.add_argument("--seeds", type=int, nargs="+", help="of the tests; default: those of fc_moe_seeds.py")
    parser.add_argument("--device", default="cpu")
    add_arguments(parser, CONTENDERS, tuning_seeds=[100])
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.budget_minutes
    run = partial(run_cell, data=given.data, device=given.device)
    for workload, experts in itertools.product(given.workload, given.experts):
        everyone = compared(workload, experts)
        names = [name for name in given.strategies or everyone if name in everyone]
        study = study_of(workload, experts, given.seeds, given.tuning_seeds)
        reported = partial(report, study, workload, experts)
        given.budget_minutes = (deadline - time.monotonic()) / 60
        carry_out(study, names, run, reported, results_of(workload, experts), given)
        print(reported()["markdown"])


if __name__ == "__main__":
    main()
