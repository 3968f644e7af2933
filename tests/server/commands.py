"""Bouquet and Flower as a user starts them: real processes on loopback, ended for certain."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from client.embedded import DOMAINS, embedded_rows
from server.clientapps import fast_clientapps
from server.flower import MARK, end_marked

BIN = Path(sys.executable).parent
SMALL = ("data.num_examples=160", "train.max_steps=2", "eval.max_examples=8", "rounds=2", "device=cpu")
"""Settings of a run that takes seconds."""


def bouquet(
    *words: str, cwd: Path, timeout: float = 240, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """``bouquet ...`` to its end."""
    return subprocess.run(
        [*prefix, str(BIN / "bouquet"), *words], cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
    )


def run_folder(output: str) -> Path:
    """The last line that ``bouquet run`` printed."""
    return Path(output.strip().splitlines()[-1])


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["type"] == kind]


def write_site_files(folder: Path, num_examples: int = 160) -> dict[str, Path]:
    """One jsonl file for each domain of the embedded data: site -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    embedded = embedded_rows(num_examples, seed=0)
    files = {}
    for domain in DOMAINS:
        files[domain] = folder / f"{domain}.jsonl"
        lines = [json.dumps(row) for row in embedded if row["domain"] == domain]
        files[domain].write_text("\n".join(lines) + "\n")
    return files


def leftovers(environment: Mapping[str, str] | None = None) -> list[str]:
    """Command lines of Flower's, Ray's and workers' processes that run now, of anybody on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if any(
            word in line
            for word in ("flower-superlink", "flwr-simulation", "ray::", "raylet", "gcs_server", "client.worker")
        ):
            found.append(line[:120])
    return found


@contextlib.contextmanager
def superlink(home: Path) -> Iterator[str]:
    """A SuperLink for separate processes, as the README starts it; yields HOST:PORT."""
    home.mkdir(parents=True, exist_ok=True)
    mark, port = uuid.uuid4().hex, free_port()
    words = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
    with _started(words, home, _environment(home, mark)), _ended(mark):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            time.sleep(0.2)
        else:
            raise AssertionError((home / "flower-superlink.log").read_text())
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def supernode(home: Path, address: str, node_config: str, fast: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """A SuperNode, by default as ``bouquet site up`` runs it, else as Flower does; yields its process."""
    home.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    environment = _environment(home, mark)
    start = fast_clientapps(environment) if fast else contextlib.nullcontext({})
    words = ["python", "-P", "-m", "server.supernode"] if fast else ["flower-supernode"]
    words += ["--insecure", "--superlink", address, "--port", str(free_port()), "--node-config", node_config]
    with start as changes, _started(words, home, {**environment, **changes}) as process, _ended(mark):
        yield process


class Service:
    """A running ``bouquet server up`` or ``bouquet site up``, and what it prints."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def printed(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, times: int = 1, timeout: float = 120) -> None:
        """Return when ``text`` has been printed so often."""
        deadline = time.monotonic() + timeout
        while self.printed().count(text) < times:
            if time.monotonic() > deadline or (self.process.poll() is not None and self.printed().count(text) < times):
                raise AssertionError(f"{text!r} was not printed {times} times:\n{self.printed()}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End it and its children as a power cut does."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def service(home: Path, *words: str, netns: str | None = None, program: str = "bouquet") -> Iterator[Service]:
    """``bouquet WORDS`` as a service, in network namespace ``netns`` if one is named; ended with all it started."""
    home.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    # Bouquet's command finds Flower's by itself, wherever PATH leads.
    environment = dict(os.environ) | {MARK: mark} if program == "bouquet" else _environment(home, mark)
    prefix = ["ip", "netns", "exec", netns] if netns else []
    path = home / "service.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [*prefix, str(BIN / program), *words],
            cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield Service(process, path)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        end_marked(mark)


@contextlib.contextmanager
def _started(words: list[str], home: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (home / f"{words[0]}.log").open("wb") as log:
        process = subprocess.Popen(
            [str(BIN / words[0]), *words[1:]],
            cwd=home, env=dict(environment), stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    yield process


def _environment(home: Path, mark: str) -> dict[str, str]:
    return dict(os.environ) | {
        MARK: mark,
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


@contextlib.contextmanager
def _ended(mark: str) -> Iterator[None]:
    try:
        yield
    finally:
        end_marked(mark)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port
