"""Flower's command line, driven: a private SuperLink for simulations, runs submitted, logs followed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

CHECKOUT = Path(__file__).resolve().parents[1]
"""What Flower bundles and sends to the sites lies here."""
_BUNDLED = ("pyproject.toml", "README.md", "LICENSE", "strategies", "conf", "client", "server")
MARK = "BOUQUET_LAUNCH"
"""Environment variable that all processes of one launch inherit, so that none is left behind."""
_STARTED = re.compile(r"Successfully started run (\d+)")
_START_SECONDS = 60
_LONGEST_TMPDIR = 18
"""Bytes: of the 107 of a socket's path, Ray's names, a process number of seven digits and ours take 89."""


@dataclass(frozen=True)
class Connection:
    """A SuperLink, and the environment in which Flower's commands find it."""

    environment: Mapping[str, str]

    def command(self, *words: str) -> list[str]:
        """``flwr ...`` of this Python environment."""
        return [str(binary("flwr")), *words]

    def run(self, overrides: str, federation: Mapping[str, float], *, dry_run: bool = False) -> subprocess.Popen[str]:
        """Submit a run and follow its log: lines come on standard output until the run ends.

        With ``dry_run`` the sites join, and there are no rounds.
        """
        home = Path(self.environment["FLWR_HOME"])
        run_config = home / f"run-{uuid.uuid4().hex}.toml"
        # TOML knows no halves of a character, which JSON's escapes are beyond the first 65,536.
        quoted = json.dumps(overrides, ensure_ascii=False)
        run_config.write_text(f"overrides = {quoted}\ndry-run = {json.dumps(dry_run)}\n", encoding="utf-8")
        words = ["run", str(_staged(home / "app")), "bouquet", "--stream", "--run-config", str(run_config)]
        if federation:
            words += ["--federation-config", " ".join(f"{key}={value}" for key, value in federation.items())]
        return self._follow(words)

    def log(self, run_id: str) -> subprocess.Popen[str]:
        """Follow the log of a run from its beginning."""
        return self._follow(["log", run_id, "bouquet", "--stream"])

    def stop(self, run_id: str) -> None:
        """Ask the SuperLink to end a run; a run that has ended is left alone, and an answer not waited for long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(  # noqa: S603
                self.command("stop", run_id, "bouquet"),
                env=dict(self.environment),
                capture_output=True,
                timeout=60,
                check=False,
            )

    def _follow(self, words: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(  # noqa: S603
            self.command(*words),
            env=dict(self.environment),
            cwd=self.environment["FLWR_HOME"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            start_new_session=True,  # Ctrl-C is ours to handle, in order
        )


def run_id_of(line: str) -> str | None:
    """The run id in Flower's line that says a run was started."""
    match = _STARTED.search(line)
    return match.group(1) if match else None


@contextlib.contextmanager
def local_superlink(num_threads: int) -> Iterator[Connection]:
    """A SuperLink of our own for simulations: private port, home and temporary files; all of it is gone afterwards.

    Raises:
        RuntimeError: If it does not come up.
    """
    home, port = _temporary_home(), free_port()
    # An empty folder: a package named `client` or `server` where the SuperLink starts would shadow ours in Ray.
    empty, log_path = home / "empty", home / "superlink.log"
    words = ["--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1", "--port", str(port)]
    with marked(home) as mark:
        variables = environment(home, num_threads) | {MARK: mark, "RAY_TMPDIR": str(home / "ray")}
        for folder in (empty, home / "ray"):
            folder.mkdir()
        _write_connection(home, f"127.0.0.1:{port}", None)
        with log_path.open("w") as log:
            process = subprocess.Popen(  # noqa: S603
                [str(binary("flower-superlink")), *words],
                env=variables, cwd=empty, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        _wait_until_healthy(process, port, log_path)
        yield Connection(variables)


def _temporary_home() -> Path:
    """A new folder; in /tmp where the name of the user's temporary folder is too long for Ray's sockets."""
    usual = tempfile.gettempdir()
    is_short = len(os.fsencode(usual)) <= _LONGEST_TMPDIR
    return Path(tempfile.mkdtemp(prefix="bouquet-", dir=usual if is_short else "/tmp"))  # noqa: S108


@contextlib.contextmanager
def remote_superlink(address: str, root_certificates: str | None) -> Iterator[Connection]:
    """A connection to somebody's SuperLink; nothing is started.

    Raises:
        ValueError: If the certificate file does not exist.
    """
    if root_certificates is not None and not Path(root_certificates).expanduser().is_file():
        raise ValueError(f"federation.root_certificates={root_certificates} is not a file")
    home = Path(tempfile.mkdtemp(prefix="bouquet-"))
    with marked(home) as mark:
        certificates = str(Path(root_certificates).expanduser().resolve()) if root_certificates else None
        _write_connection(home, address, certificates)
        yield Connection(environment(home, 1) | {MARK: mark})


@contextlib.contextmanager
def marked(folder: Path | None = None) -> Iterator[str]:
    """A mark for processes: afterwards, and if this process is killed, they are gone, and so is ``folder``."""
    mark = uuid.uuid4().hex
    words = [sys.executable, "-P", "-m", "server.watcher", mark, *([str(folder)] if folder else [])]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as watcher:  # noqa: S603
        try:
            yield mark
        finally:
            end_marked(mark)
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            watcher.kill()


def end_marked(mark: str) -> None:
    """End every process whose environment carries ``mark``, politely first, whoever its parent is now."""
    alive: set[psutil.Process] = set()
    for end, patience_seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        alive |= _marked(mark)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.send_signal(end)
        alive = set(psutil.wait_procs(alive, timeout=patience_seconds)[1])


def _marked(mark: str) -> set[psutil.Process]:
    """Processes that carry ``mark``, and their descendants: Ray's daemons overwrite their own environment."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found |= {process, *process.children(recursive=True)}
    return found


def environment(home: Path, num_threads: int) -> dict[str, str]:
    """Environment of every Flower process that is ours: its home, its threads, nothing installed, nothing reported."""
    binaries = str(Path(sys.executable).parent)
    return dict(os.environ) | {
        "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(num_threads),
        "TYPER_USE_RICH": "0",  # plain error texts instead of boxes
    }


def _staged(folder: Path) -> Path:
    """A folder with what is bundled and nothing else: Flower walks all of it, virtual environments included."""
    if not folder.exists():
        folder.mkdir()
        for name in _BUNDLED:
            source = CHECKOUT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
    return folder


def _write_connection(home: Path, address: str, root_certificates: str | None) -> None:
    security = f"root-certificates = {json.dumps(root_certificates)}" if root_certificates else "insecure = true"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bouquet"\n\n[superlink.bouquet]\naddress = {json.dumps(address)}\n{security}\n'
    )


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log_path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2),
        ):
            return
        time.sleep(0.1)
    end = "\n".join(log_path.read_text().splitlines()[-15:])
    raise RuntimeError(f"the local SuperLink did not start within {_START_SECONDS} s:\n{end}")


def free_port() -> int:
    """A TCP port that nothing listens on now, on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def binary(name: str) -> Path:
    """A command of this Python environment.

    Raises:
        RuntimeError: If it is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise RuntimeError(f"{path} is missing: install Bouquet's requirements into this environment")
    return path
