"""FLEx and what it must beat: a personal expert for each site against one model for all, and what reviewers missed.

    python -m benchmarks.flex --model smollm2_moe --partition pathological --data ../shared/data --budget-minutes 60

Traffic, several seeds, LoRA baselines, statistics of routing and the cost of the extra expert stand in its tables. Runs
are cells of ``benchmarks.cells``: tuned on validation data, shown on the test data of other seeds; finished ones are in
``results/flex_MODEL_PARTITION.jsonl``, and a restart computes what is missing. ``--tuning-seeds`` without seeds leaves
every knob where it starts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cells import Row, Study, add_arguments, carry_out
from benchmarks.contenders import PERSONAL
from benchmarks.dolly_tasks import PARTITIONS, SIZES, overrides, version_of
from benchmarks.federation import Federation, simulated
from benchmarks.flex_tables import markdown, own_scores
from benchmarks.provenance import makers
from benchmarks.render import HERE
from benchmarks.tuning import Settings
from client.evaluation.examination import examine
from client.evaluation.general_sets import general_sets
from client.site import POOLED
from conf.compose import load_config
from server.evaluation import put_together, scored_at_server
from strategies.adapters import NotFiniteError
from strategies.base import ClientUpdate


@dataclass(frozen=True)
class Cell:
    """One run: equal cells are the same computation."""

    model: str
    partition: str
    settings: Settings
    """Of the method, tuned values included."""
    seed: int
    split: str
    version: str = ""
    """Of data, base and settings."""

    @classmethod
    def of(cls, row: Row) -> Cell:
        """The cell of a stored row."""
        return cls(row["model"], row["partition"], tuple(row["settings"]), row["seed"], row["split"], row["version"])


def run_cell(cell: Cell, data: Path) -> Row:
    """Its row: the cell, and what was measured after the last round; ``failed`` says why instead if training diverged.

    Raises:
        RuntimeError: If the choice of an expert to graft was a tie: such a base can show nothing of FLEx.
    """
    config = load_config([*overrides(data, cell.model, cell.partition, cell.seed, cell.split), *cell.settings])
    started = time.perf_counter()
    row: dict[str, Any] = asdict(cell)
    with tempfile.TemporaryDirectory() as private:
        federation = simulated(config, Path(private))
        spread: dict[str, float] = {}
        try:
            for updates in federation.rounds():
                spread |= graft_spread(updates)
        except NotFiniteError as error:
            return row | {"failed": f"round {federation.server_round + 1}: {error}"}
        found = losses(federation) if cell.split == "validation" else evaluation(federation)
    return row | found | {
        "graft_spread": spread,
        "bytes_up": federation.bytes_up / len(federation.sites) / config.rounds,
        "bytes_down": federation.bytes_down / len(federation.sites) / config.rounds,
        "base_sha256": federation.adapted.base.identity.sha256,
        "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def graft_spread(updates: Sequence[ClientUpdate]) -> dict[str, float]:
    """Site -> by how much its best expert won the choice, mean over layers, where one was made.

    Raises:
        RuntimeError: If a choice was a tie.
    """
    tied = [update.site for update in updates if update.metrics.get("graft_ties", 0) > 0]
    if tied:
        raise RuntimeError(
            f"the choice of an expert to graft is a tie at {', '.join(tied)}: the base's experts are copies of each "
            "other; set model.upcycle.differentiate=kmeans_router or steps"
        )
    return {update.site: update.metrics["graft_spread"] for update in updates if "graft_spread" in update.metrics}


def losses(federation: Federation) -> dict[str, Any]:
    """Site -> loss of the model in use there, on its own held-out data."""
    found: dict[str, float] = {}
    for name, site in federation.sites.items():
        measured = site.evaluate(federation.received(name))
        found |= {on: round(loss.loss, 5) for on, loss in measured.items() if on != POOLED}
    return {"losses": found}


def evaluation(federation: Federation) -> dict[str, Any]:
    """The evaluation matrix of the federation as it is, as a run folder has it."""
    adapter = None if federation.config.method.name == "local_only" else federation.adapter
    measured = {
        name: examine(site, federation.received(name), federation.adapter) for name, site in federation.sites.items()
    }
    here = scored_at_server(federation.config, federation.adapted, adapter, general_sets(federation.config))
    return {"evaluation": put_together(measured, here)}


def score(row: Row) -> float:
    """Negative mean loss over the sites, of the model in use there on its own data."""
    if "failed" in row:
        return -float("inf")
    return -statistics.fmean((row["losses"] if "losses" in row else own_scores(row, "loss")).values())


def study_of(model: str, partition: str, seeds: Sequence[int], tuning_seeds: Sequence[int]) -> Study[Cell]:
    """The cells of one model and one way to divide the data."""
    version = version_of(model, partition)
    return Study(
        PERSONAL,
        cell=lambda settings, seed, split: Cell(model, partition, settings, seed, split, version),
        cell_of=Cell.of,
        score=score,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
    )


def report(study: Study[Cell], model: str, partition: str) -> dict[str, Any]:
    """The results file: settings of the study, and its tables as Markdown."""
    tested = {name: study.tested(name) for name in PERSONAL}
    return {
        "model": model,
        "partition": partition,
        "seeds": study.all_seeds(),
        "tuning_seeds": list(study.tuning_seeds),
        "settings": [*SIZES[model].settings, *PARTITIONS[partition]],
        "runs": len(study.rows),
        "made_by": makers(study.rows.values()),
        "markdown": markdown(f"{model}, {partition}", tested, study.all_seeds()),
    }


def main() -> None:
    """Run what is missing, as long as there is time; write cells and tables."""
    parser = argparse.ArgumentParser(description="FLEx and its rivals")
    parser.add_argument("--model", choices=list(SIZES), help="default: smollm2_moe if there is a GPU, else words")
    parser.add_argument("--partition", choices=list(PARTITIONS), default="pathological")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_arguments(parser, PERSONAL, tuning_seeds=[100])
    given = parser.parse_args()
    given.model = given.model or ("smollm2_moe" if torch.cuda.is_available() else "words")
    results = HERE / "results" / f"flex_{given.model}_{given.partition}.json"
    study = study_of(given.model, given.partition, given.seeds, given.tuning_seeds)
    run, reported = partial(run_cell, data=given.data), partial(report, study, given.model, given.partition)
    carry_out(study, given.strategies or PERSONAL, run, reported, results, given)
    print(reported()["markdown"])


if __name__ == "__main__":
    main()
