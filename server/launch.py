"""The command line: ``bouquet run`` and what belongs to a run."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from client.folders import make_folder
from conf.schema import Config, Mode
from server.compare import compare, comparison, report
from server.compare_matrix import matrix_tables
from server.doctor import doctor
from server.entry import FAILED, INTERRUPTED
from server.flower import Connection, local_superlink, remote_superlink
from server.follow import Outcome, follow
from server.gpu_share import choose_gpus_per_site
from server.jobs import Job, plan
from server.models import Overrides, example_data, export, export_base, join, merge, pretrain
from server.record import RunFolder
from server.reward import reward_cli
from server.services import certs, server_cli, site_cli
from server.view import View

cli = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
cli.command()(certs)
cli.command()(doctor)
cli.command()(compare)
cli.command()(report)
cli.command()(example_data)
cli.command()(export_base)
cli.command()(pretrain)
cli.command()(merge)
cli.command()(export)
cli.command()(join)
cli.add_typer(reward_cli, name="reward")
cli.add_typer(server_cli, name="server")
cli.add_typer(site_cli, name="site")
# A log file is as wide as its lines; a terminal tells its width.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


@cli.command()
def run(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Sweep over values given as a,b.")] = False,
) -> None:
    """Run a federation: simulated here, or on the sites of a SuperLink (federation=remote)."""
    jobs, folder = plan(list(overrides or []), multirun=multirun)
    for job in jobs:
        make_folder(job.output, "output=")
    try:
        with connect(jobs[0].config) as connection:
            ended = [launch(job, connection) for job in jobs]
    except KeyboardInterrupt:
        errors.print("interrupted; the run was stopped")
        raise SystemExit(INTERRUPTED) from None
    if multirun:
        outputs = [job.output for job in jobs]
        console.print(comparison(outputs), *matrix_tables(outputs))
    console.print(escape(str(folder)), soft_wrap=True)
    if not all(ended):
        raise SystemExit(FAILED)


@cli.command()
def fetch(folder: Annotated[Path, typer.Argument(help="Local folder of a remote run.")]) -> None:
    """Read a remote run's log again: metrics, summary and adapter, also after the launcher was cut off."""
    launched = _launched(folder)
    with (
        remote_superlink(launched["superlink"], launched["root_certificates"]) as connection,
        View(console, folder.name) as view,
    ):
        process = connection.log(launched["run_id"])
        try:
            outcome = follow(process, view, folder / "log.txt", RunFolder(folder), lambda _: None)
        finally:
            process.terminate()
    if not _report(folder.name, outcome):
        raise SystemExit(FAILED)
    console.print(escape(str(folder)), soft_wrap=True)


def _launched(folder: Path) -> dict[str, Any]:
    """What ``launch`` noted of a remote run."""
    path = folder / "launch.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no launch.json: not the local folder of a remote run")
    try:
        facts = json.loads(path.read_text())
        return {key: facts[key] for key in ("run_id", "superlink", "root_certificates")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error


def launch(job: Job, connection: Connection) -> bool:
    """Run one job to its end; True if it completed."""
    remote = job.config.federation.mode is Mode.remote
    overrides, size = (job.overrides, {}) if remote else _sized(job)
    started: list[str] = []

    def on_start(run_id: str) -> None:
        started.append(run_id)
        if remote:
            facts = {"run_id": run_id, "superlink": job.config.federation.superlink}
            facts["root_certificates"] = job.config.federation.root_certificates
            RunFolder(job.output).write_text("launch.json", json.dumps(facts) + "\n")

    process = connection.run(shlex.join(overrides), size)
    try:
        with View(console, job.output.name) as view:
            outcome = follow(process, view, job.output / "log.txt", RunFolder(job.output) if remote else None, on_start)
    except BaseException:
        process.terminate()
        if started:
            connection.stop(started[0])
        raise
    return _report(job.output.name, outcome)


def _sized(job: Job) -> tuple[tuple[str, ...], dict[str, float]]:
    """Settings and Flower's federation of a simulation, with the GPU share that a site gets."""
    gpus = choose_gpus_per_site(job.config)
    size = {
        "num-supernodes": job.num_sites or 0,
        "client-resources-num-cpus": job.config.federation.cpus_per_site,
        "client-resources-num-gpus": gpus,
    }
    return (*job.overrides, f"federation.gpus_per_site={gpus}"), size


@contextlib.contextmanager
def connect(config: Config) -> Iterator[Connection]:
    """The SuperLink that the settings name, or one of our own for a simulation.

    Raises:
        ValueError: If ``federation=remote`` comes without an address.
    """
    federation = config.federation
    if federation.mode is Mode.simulation:
        with local_superlink(config.train.num_threads) as connection:
            yield connection
        return
    host, _, port = (federation.superlink or "").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"federation=remote needs federation.superlink=HOST:PORT, got {federation.superlink!r}")
    with remote_superlink(f"{host}:{port}", federation.root_certificates) as connection:
        yield connection


def _report(name: str, outcome: Outcome) -> bool:
    if not outcome.completed:
        errors.print(f"[red]{escape(name)} failed:[/] {escape(outcome.error)}")
    return outcome.completed
