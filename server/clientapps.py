"""Flower's process for a message, started by a fork: its imports (SQLAlchemy, FastAPI, ...) happen once, not each time.

A SuperNode finds ``flwr-clientapp`` by ``PATH``. Here that is a small script which passes its arguments, folder,
environment and standard streams to a process that has imported Flower; that one forks, and the child does what
Flower's command does. If it cannot be reached, the script runs Flower's command itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from client.worker.place import CODE_ROOT, runtime_folder
from client.worker.wire import STARTER, check_peer, receive
from server.pulls import ask_again_soon

POLL_SECONDS = "0.05"
"""Time between Flower's looks for a message that has arrived at the SuperNode; its default is 1."""

_SHELL = """#!/bin/sh
exec {python} -I -S {script} "$@"
"""
_SCRIPT = """
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as connection:
    try:
        connection.connect({socket!r})
        environment = dict(os.environ) | {{{starter!r}: str(os.getppid())}}
        order = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": environment}}
        content = json.dumps(order).encode()
        socket.send_fds(connection, [b"."], [0, 1, 2])
        connection.sendall(len(content).to_bytes(8, "big") + content)
    except OSError:
        os.execv({command!r}, [{command!r}, *sys.argv[1:]])
    connection.recv(1)  # until the process has ended
"""


@contextlib.contextmanager
def fast_clientapps(environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """What to set in a SuperNode's environment so that it starts its ClientApps fast, as long as the block runs.

    Args:
        environment: That of the SuperNode, as it would be otherwise.

    Raises:
        ValueError: If there is no folder that only this user can enter: see ``runtime_folder``.
    """
    folder = Path(tempfile.mkdtemp(prefix="start-", dir=runtime_folder()))
    changes = {
        "PATH": f"{folder}{os.pathsep}{environment.get('PATH', os.defpath)}",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_SECONDS,
    }
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(folder / "socket"))
            listener.listen()
            _write_command(folder)
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", "server.clientapps", str(os.getpid()), str(folder)],
                env={**environment, **changes, "PYTHONPATH": str(CODE_ROOT)}, stdin=listener.fileno(),
            )  # fmt: skip
        try:
            yield changes
        finally:
            process.terminate()
            process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_command(folder: Path) -> None:
    script, command = folder / "start.py", folder / "flwr-clientapp"
    flowers = str(Path(sys.executable).parent / "flwr-clientapp")
    script.write_text(_SCRIPT.format(socket=str(folder / "socket"), command=flowers, starter=STARTER))
    command.write_text(_SHELL.format(python=_quoted(sys.executable), script=_quoted(str(script))))
    command.chmod(0o700)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def main() -> None:
    """Fork a ClientApp for every call on the socket that is standard input; end with whoever started this process."""
    parent = os.pidfd_open(int(sys.argv[1]))
    ask_again_soon()
    from flwr.supernode.cli import flwr_clientapp  # noqa: PLC0415 - what takes the time

    listener = socket.socket(fileno=0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    poller.register(parent, select.POLLIN)
    while parent not in [descriptor for descriptor, _ in poller.poll()]:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        os.close(parent)
        listener.detach()
        _take_over(connection)
        flwr_clientapp()
        sys.exit(0)
    shutil.rmtree(sys.argv[2], ignore_errors=True)


def _take_over(connection: socket.socket) -> None:
    """Become the process that the script would have been; the connection stays open until the end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    check_peer(connection)
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 3)
    order = json.loads(receive(connection))
    for standard, descriptor in enumerate(descriptors):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    os.chdir(order["folder"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = ["flwr-clientapp", *order["words"]]


if __name__ == "__main__":
    main()
