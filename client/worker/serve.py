"""The worker process: answers one message after the other, and ends when nobody needs it any more."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from client import messages
from client.answer import answer, base_has_changed
from client.call import Call
from client.failures import reason_of
from client.runtime import gpu_is_lost
from client.worker.place import code_sha256, open_log
from client.worker.wire import check_peer, greeting, receive, send

log = logging.getLogger("bouquet.worker")

_LOG_BYTES = 1 << 20
"""Size at which the log is begun anew; the one before is kept."""
_REQUEST_SECONDS = 60.0
"""Longest time without a byte of a request, so that a stopped ClientApp does not block the next."""


@dataclass
class _Patience:
    """How long to stay."""

    idle_seconds: float
    supernode: int | None = None
    """File descriptor of the process that starts the ClientApps: the worker ends with it."""


def run_worker(key: str, log_path: str, idle_seconds: float) -> None:
    """Serve the socket that is standard input, until nobody has called for so long or the SuperNode has ended.

    Args:
        key: ``Place.key``, of which this process is the worker.
        log_path: Its log.
        idle_seconds: Time without a message after which it ends; later messages may bring another.
    """
    _log_to(log_path)
    listener, patience = socket.socket(fileno=0), _Patience(idle_seconds)
    hello = greeting(key, code_sha256())
    log.info("ready")
    for connection in _connections(listener, patience):
        with connection:
            try:
                _serve(connection, hello, patience, listener)
            except (ConnectionError, TimeoutError, PermissionError) as error:
                log.warning("a message was not answered: %s", error)
    log.info("ended: nobody called for %g s, or the SuperNode is gone", patience.idle_seconds)


def _connections(listener: socket.socket, patience: _Patience) -> Iterator[socket.socket]:
    while _somebody_calls(listener, patience):
        yield listener.accept()[0]
    # Nobody finds the socket from here on; those who found it before are served.
    Path(listener.getsockname()).unlink(missing_ok=True)
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            yield listener.accept()[0]


def _somebody_calls(listener: socket.socket, patience: _Patience) -> bool:
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    if patience.supernode is not None:
        poller.register(patience.supernode, select.POLLIN)
    ready = [descriptor for descriptor, _ in poller.poll(1000 * patience.idle_seconds)]
    return listener.fileno() in ready


def _serve(connection: socket.socket, hello: bytes, patience: _Patience, listener: socket.socket) -> None:
    check_peer(connection)
    connection.settimeout(_REQUEST_SECONDS)
    send(connection, hello)
    terms = json.loads(receive(connection))
    call = Call.from_json(receive(connection))
    message = messages.from_bytes(receive(connection))
    connection.settimeout(None)
    patience.idle_seconds = float(terms["idle_seconds"])
    _stay_with(int(terms["supernode"]), patience)
    kind = message.metadata.message_type
    if kind == messages.JOIN and base_has_changed():
        log.info("the base model has changed on disk: a new worker will load it")
        Path(listener.getsockname()).unlink(missing_ok=True)
        os._exit(0)
    log.info("%s of run %s, round %s", kind, message.metadata.run_id, message.metadata.group_id)
    with _ending_with(connection):
        reply = answer(message, call)
    lost = gpu_is_lost()
    if lost:
        log.warning("ending after this reply: the GPU answers this process no more; a new worker will start afresh")
        Path(listener.getsockname()).unlink(missing_ok=True)
    try:
        _send(connection, reply, call, message)
    finally:
        if lost:
            os._exit(1)


def _send(connection: socket.socket, reply: Any, call: Call, message: Any) -> None:
    try:
        send(connection, messages.to_bytes(reply))
    except ValueError as error:
        # It is too long. A ClientApp without a reply would ask a second worker.
        log.warning("the reply was not sent: %s", error)
        sender = messages.Sender(site=call.site, settings_hash="", process="", base_model_loads=0)
        send(connection, messages.to_bytes(messages.encode_failure(sender, reason_of(error), message)))


def _stay_with(supernode: int, patience: _Patience) -> None:
    if patience.supernode is not None:
        os.close(patience.supernode)
        patience.supernode = None
    with contextlib.suppress(OSError):  # gone already, or a kernel without: then only the time counts
        patience.supernode = os.pidfd_open(supernode)


@contextlib.contextmanager
def _ending_with(connection: socket.socket) -> Iterator[None]:
    """While the block works, end this process if the peer hangs up.

    The message was cancelled then, or its SuperNode stopped; without a worker the work would have ended likewise.
    """
    done = os.eventfd(0)
    poller = select.poll()
    poller.register(connection, select.POLLRDHUP)
    poller.register(done, select.POLLIN)

    def watch() -> None:
        if done not in [descriptor for descriptor, _ in poller.poll()]:
            log.warning("ended: the ClientApp hung up while its message was worked on")
            os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        os.eventfd_write(done, 1)
        watcher.join()
        os.close(done)


class _SiteLog(RotatingFileHandler):
    """The site's log, which also takes what libraries print."""

    def _open(self) -> TextIOWrapper:
        descriptor = open_log(Path(self.baseFilename))
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        return os.fdopen(descriptor, "a", encoding="utf-8")


def _log_to(path: str) -> None:
    handler = _SiteLog(path, maxBytes=_LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(name)s %(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    for ours in ("bouquet", "client"):
        logging.getLogger(ours).setLevel(logging.INFO)
