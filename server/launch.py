"""The command line: ``bouquet run`` and what belongs to a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from conf.compose import load_config
from conf.schema import Config, Mode
from server.compare import compare, comparison, report
from server.compare_matrix import matrix_tables
from server.doctor import doctor
from server.flower import Connection, local_superlink, remote_superlink
from server.follow import Outcome, follow
from server.gpu_share import choose_gpus_per_site
from server.jobs import Job, plan
from server.record import RunFolder
from server.reward import reward_cli
from server.services import certs, server_cli, site_cli
from server.view import View

FAILED, BAD_SETTINGS, INTERRUPTED = 1, 2, 130
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANING_SECONDS = 60.0
"""How long after a signal another has no effect."""

cli = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
cli.command()(certs)
cli.command()(doctor)
cli.command()(compare)
cli.command()(report)
cli.add_typer(reward_cli, name="reward")
cli.add_typer(server_cli, name="server")
cli.add_typer(site_cli, name="site")
# A log file is as wide as its lines; a terminal tells its width.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True, highlight=False, soft_wrap=True)

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings, key=value; see conf/schema.py and its imports.")]


def main() -> None:
    """Entry point: exit code 0 only if everything asked for was done."""
    _end_in_order()
    try:
        cli()
    except ValueError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(BAD_SETTINGS)
    except RuntimeError as error:
        errors.print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(FAILED)
    finally:
        # All is cleaned up. Python gives up our handlers before it ends: an interrupt then would be the exit code.
        for each in _ENDING:
            signal.signal(each, signal.SIG_IGN)


def _end_in_order() -> None:
    """Ctrl-C, SIGTERM and a closed terminal end what runs; further ones do not cut off what is cleaned up then."""
    cleaning_since = -math.inf

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal cleaning_since
        if time.monotonic() - cleaning_since < _CLEANING_SECONDS:
            return
        cleaning_since = time.monotonic()
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping; this takes some seconds\n")
        raise KeyboardInterrupt

    for each in _ENDING:
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(each, interrupt)


@cli.command()
def run(
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("-m", "--multirun", help="Sweep over values given as a,b.")] = False,
) -> None:
    """Run a federation: simulated here, or on the sites of a SuperLink (federation=remote)."""
    jobs, folder = plan(list(overrides or []), multirun=multirun)
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
    path = folder / "launch.json"
    if not path.exists():
        raise ValueError(f"{folder} holds no launch.json: not the local folder of a remote run")
    launched = json.loads(path.read_text())
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


@cli.command(name="export-base")
def export_base(
    folder: Annotated[Path, typer.Argument(help="New folder for the model, in transformers' format.")],
    overrides: Overrides = None,
) -> None:
    """Write a run's base model, upcycled if the settings say so."""
    from client.bases import export_base as export  # noqa: PLC0415 - torch takes seconds to import

    identity = export(load_config(overrides or []).model, folder)
    console.print(f"{identity.name} sha256 {identity.sha256}", soft_wrap=True)
    console.print(escape(str(folder)), soft_wrap=True)


@cli.command(name="example-data")
def example_data(
    folder: Annotated[Path, typer.Argument(help="Folder for one file a site.")],
    num_examples: Annotated[int, typer.Option(min=8, help="Rows of all sites together.")] = 1200,
) -> None:
    """Write the embedded default data as files, to try real sites with."""
    from client.embedded import DOMAINS, embedded_rows  # noqa: PLC0415 - only needed here

    folder.mkdir(parents=True, exist_ok=True)
    rows = embedded_rows(num_examples, seed=0)
    for domain in DOMAINS:
        lines = [json.dumps(row) for row in rows if row["domain"] == domain]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
        console.print(escape(str(folder / f"{domain}.jsonl")), soft_wrap=True)


@cli.command()
def merge(
    run_folder: Annotated[Path, typer.Argument(help="Folder of a completed run.")],
    folder: Annotated[Path | None, typer.Argument(help="New folder; default: merged/ in the run folder.")] = None,
) -> None:
    """Write the base model with the run's adapter merged into its weights."""
    from client.merge import merge_adapter  # noqa: PLC0415 - torch takes seconds to import

    target = folder or run_folder / "merged"
    merge_adapter(run_folder / "adapter", target)
    console.print(escape(str(target)), soft_wrap=True)


Run = Annotated[Path, typer.Argument(help="Folder of a completed run.")]
SiteName = Annotated[str, typer.Option("--site", help="Name of the site.")]
PrivateFolder = Annotated[
    Path | None, typer.Option("--private", help="Folder of the private states of a real site here; as for site up.")
]


@cli.command()
def export(
    run_folder: Run,
    site: SiteName,
    folder: Annotated[Path | None, typer.Argument(help="New folder; default: personal/SITE in the run folder.")] = None,
    private: PrivateFolder = None,
) -> None:
    """Write a site's personal model: adapter, graft if there is one, and what loads them into transformers."""
    from server.personal import export_personal  # noqa: PLC0415 - torch takes seconds to import

    target = folder or run_folder / "personal" / site
    export_personal(run_folder, site, target, private)
    console.print(escape(str(target)), soft_wrap=True)


@cli.command()
def join(
    run_folder: Run,
    site: SiteName,
    data: Annotated[Path, typer.Option("--data", help="The site's own data file.")],
    overrides: Overrides = None,
    private: PrivateFolder = None,
) -> None:
    """Give a site that took no part in a run a personal model beside the run's adapter, which stays as it is."""
    from server.personal import join_run  # noqa: PLC0415 - torch takes seconds to import

    for server_round, loss in join_run(run_folder, site, data, list(overrides or []), private):
        console.print(f"round {server_round}: held-out loss {loss:.4f}" if server_round else f"before: {loss:.4f}")


@cli.command()
def pretrain(
    folder: Annotated[Path, typer.Argument(help="New folder for the model.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 4000,
    seed: int = 0,
    num_threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Rebuild tiny_moe, the packaged base model, from generated text."""
    from client.pretrain import pretrain_tiny_moe  # noqa: PLC0415 - torch takes seconds to import

    pretrain_tiny_moe(folder, steps=steps, seed=seed, num_threads=num_threads)
    console.print(escape(str(folder)), soft_wrap=True)


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
