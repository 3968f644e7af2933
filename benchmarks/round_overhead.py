"""Seconds of a round outside training, with the warm worker on and off, over two sites as processes on loopback.

    python -m benchmarks.round_overhead --json benchmarks/results/round_overhead.json
    python -m benchmarks.round_overhead --json benchmarks/results/round_overhead.json --name smollm2_moe \
        model=smollm2_moe model.wheel_dir=/tmp/wheels

The runs take turns: worker on and off, under the SuperNodes of ``bouquet site up`` and under Flower's own. The first
round of a run is left out: it loads the base and encodes the data in all. Besides, a plain Flower app whose clients
import transformers and peft and do nothing else. Results are added to the file under ``--name``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.render import write_results
from server.flower import remote_superlink
from tests.server.commands import bouquet, rows, run_folder, summary, superlink, supernode, write_site_files

SITES = 2
PLAIN = Path(__file__).parent / "plain_flower"
SETTINGS = (
    "strategy=fc_moe", "partition=files", "device=cpu", "train.max_steps=2", "eval.max_examples=8", "seed=0",
    "federation=remote", f"federation.min_sites={SITES}",
)  # fmt: skip
MODES = {
    "on": ("on", True),
    "on, Flower's own SuperNode": ("on", False),
    "off": ("off", True),
    "off, Flower's own SuperNode": ("off", False),
}
"""Mode -> ``worker=`` and whether the SuperNodes are those of ``bouquet site up``."""
VALUES = ("overhead_seconds", "startup_seconds", "since_request_seconds")


def measure(home: Path, overrides: Sequence[str], repeats: int, rounds: int) -> dict[str, Any]:
    """Samples of every mode and of plain Flower, one list entry a counted round."""
    samples: dict[str, dict[str, Any]] = {mode: {name: [] for name in VALUES} | {"loads": []} for mode in MODES}
    with contextlib.ExitStack() as stack:
        address = {fast: stack.enter_context(federation(home / f"fast-{fast}", fast=fast)) for fast in (True, False)}
        for repeat in range(repeats):
            for number, (mode, (worker, fast)) in enumerate(MODES.items()):
                words = [f"federation.superlink={address[fast]}", f"rounds={rounds}", f"worker={worker}", *overrides]
                output = f"output={home / f'run-{repeat}-{number}'}"
                done = bouquet("run", *SETTINGS, *words, output, cwd=home, timeout=3600)
                if done.returncode != 0:
                    raise RuntimeError(done.stdout + done.stderr)
                add(samples[mode], run_folder(done.stdout))
                print(repeat, mode, {name: samples[mode][name][1 - rounds :] for name in VALUES}, flush=True)
        plain = plain_rounds(address[False], repeats * (rounds - 1) + 1)[1:]
    return {"modes": samples, "plain_flower_seconds": plain}


@contextlib.contextmanager
def federation(home: Path, *, fast: bool) -> Iterator[str]:
    """A SuperLink and two sites; yields its address."""
    files = dict(list(write_site_files(home / "sites").items())[:SITES])
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(superlink(home / "superlink"))
        for site, file in files.items():
            node_config = f'site="{site}" data="{file}" private="{home / site / "private"}"'
            stack.enter_context(supernode(home / site, address, node_config, fast=fast))
        yield address


def add(samples: dict[str, Any], folder: Path) -> None:
    """Add a run's rounds, the first one left out, and its loads of the base model at each site."""
    for row in rows(folder, "round"):
        if row["round"] > 1:
            sites = [site for site in rows(folder, "site") if site["round"] == row["round"]]
            samples["overhead_seconds"].append(row["seconds"] - max(site["train_seconds"] for site in sites))
            samples["startup_seconds"].append(max(site["startup_seconds"] for site in sites))
            waited = [site["delivery_seconds"] + site["startup_seconds"] for site in sites]
            samples["since_request_seconds"].append(max(waited))
    loads = summary(folder)["base_model_loads"]
    samples["loads"].append(sum(count for process, count in loads.items() if not process.endswith("(server)")) / SITES)


def plain_rounds(address: str, rounds: int) -> list[float]:
    """Seconds of each round of the plain app."""
    with remote_superlink(address, None) as connection:
        words = connection.command("run", str(PLAIN), "bouquet", "--stream", "--run-config", f"rounds={rounds}")
        done = subprocess.run(  # noqa: S603 - no shell
            words, env=dict(connection.environment), capture_output=True, text=True, timeout=3600, check=True
        )
    return [float(seconds) for seconds in re.findall(r"ROUND \d+ ([\d.]+)", done.stdout)]


def table(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Median (least to greatest) of every sample, for the page."""
    columns = ["model", "worker", "round outside training, s", "process start to first step, s",
               "request to first step, s", "base loads a site and run"]  # fmt: skip
    lines = []
    for model, measured in models.items():
        for mode, samples in measured["modes"].items():
            cells = [spread(samples[name]) for name in VALUES]
            lines.append([model, mode, *cells, spread(samples["loads"], 0)])
        lines.append(["none: plain Flower", "", spread(measured["plain_flower_seconds"]), "", "", ""])
    return {"columns": columns, "rows": lines}


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Measure, and add the result to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--name", default="tiny_moe", help="under which the result is kept")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each setting")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of a run, of which the first is left out")
    parser.add_argument("overrides", nargs="*", help="further settings, key=value")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bouquet-bench-") as home:
        measured = measure(Path(home), asked.overrides, asked.repeats, asked.rounds)
    facts = {
        "settings": [*SETTINGS, *asked.overrides],
        "rounds_counted": asked.repeats * (asked.rounds - 1),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("flwr", "torch", "transformers", "peft")},
    }
    kept = json.loads(asked.json.read_text())["models"] if asked.json.exists() else {}
    models = {**kept, asked.name: facts | measured}
    write_results(asked.json, {"models": models, "table": table(models)})


if __name__ == "__main__":
    main()
