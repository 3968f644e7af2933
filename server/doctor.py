"""``bouquet doctor``: everything that can be known before round 1, on the server, at a site or before a simulation."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from conf.alignment import FirmConfig
from conf.check import needed_sites
from conf.compose import load_config, settings_hash
from conf.schema import Config, Mode
from server.flower import Connection, remote_superlink
from server.follow import Outcome, follow
from server.view import View

_JOIN_SECONDS = 120.0
"""How long the doctor waits for the sites, whatever the run would."""
_MARKS = {"ok": "ok     ", "warning": "warning", "failed": "FAILED "}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    state: str
    """``ok``, ``warning`` or ``failed``."""
    text: str
    """What was found; of a failure, also what to change."""


@dataclass(frozen=True)
class Place:
    """Whose machine is examined; nothing is set for a simulation or a launcher."""

    certificates: Path | None = None
    """The server's."""
    name: str | None = None
    """A site's, as the following."""
    data: Path | None = None
    superlink: str | None = None
    root_certificates: Path | None = None
    key: Path | None = None
    home: Path | None = None


Check = tuple[str, Callable[[], str]]


def doctor(  # noqa: PLR0917 - its options
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of the run to come.")] = None,
    certificates: Annotated[Path | None, typer.Option(help="On the server: server/ of bouquet certs.")] = None,
    name: Annotated[str | None, typer.Option(help="At a site, as for bouquet site up: its name.")] = None,
    data: Annotated[Path | None, typer.Option(help="At a site: its data file.")] = None,
    superlink: Annotated[str | None, typer.Option(help="At a site: HOST:PORT of the server.")] = None,
    root_certificates: Annotated[Path | None, typer.Option(help="At a site: the federation's ca.crt.")] = None,
    key: Annotated[Path | None, typer.Option(help="At a site: its private key.")] = None,
    home: Annotated[Path | None, typer.Option(help="At a site: folder of its state.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings as JSON.")] = False,
) -> None:
    """Examine settings, data, model, memory and connections before a run; exit code 1 if it could not work."""
    place = Place(certificates, name, data, superlink, root_certificates, key, home)
    if (name is None) != (data is None):
        raise ValueError("at a site, bouquet doctor needs both --name and --data")
    findings: list[Finding] = []
    for finding in examine(overrides or [], place):
        findings.append(finding)
        if not as_json:
            print(f"{_MARKS[finding.state]}  {finding.check:<18} {finding.text}", flush=True)
    failed = any(finding.state == "failed" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=1))
    if failed:
        raise SystemExit(1)


def examine(overrides: Sequence[str], place: Place) -> Iterator[Finding]:
    """Findings in the order of the checks; without usable settings there is only that one."""
    settings, config = _settings(overrides, place)
    yield settings
    if config is None:
        return
    for check, look in _checks(config, list(overrides), place):
        yield _finding(check, look)


def _settings(overrides: Sequence[str], place: Place) -> tuple[Finding, Config | None]:
    try:
        # A site takes part in remote runs, whatever else they set.
        words = [*overrides, "federation=remote"] if place.name else list(overrides)
        config = load_config(words)
    except ValueError as error:
        return Finding("settings", "failed", str(error)), None
    text = f"strategy={config.strategy.name} method={config.method.name} hash {settings_hash(config)[:12]}"
    return Finding("settings", "ok", text), config


def _finding(check: str, look: Callable[[], str]) -> Finding:
    from server.checks import Caution  # noqa: PLC0415 - torch takes seconds to import

    try:
        return Finding(check, "ok", look())
    except Caution as caution:
        return Finding(check, "warning", str(caution))
    except (ValueError, RuntimeError, OSError) as error:
        return Finding(check, "failed", str(error))


def _checks(config: Config, overrides: list[str], place: Place) -> Iterator[Check]:
    from client.data import simulated_sites  # noqa: PLC0415 - torch takes seconds to import
    from server import checks  # noqa: PLC0415

    yield "versions", checks.versions
    yield "telemetry", checks.telemetry
    yield "working directory", lambda: checks.working_directory(Path.cwd())
    yield "base model", lambda: checks.base_model(config)
    remote = config.federation.mode is not Mode.simulation
    if isinstance(config.method, FirmConfig) and (place.name is not None or not remote):
        yield "rewards", lambda: checks.rewards(config, at_site=place.name is not None)
    if place.name is not None and place.data is not None:
        yield from _site_checks(config, place, place.name, place.data)
        return
    yield "disk", lambda: checks.disk(config, checks.run_folders(config))
    if config.federation.superlink is None or place.certificates is not None:
        # From elsewhere the files are the SuperLink's, whose start of the run reads them.
        yield "evaluation sets", lambda: checks.evaluation_sets(config)
    if place.certificates is not None:
        yield "certificates", lambda folder=place.certificates: checks.server_certificates(folder)  # type: ignore[misc]
    if not remote:
        yield "data", lambda: checks.partition(config)
        yield "memory", lambda: checks.memory(config, lambda: simulated_sites(config).values())
        return
    yield "memory", lambda: checks.memory(config, lambda: [])
    if config.federation.superlink is not None:
        root = config.federation.root_certificates
        authority = None if root is None else Path(root).expanduser()
        yield "superlink", lambda: checks.superlink(str(config.federation.superlink), authority)
        yield "sites", lambda: sites(config, overrides)


def _site_checks(config: Config, place: Place, name: str, data: Path) -> Iterator[Check]:
    from client.data import own_site  # noqa: PLC0415
    from server import checks  # noqa: PLC0415

    yield "disk", lambda: checks.disk(config, checks.site_folders(place.home))
    yield "data", lambda: checks.own_data(config, name, data)
    yield "memory", lambda: checks.memory(config, lambda: [own_site(config, name, str(data))])
    if place.key is not None:
        yield "key", lambda key=place.key: checks.private_key(key)  # type: ignore[misc]
    if place.superlink is not None:
        address = place.superlink
        yield "superlink", lambda: checks.superlink(address, place.root_certificates)


def sites(config: Config, overrides: Sequence[str]) -> str:
    """Have the SuperLink start the run without its rounds: who joins, with which data, base model and settings.

    Raises:
        ValueError: If a connected site was refused; it says why.
        RuntimeError: If the run could not start, or too few sites joined.
    """
    timeout = min(_JOIN_SECONDS, config.federation.join_timeout_seconds)
    # The output folder is the run's, which does not start in one that is not empty.
    words = [
        *(word for word in overrides if not word.startswith("output=")),
        f"federation.join_timeout_seconds={timeout:g}",
    ]
    with remote_superlink(str(config.federation.superlink), config.federation.root_certificates) as connection:
        outcome = _dry_run(connection, words)
    if outcome.summary is None or not outcome.completed:
        raise RuntimeError(outcome.error)
    joined: dict[str, Any] = outcome.summary["sites"]
    text = ", ".join(f"{site} ({examples} examples)" for site, examples in sorted(joined.items()))
    if outcome.summary["refused"]:
        raise ValueError(f"joined: {text}; {'; '.join(outcome.summary['refused'])}")
    return f"{text}; {needed_sites(config)} needed; settings and base model are the same everywhere"


def _dry_run(connection: Connection, overrides: Sequence[str]) -> Outcome:
    process = connection.run(shlex.join(overrides), {}, dry_run=True)
    started: list[str] = []
    try:
        with tempfile.TemporaryDirectory() as scratch, View(Console(quiet=True), "doctor") as view:
            return follow(process, view, Path(scratch) / "log.txt", None, started.append)
    except BaseException:
        process.terminate()
        for run_id in started:
            connection.stop(run_id)
        raise
