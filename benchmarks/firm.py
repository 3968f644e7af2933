"""FIRM and its rivals on a language model: rewards, hypervolume over preferences, drift, bytes.

    python -m benchmarks.firm --workload tiny --budget-minutes 60 --jobs 2
    python -m benchmarks.firm --workload heads --jobs 2
    python -m benchmarks.firm --workload smollm2 --device cuda

Reward heads that are missing are trained first, as ``bouquet reward train`` does.
Every run is a cell; finished cells are appended to ``results/firm_WORKLOAD.jsonl``, and a restart computes what is
missing. The tables are made from the cells and written beside them (``.json``) after every cell. A run is one of
``bouquet run`` with the cell's settings, played without Flower; FSMGDA trains every objective by itself at each site,
and DPO's adapter is measured by FIRM's evaluation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import finished, rows_to_go_on_from
from benchmarks.federation import Federation, simulated
from benchmarks.firm_contenders import CONTENDERS, DPO, FSMGDA, WORKLOADS, Cell, cells, contenders_of, heads_among
from benchmarks.firm_tables import Runs, markdown
from benchmarks.provenance import makers
from benchmarks.render import HERE, write_results
from client.alignment.reward_models import LinearHead
from conf.alignment import FirmConfig
from conf.compose import load_config
from server.reward import train as train_head
from strategies.adapters import Arrays, NotFiniteError, difference, dot, spread
from strategies.base import ClientUpdate
from strategies.fedavg import mean_by_examples
from strategies.simplex import minimiser

LEADER = "firm_smooth"
"""Contender that the others are subtracted from."""
RECONSTRUCTED = {"firm_rho": ("scalarised", "mgda", "firm"), "firm": ("scalarised", "mgda")}
"""Contenders without what is ours, and whom each is compared with."""
LAST = 3
"""Rounds at the end that are evaluated; their mean is what counts."""


def run_cell(cell: Cell, data: Path) -> dict[str, Any]:
    """Its row: the cell, and per round what was measured; ``failed`` says why instead if training diverged."""
    started = time.perf_counter()
    row: dict[str, Any] = asdict(cell) | {"drift": [], "disagreement": [], "kl": [], "ends": []}
    with tempfile.TemporaryDirectory() as folder:
        federation = federation_of(cell, data, Path(folder))
        row["start"] = [value for key, value in evaluated(federation).items() if key.startswith("reward/")]
        try:
            for groups in played(federation):
                row["drift"].append(np.mean([spread([update.adapter for update in group]) for group in groups]))
                if cell.contender != DPO:
                    row["disagreement"].append(np.mean([disagreement(group) for group in groups]))
                    row["kl"].append(np.mean([update.metrics["kl"] for group in groups for update in group]))
                if federation.config.rounds - federation.server_round < LAST:
                    row["ends"].append(evaluated(federation))
        except NotFiniteError as error:
            return row | {"failed": f"round {federation.server_round + 1}: {error}"}
        sent = federation.bytes_up / len(federation.sites) / federation.server_round
        adapter = sum(array.nbytes for array in federation.adapter.values())
    return row | {"uploads": sent / adapter, "seconds": round(time.perf_counter() - started, 1)}


def federation_of(cell: Cell, data: Path, folder: Path) -> AnyFederation:
    """The cell's run before its first round."""
    words = cell.overrides(data)
    if cell.contender == FSMGDA:
        return Apart(words, folder)
    return FromPairs(words, folder) if cell.contender == DPO else simulated(load_config(words), folder)


def played(federation: AnyFederation) -> Iterator[list[list[ClientUpdate]]]:
    """Play all rounds; the updates of each, apart by what they were trained for."""
    if isinstance(federation, Federation):
        yield from ([updates] for updates in federation.rounds())
    else:
        yield from federation.rounds()


def disagreement(updates: Sequence[ClientUpdate]) -> float:
    """Mean squared distance of the sites' weights to their mean."""
    names = sorted(key for key in updates[0].metrics if key.startswith("lambda/"))
    return spread([{name: np.array(update.metrics[name]) for name in names} for update in updates])


def evaluated(federation: AnyFederation) -> dict[str, float]:
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
            name: (array + sum(weight * change[name] for weight, change in zip(weights, changes, strict=True))).astype(
                np.float32
            )
            for name, array in self.adapter.items()
        }
        self.bytes_up += sum(
            array.nbytes for group in everyone for update in group for array in update.adapter.values()
        )
        self.server_round += 1
        return everyone


class FromPairs:
    """Federated DPO, in place of sampling; ``sites`` are FIRM's, which measure its adapter as they do their own."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        """FIRM's settings; ``data.objective_column`` must hold the names of its rewards."""
        config = load_config(words)
        assert isinstance(config.method, FirmConfig)
        names = ",".join(spec.partition(":")[0] for spec in config.method.rewards)
        kept = [word for word in words if not word.startswith(("strategy=", "method.")) or "preference=" in word]
        dpo = ["strategy=fedavg", "method=dpo", f"method.objectives=[{names}]"]
        self._training = simulated(load_config([*dpo, *kept]), folder / "dpo")
        self.config = self._training.config
        self.sites = simulated(config, folder / "firm").sites

    @property
    def adapter(self) -> Arrays:
        """The global adapter."""
        return self._training.adapter

    @property
    def server_round(self) -> int:
        """Rounds played."""
        return self._training.server_round

    @property
    def bytes_up(self) -> int:
        """As ``Federation.bytes_up``."""
        return self._training.bytes_up

    def rounds(self) -> Iterator[list[list[ClientUpdate]]]:
        """Play all rounds."""
        yield from ([updates] for updates in self._training.rounds())


AnyFederation = Federation | Apart | FromPairs


def main() -> None:
    """Run what is missing, as long as there is time; write cells and tables."""
    given = _arguments()
    deadline = time.monotonic() + 60 * given.budget_minutes
    results = HERE / "results" / f"firm_{given.workload}.json"
    stored = results.with_suffix(".jsonl")
    stored.parent.mkdir(exist_ok=True)
    rewards = given.rewards or WORKLOADS[given.workload].rewards
    train_missing_heads(given.workload, rewards, given.data, given.device)
    names = given.methods or contenders_of(given.workload)
    rows = {Cell.of(row): row for row in rows_to_go_on_from(stored)}
    wanted = cells(names, given.workload, rewards, given.seeds, given.device)
    missing = [cell for cell in wanted if cell not in rows]

    def tables() -> dict[str, Any]:
        seeds = sorted({cell.seed for cell in rows})
        known = cells(contenders_of(given.workload), given.workload, rewards, seeds, given.device)
        return report(given.workload, rewards, [rows[cell] for cell in known if cell in rows])

    for row in finished(missing, partial(run_cell, data=given.data), given.jobs, deadline):
        rows[Cell.of(row)] = row
        with stored.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["contender"], row["share"], row["seed"], row["ends"][-1:], row.get("seconds"), flush=True)
        write_results(results, tables())
    write_results(results, tables())  # their form may have changed though no run was missing
    print(tables()["markdown"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="FIRM and its rivals on a language model")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="tiny")
    parser.add_argument("--methods", nargs="+", choices=list(CONTENDERS), help="default: all of the workload")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rewards", nargs=2, help="two rewards as under method.rewards")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, choices=[1, 2], default=1, help="runs at a time, a core each")
    return parser.parse_args()


def train_missing_heads(workload: str, rewards: Sequence[str], data: Path, device: str) -> None:
    """Train the linear heads among the rewards whose folders there are not, each on all pairs of its objective."""
    of = WORKLOADS[workload]
    kept = [word for word in of.settings if word.startswith(("data.", "model"))]
    for objective, folder in heads_among(rewards).items():
        if not folder.exists():
            place = [f"data.path={data / str(of.source)}", f"device={device}"]
            train_head(folder, [*of.base, *kept, *place], objective)


def _heads(rewards: Sequence[str]) -> list[str]:
    """What the linear heads among them are worth, for the page."""
    lines = []
    for facts in (LinearHead.load(folder).facts for folder in heads_among(rewards).values() if folder.is_dir()):
        told = ", ".join(f"{name} {share:.3f}" for name, share in facts.accuracy.items())
        lines.append(f"Head `{facts.objective}`, of {facts.num_pairs} pairs; accuracy: {told}.")
    return lines


def report(workload: str, rewards: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The results file: settings, and the tables as Markdown."""
    found = {
        name: Runs(
            contender.title,
            tuple(sorted({*contender.shares, *(CONTENDERS[contender.adds_to].shares if contender.adds_to else ())})),
            [row for of in (contender.adds_to, name) for row in rows if row["contender"] == of],
        )
        for name, contender in CONTENDERS.items()
        if any(row["contender"] == name for row in rows)
    }
    extended = {LEADER, *(name for name, contender in CONTENDERS.items() if contender.adds_to == LEADER)}
    leader = Runs(
        CONTENDERS[LEADER].title, CONTENDERS[LEADER].shares, [row for row in rows if row["contender"] in extended]
    )
    rivals = [
        found[name]
        for name, contender in CONTENDERS.items()
        if name in found and name not in extended and (contender.is_main or contender.adds_to)
    ]
    pairings = [(leader, rivals)]
    for name, others in RECONSTRUCTED.items():
        if name in found:
            pairings.append((found[name], [found[other] for other in others if other in found]))
    return {
        "workload": workload,
        "rewards": list(rewards),
        "settings": list(WORKLOADS[workload].settings),
        "seeds": sorted({row["seed"] for row in rows}),
        "runs": len(rows),
        "made_by": makers(rows),
        "markdown": "\n\n".join([markdown([*found.values()], pairings), *_heads(rewards)]),
    }


if __name__ == "__main__":
    main()
