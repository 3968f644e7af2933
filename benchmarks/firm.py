"""FIRM and its rivals on a language model: rewards, hypervolume over preferences, drift, bytes.

    python -m benchmarks.firm --workload tiny --budget-minutes 60
    bouquet reward train heads/helpful model=smollm2_moe data.path=... ; the same for heads/harmless; then
    python -m benchmarks.firm --workload smollm2 --rewards helpful:heads/helpful harmless:heads/harmless --device cuda

Every run is a cell; finished cells are appended to ``results/firm_WORKLOAD.jsonl``, and a restart computes what is
missing. The tables are made from the cells and written beside them (``.json``) after every cell. A run is one of
``bouquet run`` with the cell's settings, played without Flower; FSMGDA trains every objective by itself at each site.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.federation import Federation, simulated
from benchmarks.firm_tables import markdown
from benchmarks.render import HERE, write_results
from conf.compose import load_config
from strategies.adapters import Arrays, difference, dot, spread
from strategies.base import ClientUpdate
from strategies.fedavg import mean_by_examples
from strategies.simplex import minimiser

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Preference for the first of two objectives."""
LAST = 3
"""Rounds at the end that are evaluated; their mean is what counts."""


@dataclass(frozen=True)
class Contender:
    """A method under comparison."""

    title: str
    settings: tuple[str, ...]
    shares: tuple[float, ...] = SHARES
    """Preferences it is run with; 0.5 alone for methods that take none."""


CONTENDERS: dict[str, Contender] = {
    "firm": Contender("FIRM, anchor, beta 0.1", ("strategy=firm", "method.beta=0.1")),
    "firm_weighted": Contender(
        "FIRM, weighted, beta 0.1", ("strategy=firm", "method.beta=0.1", "method.regulariser=weighted")
    ),
    "scalarised": Contender("linear scalarisation", ("strategy=firm", "method.beta=inf")),
    "mgda": Contender("local MGDA (beta 0)", ("strategy=firm", "method.beta=0"), (0.5,)),
    "fedcmoo": Contender("FedCMOO", ("strategy=fedcmoo",), (0.5,)),
    "fsmgda": Contender("FSMGDA", ("strategy=firm", "method.beta=inf"), (0.5,)),
    **{
        f"beta_{beta:g}": Contender(f"FIRM, anchor, beta {beta:g}", ("strategy=firm", f"method.beta={beta:g}"))
        for beta in (0.01, 1, 10)
    },
    **{
        f"{key}_{value}_{name}": Contender(
            f"{value} {words}, {title}", ("strategy=firm", f"method.beta={beta}", f"{setting}={value}"), (0.5,)
        )
        for key, setting, words, values in (
            ("steps", "train.max_steps", "local steps", (1, 8)), ("sites", "partition.num_sites", "sites", (2, 8)),
        )
        for value in values
        for name, title, beta in (("firm", "FIRM", 0.1), ("mgda", "local MGDA", 0))
    },
}  # fmt: skip

WORKLOADS: dict[str, tuple[str, ...]] = {
    "tiny": (
        "partition=dirichlet", "partition.alpha=0.1", "partition.num_sites=4", "data.num_examples=400", "rounds=8",
        "train.max_steps=4", "train.batch_size=4", "train.learning_rate=1e-2", "lora.rank=4", "method.group_size=4",
        "method.max_new_tokens=16", "method.temperature=1.5", "method.eval_prompts=32", "eval.max_examples=32",
    ),
    "smollm2": (
        "model=smollm2_moe", "data.path=../shared/data/preferences.parquet", "data.split_column=split",
        "data.prompt_column=prompt", "data.response_column=chosen", "data.context_column=null",
        "partition=dirichlet", "partition.column=objective", "partition.alpha=0.3", "partition.num_sites=4",
        "rounds=30", "train.max_steps=8", "train.batch_size=8", "train.learning_rate=2e-4", "method.group_size=4",
        "method.max_new_tokens=64", "method.eval_prompts=64", "eval.max_examples=64",
    ),
}  # fmt: skip
REWARDS = {"tiny": ("length", "format"), "smollm2": ("helpful:heads/helpful", "harmless:heads/harmless")}


@dataclass(frozen=True)
class Cell:
    """One run: equal cells are the same computation."""

    contender: str
    share: float
    """Preference for the first objective; the second has the rest."""
    seed: int
    settings: tuple[str, ...]
    """All that is set."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Cell:
        """The cell of a stored row."""
        return cls(row["contender"], row["share"], row["seed"], tuple(row["settings"]))


def cells(names: Sequence[str], workload: str, rewards: Sequence[str], seeds: Sequence[int], device: str) -> list[Cell]:
    """Every contender's runs, seed by seed, so that what there is of a table is balanced."""
    common = (*WORKLOADS[workload], f"method.rewards=[{','.join(rewards)}]", f"device={device}")
    return [
        Cell(name, share, seed, (*CONTENDERS[name].settings[:1], *common, *CONTENDERS[name].settings[1:]))
        for seed in seeds
        for name in names
        for share in CONTENDERS[name].shares
    ]


def run_cell(cell: Cell) -> dict[str, Any]:
    """Its row: the cell, and per round what was measured; ``failed`` says why instead if training diverged."""
    words = [*cell.settings, f"seed={cell.seed}"]
    started = time.perf_counter()
    row: dict[str, Any] = asdict(cell) | {"drift": [], "disagreement": [], "kl": [], "ends": []}
    with tempfile.TemporaryDirectory() as folder:
        if cell.contender == "fsmgda":
            federation: Federation | Apart = Apart(words, Path(folder))
        else:
            federation = simulated(load_config([*words, *preference(cell)]), Path(folder))
        try:
            for groups in played(federation):
                row["drift"].append(np.mean([spread([update.adapter for update in group]) for group in groups]))
                row["disagreement"].append(np.mean([disagreement(group) for group in groups]))
                row["kl"].append(np.mean([update.metrics["kl"] for group in groups for update in group]))
                if federation.config.rounds - federation.server_round < LAST:
                    row["ends"].append(evaluated(federation))
        except ValueError as error:
            return row | {"failed": f"round {federation.server_round + 1}: {error}"}
        sent = federation.bytes_up / len(federation.sites) / federation.server_round
        adapter = sum(array.nbytes for array in federation.adapter.values())
    return row | {"uploads": sent / adapter, "seconds": round(time.perf_counter() - started, 1)}


def preference(cell: Cell) -> list[str]:
    """The cell's preference as a setting; FedCMOO takes none."""
    return [] if cell.contender == "fedcmoo" else [f"method.preference=[{cell.share},{round(1 - cell.share, 9)}]"]


def played(federation: Federation | Apart) -> Iterator[list[list[ClientUpdate]]]:
    """Play all rounds; the updates of each, apart by what they were trained for."""
    if isinstance(federation, Apart):
        yield from federation.rounds()
    else:
        yield from ([updates] for updates in federation.rounds())


def disagreement(updates: Sequence[ClientUpdate]) -> float:
    """Mean squared distance of the sites' weights to their mean."""
    names = sorted(key for key in updates[0].metrics if key.startswith("lambda/"))
    return spread([{name: np.array(update.metrics[name]) for name in names} for update in updates])


def evaluated(federation: Federation | Apart) -> dict[str, float]:
    """Held-out reward of every objective and KL of the global model, means over the sites."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, site in federation.sites.items():
        for key, value in site.evaluate(federation.adapter)[name].metrics.items():
            found[key.removeprefix("held_out_")].append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}


class Apart:
    """FSMGDA (Yang et al. 2023): each site trains every objective by itself and sends all adapters.

    The server takes the changes of the mean adapters as gradients, and their min-norm combination as the step.
    """

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        """A federation for each objective, with that objective's preference alone."""
        self._alone = [
            simulated(load_config([*words, f"method.preference={one}"]), folder / str(index))
            for index, one in enumerate(([1.0, 0.0], [0.0, 1.0]))
        ]
        self.config, self.sites = self._alone[0].config, self._alone[0].sites
        self.adapter: Arrays = self._alone[0].adapter
        self.server_round = self.bytes_up = 0

    def rounds(self) -> Iterator[list[list[ClientUpdate]]]:
        """Play all rounds; the updates of each objective."""
        while self.server_round < self.config.rounds:
            yield self._play()

    def _play(self) -> list[list[ClientUpdate]]:
        everyone, changes = [], []
        for federation in self._alone:
            federation.adapter = self.adapter
            updates = federation.train(self.server_round + 1)
            changes.append(difference(mean_by_examples(updates), self.adapter))
            everyone.append(updates)
        gram = np.array([[dot(left, right) for right in changes] for left in changes])
        weights = minimiser(2 * gram, np.zeros(len(changes)))
        self.adapter = {
            name: array + sum(weight * change[name] for weight, change in zip(weights, changes, strict=True))
            for name, array in self.adapter.items()
        }
        self.bytes_up += sum(
            array.nbytes for group in everyone for update in group for array in update.adapter.values()
        )
        self.server_round += 1
        return everyone


def main() -> None:
    """Run what is missing, as long as there is time; write cells and tables."""
    parser = argparse.ArgumentParser(description="FIRM and its rivals on a language model")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="tiny")
    parser.add_argument("--methods", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rewards", nargs=2, help="two rewards as under method.rewards")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    given = parser.parse_args()
    deadline = time.monotonic() + 60 * given.budget_minutes
    results = HERE / "results" / f"firm_{given.workload}.json"
    stored = results.with_suffix(".jsonl")
    stored.parent.mkdir(exist_ok=True)
    rewards = given.rewards or REWARDS[given.workload]
    wanted = cells(given.methods, given.workload, rewards, given.seeds, given.device)
    rows = [json.loads(line) for line in stored.read_text().splitlines()] if stored.exists() else []
    done = {Cell.of(row) for row in rows}
    for cell in wanted:
        if cell in done or time.monotonic() > deadline:
            continue
        rows.append(run_cell(cell))
        with stored.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(cell.contender, cell.share, cell.seed, rows[-1].get("ends", [])[-1:], rows[-1].get("seconds"), flush=True)
        write_results(results, report(given.workload, rewards, rows))
    print(report(given.workload, rewards, rows)["markdown"])


def report(workload: str, rewards: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results file: settings, and the tables as Markdown."""
    titles = {name: contender.title for name, contender in CONTENDERS.items()}
    return {
        "workload": workload,
        "rewards": list(rewards),
        "settings": list(WORKLOADS[workload]),
        "seeds": sorted({row["seed"] for row in rows}),
        "runs": len(rows),
        "markdown": markdown(rows, titles),
    }


if __name__ == "__main__":
    main()
