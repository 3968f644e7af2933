"""The long-running ends of a federation: ``bouquet server up`` and ``bouquet site up``, around Flower's processes."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Annotated, NoReturn

import typer

from client.node import real_node
from client.site_names import check_site_name
from server.certificates import (
    CA_DAYS,
    check_private_key,
    check_server_certificate,
    hosts_of,
    load_certificate,
    make_certificates,
)
from server.clientapps import fast_clientapps
from server.flower import MARK, Connection, environment, free_port, marked, remote_superlink
from server.probe import UnreachableError, check_clock, look_at, split_address
from server.register import SITES_FILE, Register

DATA_ROOT = Path("~/.local/share/bouquet").expanduser()
_EXPIRY_WARNING_DAYS = 30
_START_SECONDS = 60.0
_WATCH_SECONDS = 2.0
_RETRY_SECONDS = 5.0
# Flower counts a site that vanished as connected for two heartbeats of 30 s.
_REJOIN_SECONDS = 120.0
_EVERY_ADDRESS = ("0.0.0.0", "::")  # noqa: S104
_NOT_ACTIVATED = "Failed to activate SuperNode"
_CONNECTED = "SuperNode ID:"

server_cli = typer.Typer(no_args_is_help=True, help="The coordinator's machine.")
site_cli = typer.Typer(no_args_is_help=True, help="A site's machine.")


@dataclass(frozen=True)
class _Link:
    """A site's way to the server."""

    superlink: str
    """HOST:PORT."""
    authority: Path | None
    """The federation's ca.crt; None over plain HTTP."""
    key: Path | None

    def fingerprint(self) -> str:
        return check_private_key(self.key) if self.key else "none"


def certs(
    folder: Annotated[Path, typer.Argument(help="Folder of the federation's keys and certificates.")],
    host: Annotated[list[str] | None, typer.Option(help="Name or address by which sites reach the server.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="Site that needs a key pair.")] = None,
    replace: Annotated[list[str] | None, typer.Option(help="Site whose key pair is made anew.")] = None,
    days: Annotated[int, typer.Option(min=1, max=CA_DAYS, help="Validity of the server's certificate.")] = 365,
) -> None:
    """Make an authority, the server's certificate and the sites' keys; again: issue the certificate anew."""
    written = make_certificates(folder, host or [], site or [], replace=replace or [], valid_seconds=days * 86400)
    for path in written:
        typer.echo(path)


@server_cli.command("up")
def server_up(
    certificates: Annotated[Path | None, typer.Option(help="server/ of the folder that bouquet certs made.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",  # noqa: S104 - sites are elsewhere
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    home: Annotated[Path, typer.Option(help="Folder of its state and run folders.")] = DATA_ROOT / "server",
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain HTTP, any site; on loopback only.")] = False,
) -> None:
    """Run the SuperLink until stopped. Sites whose public key lies in sites/ of --certificates may join."""
    home = _neutral(home)
    security = _server_security(certificates, host, insecure=insecure)
    _check_free(host, port)
    sites_file = home / "sites.json"
    words = [sys.executable, "-P", "-m", "server.gate", "--host", host, "--port", str(port), *security]
    words += ["--database", str(home / "superlink.db"), "--isolation", "subprocess"]
    dialled = f"{_dialled(host)}:{port}"
    authority = None if certificates is None else certificates.resolve() / "ca.crt"
    with _until_stopped(), _service(words, home, {SITES_FILE: str(sites_file)}) as process:
        _wait_until_healthy(process, dialled, authority)
        _say(f"the SuperLink listens on {host}:{port}; stop it with Ctrl-C or SIGTERM")
        with remote_superlink(dialled, None if authority is None else str(authority)) as connection:
            _watch(process, connection, certificates, sites_file)
    raise RuntimeError(f"the SuperLink ended by itself (exit code {process.returncode}); its last lines say why")


@site_cli.command("up")
def site_up(  # noqa: PLR0917 - its options
    name: Annotated[str, typer.Option(help="Stable name of the data owner.")],
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the server.")],
    data: Annotated[Path, typer.Option(help="The site's data file.")],
    root_certificates: Annotated[Path | None, typer.Option(help="The federation's ca.crt.")] = None,
    key: Annotated[Path | None, typer.Option(help="The site's private key.")] = None,
    home: Annotated[Path | None, typer.Option(help="Folder of the site's state.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Plain HTTP, no key; on loopback only.")] = False,
    settings: Annotated[list[str] | None, typer.Argument(help="Node settings: private=FOLDER device=cuda ...")] = None,
) -> None:
    """Run the site until stopped; it waits for the server and comes back after any interruption."""
    check_site_name(name, "--name")
    folder = _neutral(home or DATA_ROOT / "sites" / name)
    security = _site_security(superlink, root_certificates, key, insecure=insecure)
    words = [sys.executable, "-P", "-m", "server.supernode", *security, "--superlink", superlink, "--host", "127.0.0.1"]
    words += ["--node-config", node_config(name, data, folder, settings or [])]
    with _until_stopped(), fast_clientapps(environment(folder / "flwr", 1)) as variables:
        _keep_up(_Link(superlink, None if insecure else root_certificates, key), name, folder, words, variables)


def node_config(name: str, data: Path, home: Path, settings: Sequence[str]) -> str:
    """Flower's ``--node-config`` of a site.

    Raises:
        ValueError: If the data file is missing, a setting is not KEY=VALUE, or as ``real_node``.
    """
    if not data.expanduser().is_file():
        raise ValueError(f"--data {data} is not a file")
    values = {"site": name, "data": str(data.expanduser().resolve()), "private": str((home / "private").resolve())}
    for word in settings:
        setting, sign, value = word.partition("=")
        if not sign or not setting.isidentifier() or setting in ("site", "data"):
            raise ValueError(f"node settings are written KEY=VALUE (private, device, ...), got {word!r}")
        values[setting] = str(Path(value).expanduser().resolve()) if setting == "private" else value
    for setting, value in values.items():
        if "'" in value:
            raise ValueError(f"{setting}={value}: Flower takes no value with an apostrophe")
    real_node(values)
    return " ".join(f"{setting}='{value}'" for setting, value in values.items())


def _keep_up(link: _Link, name: str, home: Path, words: Sequence[str], variables: Mapping[str, str]) -> NoReturn:
    """Run the SuperNode again and again; ends with an error only if the server keeps refusing it or its settings."""
    refused_since: float | None = None
    while True:
        _wait_for_server(link, home)
        if _run_supernode([*words, "--port", str(free_port())], home, variables) != "refused":
            refused_since = None
            _say(f"the connection ended; trying again in {_RETRY_SECONDS:g} s")
        else:
            refused_since = refused_since or time.monotonic()
            text = (
                f"{link.superlink} refused site {name} (key {link.fingerprint()}): its key is not "
                "registered there (the server's operator puts its public key into DIR/server/sites), or its "
                "last process still counts as connected (a minute at most)"
            )
            if time.monotonic() - refused_since > _REJOIN_SECONDS:
                raise RuntimeError(text)
            _say(text)
        _set_status(home, "waiting")
        time.sleep(_RETRY_SECONDS)


def _server_security(certificates: Path | None, host: str, *, insecure: bool) -> list[str]:
    if insecure:
        if certificates is not None or not _is_loopback(host):
            raise ValueError("--insecure is for --host 127.0.0.1 without --certificates: anyone could join as any site")
        return ["--insecure"]
    if certificates is None:
        raise ValueError("--certificates DIR/server is needed: bouquet certs DIR --host NAME --site NAME makes it")
    expires = check_server_certificate(certificates)
    names = hosts_of(load_certificate(certificates / "server.crt"))
    if host not in _EVERY_ADDRESS and host not in names:
        raise ValueError(f"server.crt is made out to {', '.join(names)}: bouquet certs DIR --host {host}")
    days = (expires - datetime.now(UTC)).days
    if days < _EXPIRY_WARNING_DAYS:
        _say(f"server.crt expires in {days} days: bouquet certs DIR issues it anew, then restart")
    files = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    words = [word for flag, name in files.items() for word in (flag, str(certificates.resolve() / name))]
    return [*words, "--enable-supernode-auth"]


def _site_security(superlink: str, root_certificates: Path | None, key: Path | None, *, insecure: bool) -> list[str]:
    host, _ = split_address(superlink, "--superlink")
    if insecure:
        if root_certificates or key or not _is_loopback(host):
            raise ValueError("--insecure is for a --superlink on 127.0.0.1, without --root-certificates and --key")
        return ["--insecure"]
    if root_certificates is None or key is None:
        raise ValueError("--root-certificates ca.crt and --key site.key are needed: the server's operator has them")
    check_private_key(key)
    return [
        "--root-certificates", str(root_certificates.resolve()), "--auth-supernode-private-key", str(key.resolve()),
    ]  # fmt: skip


def _watch(process: subprocess.Popen[str], connection: Connection, certificates: Path | None, sites_file: Path) -> None:
    """Register and unregister sites as their public keys come and go, until the SuperLink ends."""
    register = (
        None if certificates is None else Register(connection, certificates.resolve() / "sites", sites_file, _say)
    )
    while process.poll() is None:
        if register is not None:
            register.sync()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_WATCH_SECONDS)


def _run_supernode(words: Sequence[str], home: Path, variables: Mapping[str, str]) -> str:
    """Run Flower's SuperNode to its end, passing its lines on; ``refused`` or ``ended``."""
    printed: list[str] = []

    def pass_on(lines: IO[str]) -> None:
        for line in lines:
            print(line, end="", flush=True)
            if _CONNECTED in line:
                _set_status(home, "connected")
            printed.extend(text for text in (_NOT_ACTIVATED,) if text in line)

    with _service(words, home, variables, subprocess.PIPE) as process:
        assert process.stdout is not None
        # A thread, since the SuperNode's helper may hold its output open after it has ended.
        reader = threading.Thread(target=pass_on, args=(process.stdout,), daemon=True)
        reader.start()
        process.wait()
    reader.join()
    return "refused" if printed else "ended"


def _wait_for_server(link: _Link, home: Path) -> None:
    """Return when a usable SuperLink answers; the reason for waiting is told when it changes."""
    told = ""
    _set_status(home, "waiting")
    while True:
        try:
            seen = look_at(link.superlink, link.authority)
        except UnreachableError as error:
            if str(error) != told:
                told = str(error)
                _say(f"waiting: {told}")
            time.sleep(_RETRY_SECONDS)
        else:
            if link.key is not None:
                check_clock(seen, link.superlink)
            return


def _wait_until_healthy(process: subprocess.Popen[str], dialled: str, authority: Path | None) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(UnreachableError):
            if not look_at(dialled, authority).gated:
                raise RuntimeError(f"what answers at {dialled} is not behind Bouquet's gate: it was stopped")
            return
        time.sleep(0.2)
    raise RuntimeError(f"the SuperLink did not come up at {dialled} within {_START_SECONDS:g} s; its lines say why")


@contextlib.contextmanager
def _service(
    words: Sequence[str], home: Path, variables: Mapping[str, str], stdout: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A Flower process in ``home``; at the end, also if this process is killed, it and all it started are gone."""
    # Whoever sets this could have a SuperLink believe any address that a client writes into its request.
    inherited = {key: value for key, value in environment(home / "flwr", 1).items() if key != "FORWARDED_ALLOW_IPS"}
    with marked() as mark:
        process = subprocess.Popen(  # noqa: S603
            list(words),
            cwd=home, env={**inherited, MARK: mark, **variables}, stdout=stdout,
            stderr=subprocess.STDOUT if stdout else None, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        yield process


def _neutral(folder: Path) -> Path:
    """A service's working directory, made; a package called like one of ours there would be imported instead."""
    home = folder.expanduser().resolve()
    home.mkdir(parents=True, exist_ok=True)
    (home / "flwr").mkdir(exist_ok=True)
    shadows = [name for name in ("client", "conf", "server", "strategies") if (home / name).exists()]
    if shadows:
        raise ValueError(f"--home {home} holds {shadows[0]!r}, which would be taken for Bouquet's package of that name")
    return home


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ValueError(f"cannot listen on --host {host} --port {port}: {error.strerror}") from error


def _dialled(host: str) -> str:
    if host in _EVERY_ADDRESS:
        return "[::1]" if ":" in host else "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _set_status(home: Path, status: str) -> None:
    """For health checks: ``waiting`` or ``connected``."""
    (home / "status").write_text(status + "\n")


def _say(text: str) -> None:
    print(f"bouquet: {text}", flush=True)


@contextlib.contextmanager
def _until_stopped() -> Iterator[None]:
    """Ctrl-C, SIGTERM and a closed terminal are how a service ends: exit code 0."""
    try:
        yield
    except KeyboardInterrupt:
        _say("stopped")
        raise SystemExit(0) from None
