"""The ClientApp's side of the worker: find it or start it, pass a message on, bring the reply back."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from filelock import FileLock

from client.call import Call
from client.failures import WorkerEndedError
from client.node import Node
from client.worker.place import CODE_ROOT, Place, code_sha256, open_log, place_of
from client.worker.wire import STARTER, check_peer, greeting, receive, send

log = logging.getLogger("flwr")  # whose process this is: what it says is shown

_ATTEMPTS = 2
_BACKLOG = 64
_ENDING_SECONDS = 10.0
"""Longest time that a killed process may take to be gone."""
_LOOK_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run wants of the worker."""

    enabled: bool
    """False: the message is answered in this process."""
    idle_seconds: float
    base: str
    """See ``base_key``."""


def ask(node: Node, wanted: Wanted, call: Call, message: bytes) -> bytes:
    """The worker's reply to a message. A worker that ends meanwhile is replaced once.

    A repeated train message starts from the same private state: the store knows what it held before the round.

    Raises:
        WorkerEndedError: If two workers ended before they had answered.
        ValueError: If the folder of the sockets cannot be trusted, or the message is too long.
        PermissionError: If a process of another user answers.
    """
    place = place_of(node, wanted.base)
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            reply = _exchange(place, wanted, call, message)
        except ConnectionError as error:
            log.warning(
                "attempt %d: the worker of site %s ended (%s); its log: %s", attempt, node.site, error, place.log
            )
        else:
            log.info("answered by the worker of site %s; its log: %s", node.site, place.log)
            return reply
    raise WorkerEndedError(
        f"the worker of site {node.site!r} ended {_ATTEMPTS} times before it had answered (details in the site's log)"
    )


def _exchange(place: Place, wanted: Wanted, call: Call, message: bytes) -> bytes:
    with _greeted(place, wanted.idle_seconds) as connection:
        # What starts the process of every message: our parent, unless we were forked elsewhere for it.
        terms = {"idle_seconds": wanted.idle_seconds, "supernode": int(os.environ.get(STARTER, os.getppid()))}
        send(connection, json.dumps(terms).encode())
        send(connection, call.to_json())
        send(connection, message)
        return receive(connection)


def _greeted(place: Place, idle_seconds: float) -> socket.socket:
    """A connection to the worker, which is started if there is none, once it is our turn."""
    deadline = time.monotonic() + _ENDING_SECONDS
    while True:
        connection, is_new = _connected(place, idle_seconds)
        try:
            check_peer(connection)
            if receive(connection) != greeting(place.key, code_sha256()):
                raise PermissionError(f"a worker of other code answers at {place.socket}: end it")
        except OSError as error:
            connection.close()
            # A process that is being killed still takes connections for a moment: that was no attempt.
            if is_new or not isinstance(error, ConnectionError) or time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)
        else:
            return connection


def _connected(place: Place, idle_seconds: float) -> tuple[socket.socket, bool]:
    """A connection, and whether its worker was started for it."""
    connection = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        connection.connect(str(place.socket))
        return connection, False
    # One at a time: whoever comes second finds the socket of the first.
    with FileLock(place.socket.parent / "start.lock"):
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            connection.connect(str(place.socket))
            return connection, False
        _start(place, idle_seconds)
        connection.connect(str(place.socket))
        return connection, True


def _start(place: Place, idle_seconds: float) -> None:
    """Start a worker that takes connections from now on: it inherits a socket that listens already."""
    place.socket.unlink(missing_ok=True)  # of a worker that was killed
    place.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as listener, os.fdopen(open_log(place.log), "ab") as output:
        listener.bind(str(place.socket))
        place.socket.chmod(0o600)
        listener.listen(_BACKLOG)
        search_path = os.pathsep.join([str(CODE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # -P: a folder called `client` where the SuperNode was started must not shadow ours. The process that is
        # waited for only sets the worker free.
        subprocess.run(  # noqa: S603 - no shell
            [sys.executable, "-P", "-m", "client.worker", place.key, str(place.log), str(idle_seconds)],
            env=dict(os.environ) | {"PYTHONPATH": search_path},
            stdin=listener.fileno(), stdout=output, stderr=output, check=True,
        )  # fmt: skip
    log.info("started the worker of this site; its log: %s", place.log)
