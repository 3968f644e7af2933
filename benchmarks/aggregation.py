"""Seconds and peak memory of every strategy's aggregation, beside Flower's own FedAvg on the same adapters.

    python -m benchmarks.aggregation --json benchmarks/results/aggregation.json

Times are from the records that the sites sent to the record that they get back, as in a run: Flower's ``FedAvg`` reads
its arrays while it averages, Bouquet reads a reply before it. All take turns in one process, in another order each
turn; what is compared is the ratio to Flower within a turn, since machines are shared. Peak memory is that of a fresh
process for each, beyond the records it begins with.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from benchmarks.made_up_round import Size, extras_of, received_adapter, sent
from benchmarks.provenance import MADE_BY
from benchmarks.render import write_results
from client.records import to_arrays, to_record
from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy
from strategies.clair import Clair
from strategies.conflicts import Against, ConflictConfig, Granularity, Space
from strategies.diagnostics import round_diagnostics
from strategies.expert_rounds import Attention
from strategies.fc_moe import FcMoe
from strategies.fc_moe_plus import FcMoePlus
from strategies.fedalign_moe import FedAlignMoe
from strategies.fedavg import FedAvg, Weights
from strategies.fedcmoo import FedCmoo
from strategies.fedmoe import FedMoe
from strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.low_rank import aggregation_gap
from strategies.scaffold import Scaffold
from strategies.screen import ScreenConfig, ScreenKind, screened

FLOWER = "Flower's FedAvg"
STRATEGIES: dict[str, Strategy] = {
    "fedavg": FedAvg(),
    "fedavg, by tokens": FedAvg(weights=Weights.tokens),
    "fedavg, expert_step=2": FedAvg(expert_step=2.0),
    "fedavgm": FedAvgM(),
    "fedadagrad": FedAdagrad(),
    "fedadam": FedAdam(),
    "fedyogi": FedYogi(),
    "fedmoe": FedMoe(),
    "fedalign_moe": FedAlignMoe(),
    "scaffold": Scaffold(),
    "fedcmoo": FedCmoo(),
    "fc_moe": FcMoe(),
    "fc_moe, by matrix": FcMoe(conflict=ConflictConfig(granularity=Granularity.matrix)),
    "fc_moe, by row": FcMoe(conflict=ConflictConfig(granularity=Granularity.row)),
    "fc_moe, by component": FcMoe(conflict=ConflictConfig(granularity=Granularity.component)),
    "fc_moe, against others": FcMoe(conflict=ConflictConfig(against=Against.others)),
    "fc_moe, pairwise": FcMoe(conflict=ConflictConfig(against=Against.pairwise)),
    "fc_moe, pairwise by row": FcMoe(conflict=ConflictConfig(granularity=Granularity.row, against=Against.pairwise)),
    "fc_moe, attention as experts": FcMoe(attention=Attention.as_experts),
    "fc_moe, in products": FcMoe(conflict=ConflictConfig(space=Space.product)),
    "fc_moe_plus": FcMoePlus(),
    "fc_moe_plus, in factors": FcMoePlus(space=Space.factors),
    "fedavg, screen=clair": screened(FedAvg(), ScreenConfig(kind=ScreenKind.clair)),
    "clair": Clair(),
}
"""The others average as ``fedavg`` does: fedprox, firm, flex, pfl_moe; or not at all: local_only, centralised."""
SLOW = {"fc_moe, pairwise by row", "fc_moe, in products", "fedavg, screen=clair", "clair"}
"""Up to minutes each: measured in one turn."""


def _check(received: Arrays, updates: Sequence[ClientUpdate]) -> None:
    for update in updates:
        STRATEGIES["fc_moe_plus"].check_update(received, update)


BESIDE: dict[str, Callable[[Arrays, Sequence[ClientUpdate]], object]] = {
    "replies checked": _check,
    "aggregation gap": lambda _, updates: aggregation_gap(
        [update.adapter for update in updates], [update.num_examples for update in updates]
    ),
    "diagnostics": lambda received, updates: round_diagnostics(
        received, updates, Aggregation(adapter=updates[0].adapter, state={})
    ),
}
"""What the server does in a round beside aggregating, whatever the strategy; checks are those of ``fc_moe_plus``."""
MIN_TURNS = 5


class Replies:
    """The sites' replies as records: of an app on Flower's ``FedAvg``, and of Bouquet."""

    def __init__(self, size: Size, names: Sequence[str]) -> None:
        self.received = received_adapter(size)
        self.facts: list[ClientUpdate] = []
        self.to_flower: list[RecordDict] = []
        self.to_us: list[ArrayRecord] = []
        self.beside: dict[str, list[ArrayRecord]] = {name: [] for name in names}
        for update in sent(size):
            self.facts.append(replace(update, adapter={}))
            if FLOWER in names:
                arrays = ArrayRecord({name: Array(np.asarray(array)) for name, array in update.adapter.items()})
                metrics = MetricRecord({"num-examples": update.num_examples})
                self.to_flower.append(RecordDict({"arrays": arrays, "metrics": metrics}))
            if set(names) - {FLOWER}:
                self.to_us.append(to_record(update.adapter))
            for name, records in self.beside.items():
                records.append(to_record(extras_of(name, update)))

    def work(self, name: str) -> object:
        """Aggregate to the record that goes back to the sites, or what is done beside it."""
        if name == FLOWER:
            return aggregate_arrayrecords(self.to_flower, "num-examples")
        read = [map(to_arrays, records) for records in (self.to_us, self.beside[name])]
        updates = [
            replace(fact, adapter=adapter, extras=extras)
            for fact, adapter, extras in zip(self.facts, *read, strict=True)
        ]
        if name in BESIDE:
            return BESIDE[name](self.received, updates)
        strategy = STRATEGIES[name]
        return to_record(strategy.aggregate(self.received, strategy.init_state(self.received), updates).adapter)


def measure(size: Size, names: Sequence[str], turns: int) -> dict[str, list[float]]:
    """Seconds of each in every turn, after one that does not count."""
    replies = Replies(size, names)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            if name in SLOW and turn != 1:
                continue
            began = time.perf_counter()
            replies.work(name)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def peak_of_a_process(name: str, size: Size) -> int:
    """Bytes by which a fresh process grows at most while it aggregates."""
    words = [sys.executable, "-m", "benchmarks.aggregation", "--peak-of", json.dumps([name, asdict(size)])]
    return int(subprocess.run(words, capture_output=True, check=True).stdout)  # noqa: S603


def _print_peak(name: str, size: Size) -> None:
    replies = Replies(size, [name])
    ctypes.CDLL(None).malloc_trim(0)  # what making them left
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS:")
    replies.work(name)
    print(_status("VmHWM:") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def row(seconds: Sequence[float], flowers: Sequence[float], peak_bytes: int) -> dict[str, Any]:
    """What is kept of one strategy."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else 3 * list(seconds)
    return {
        "seconds": statistics.median(seconds),
        "quartiles": [low, high],
        "ratio_to_flower": statistics.median(own / other for own, other in zip(seconds, flowers, strict=False)),
        "peak_bytes": peak_bytes,
        "samples": list(seconds),
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The rows as ``benchmarks.render`` shows them."""
    return {
        "columns": ["", "s", "quartiles", "times Flower's FedAvg", "peak memory, MiB"],
        "rows": [
            [
                name,
                f"{values['seconds']:.2f}",
                "{:.2f} to {:.2f}".format(*values["quartiles"]) if len(values["samples"]) > 1 else "once",
                f"{values['ratio_to_flower']:.2f}",
                f"{values['peak_bytes'] / 2**20:.0f}",
            ]
            for name, values in found.items()
        ],
    }


def machine() -> dict[str, Any]:
    """Where it was measured."""
    return {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}


def main() -> None:
    """Measure, write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, default in asdict(Size()).items():
        parser.add_argument(f"--{field}", type=int, default=default)
    parser.add_argument(
        "--strategies", nargs="+", choices=[*STRATEGIES, *BESIDE], default=[*STRATEGIES, *BESIDE], metavar="NAME"
    )
    parser.add_argument("--turns", type=int, default=MIN_TURNS, help=f"of each, at least {MIN_TURNS}")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.peak_of is not None:
        name, fields = json.loads(words.peak_of)
        _print_peak(name, Size(**fields))
        return
    if words.turns < MIN_TURNS:
        parser.error(f"--turns={words.turns}: a median and its spread need at least {MIN_TURNS}")
    size = Size(**{field: getattr(words, field) for field in asdict(Size())})
    names = [FLOWER, *words.strategies]
    peaks = {name: peak_of_a_process(name, size) for name in names}
    seconds = measure(size, names, words.turns)
    found = {name: row(seconds[name], seconds[FLOWER], peaks[name]) for name in names}
    results: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.aggregation", *sys.argv[1:]]),
        "size": asdict(size) | {"mebibytes_per_site": size.mebibytes()},
        "machine": machine(),
        "made_by": MADE_BY,
        "strategies": found,
        "table": table(found),
    }
    if words.json:
        write_results(words.json, results)
    for cells in [results["table"]["columns"], *results["table"]["rows"]]:
        print(" | ".join(cells))


if __name__ == "__main__":
    main()
