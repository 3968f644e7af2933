"""The ServerApp: settings in, rounds, run folder out."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from client.assemble import model_for, pooled_held_out
from client.base_model import base_model_loads, process_name
from client.data import held_out_file, site_names
from client.evaluation.examination import EvalSet
from client.evaluation.general_sets import general_sets
from client.evaluation.held_out import held_out_loss
from client.messages import Request
from client.model import AdaptedModel
from client.records import to_record
from client.site import shared_arrays
from client.text import encode
from conf.check import check_num_sites, needed_sites
from conf.compose import load_config, settings_hash, to_yaml
from conf.schema import Config, Mode
from server.evaluation import put_together, scored_at_server
from server.loggers import open_logger
from server.record import RunFolder, RunRecord, adapter_sha256, default_name
from server.register import registered_sites
from server.roster import Roster
from server.rounds import FederatedRounds
from strategies.adapters import Arrays

app = ServerApp()

# Simulated nodes register while the ServerApp starts.
NODES_APPEAR_SECONDS = 15


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; raises what went wrong, after it was written to ``summary.json``."""
    overrides = str(context.run_config["overrides"])
    config = load_config(overrides)
    record = RunRecord(RunFolder(run_folder_path(config, str(context.run_id))))
    run = Run(config, str(context.run_id), record)
    record.started(to_yaml(config), {"strategy": config.strategy.name, "rounds": config.rounds, "run_id": run.run_id})
    try:
        record.log_row = open_logger(config, record.folder.path)
        run.prepare(grid, overrides)
        if not context.run_config.get("dry-run", False):
            run.train(grid)
    # The edge of the process: every end is told in summary.json, then goes on as it was.
    except BaseException as error:
        run.end(f"{type(error).__name__}: {error}" if not isinstance(error, (ValueError, RuntimeError)) else str(error))
        raise
    run.end(None)


def run_folder_path(config: Config, run_id: str) -> Path:
    """``output``; by default a folder named after the strategy and the time, or at a SuperLink after the run."""
    remote = config.federation.mode is Mode.remote
    # At a SuperLink, never the folder that a launcher started there would write its copy to.
    default = f"bouquet-runs/{run_id}" if remote else f"outputs/{default_name(config)}"
    return Path(config.output or default).expanduser().resolve()


@dataclass
class Run:
    """One run of this process, from its first message to its summary."""

    config: Config
    run_id: str
    record: RunRecord
    rounds: FederatedRounds | None = None
    adapted: AdaptedModel | None = None
    general: Mapping[str, EvalSet] = field(default_factory=dict)
    """What the server tests models on after the last round."""

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._summary: dict[str, Any] = {}

    def prepare(self, grid: Grid, overrides: str) -> None:
        """Read the sets that are tested in the end, load the model, and wait for the sites.

        Raises:
            ValueError: If settings, data or model do not work out.
            RuntimeError: If too few sites join.
        """
        simulated = self.config.federation.mode is Mode.simulation
        if simulated:
            num_sites = len(site_names(self.config))
            check_num_sites(self.config, num_sites, f"the number of sites, {num_sites},")
            check_num_nodes(grid, num_sites, overrides)
        if self.config.eval.matrix:
            self.general = general_sets(self.config)
        self.adapted = model_for(self.config)
        request = Request(
            run=self.run_id,
            server_round=0,
            settings_hash=settings_hash(self.config),
            private_root=str(self.record.folder.path / "private") if simulated else "",
        )
        roster = Roster(request, self.adapted.base.identity.sha256, self.record.event, registered_sites)
        expected = len(site_names(self.config)) if simulated else needed_sites(self.config)
        roster.wait_for(grid, expected, self.config.federation.join_timeout_seconds, fixed=simulated)
        self.rounds = FederatedRounds(
            self.config, roster, self.record, global_loss(self.config, self.adapted), self.adapted.layers
        )

    def train(self, grid: Grid) -> None:
        """Run all rounds.

        Raises:
            RuntimeError: If a round gets fewer good replies than ``federation.min_sites``.
        """
        assert self.rounds is not None
        assert self.adapted is not None
        initial = shared_arrays(self.adapted.initial_adapter(self.config.seed), self.config)
        timeout = self.config.federation.round_timeout_seconds
        self.rounds.start(grid, to_record(initial), self.config.rounds, timeout)
        if self.config.eval.matrix:
            self.evaluate()

    def evaluate(self) -> None:
        """Put together the evaluation matrix: what the sites told, and what is tested here."""
        rounds, adapted = self.rounds, self.adapted
        assert rounds is not None
        assert adapted is not None
        adapter = None if self.config.method.name == "local_only" else rounds.adapter
        here = scored_at_server(self.config, adapted, adapter, self.general)
        evaluation = put_together(rounds.measured, here)
        self.record.evaluation(evaluation)
        self._summary = evaluation["summary"]

    def end(self, error: str | None) -> None:
        """Save the adapter of the last completed round and write the summary; ``error`` is None if all went well."""
        facts: dict[str, Any] = {
            "status": "completed" if error is None else "failed",
            "error": error,
            "strategy": self.config.strategy.name,
            "seed": self.config.seed,
            "run_id": self.run_id,
            "settings_hash": settings_hash(self.config),
            "folder": str(self.record.folder.path),
            "wall_seconds": time.monotonic() - self._started,
            "versions": {name: version(name) for name in ("flwr", "torch", "transformers", "peft", "bouquet-fl")},
        }
        if self.adapted is not None:
            identity = self.adapted.base.identity
            facts["base_model"] = {"name": identity.name, "path": identity.path, "sha256": identity.sha256}
        self.record.ended(facts | self._results())

    def _results(self) -> dict[str, Any]:
        rounds, adapted = self.rounds, self.adapted
        if rounds is None or adapted is None:
            return {"rounds": 0}
        results: dict[str, Any] = {"adapter_sha256": None}
        if rounds.rounds_done:
            adapter = {**adapted.initial_adapter(self.config.seed), **rounds.adapter}
            adapted.save_peft(adapter, self.record.folder.path / "adapter")
            results["adapter_sha256"] = adapter_sha256(adapter)
        here = {f"{process_name(os.getpid())} (server)": base_model_loads()}
        if self._summary:
            results["evaluation"] = self._summary
        return results | {
            "rounds": rounds.rounds_done,
            "global_loss": rounds.last_global_loss,
            "site_loss": rounds.losses,
            "bytes_up": rounds.bytes_up,
            "bytes_down": rounds.bytes_down,
            "num_sites": len(rounds.roster.nodes),
            "sites": rounds.roster.num_examples,
            "refused": sorted(rounds.roster.refused.values()),
            "base_model_loads": here | rounds.roster.loads,
        }


def check_num_nodes(grid: Grid, num_sites: int, overrides: str) -> None:
    """Raise ``ValueError`` with the exact command unless there is one simulated node for each site."""
    deadline = time.monotonic() + NODES_APPEAR_SECONDS
    while (num_nodes := len(list(grid.get_node_ids()))) != num_sites and time.monotonic() < deadline:
        time.sleep(0.2)
    if num_nodes != num_sites:
        # Flower reads a TOML string, but without escapes.
        mark = "'" if '"' in overrides else '"'
        run_config = shlex.quote(f"overrides={mark}{overrides}{mark}")
        raise ValueError(
            f"{num_nodes} simulated nodes, but these settings make {num_sites} sites; run: "
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 flwr run . --stream "
            f"--run-config {run_config} --federation-config 'num-supernodes={num_sites}'"
        )


def global_loss(config: Config, adapted: AdaptedModel) -> Callable[[Arrays], float] | None:
    """Held-out loss of a global adapter on data that the server has; None if it has none or there is no global model.

    Raises:
        ValueError: If ``eval.path`` cannot be read.
    """
    if config.method.name == "local_only":
        return None
    if config.eval.path is not None:
        examples = held_out_file(config, config.eval.path)
    elif config.federation.mode is Mode.simulation:
        examples = pooled_held_out(config)
    else:
        return None
    sequences = encode(examples, adapted.tokenizer, config.data)
    rest = adapted.initial_adapter(config.seed)

    def loss(adapter: Arrays) -> float:
        return held_out_loss(adapted, {**rest, **adapter}, sequences, config.eval.batch_size).loss

    return loss
