"""When a worker ends: the loop over connections, on a real socket."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from client.worker import serve
from client.worker.serve import _connections, _Patience, _stay_with

LONG = 3600.0


@pytest.fixture
def listener(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for a short path
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        bound.listen()
        yield bound


def call():
    caller = socket.socket(socket.AF_UNIX)
    caller.connect("socket")
    return caller


def test_it_ends_after_so_long_without_a_message_and_leaves_no_socket(listener, tmp_path):
    with call() as first:
        served = []
        for connection in _connections(listener, _Patience(0.05)):
            served.append(connection)
            connection.close()
        assert len(served) == 1
        assert first.recv(1) == b""
    assert not (tmp_path / "socket").exists()


def test_message_that_came_at_the_last_moment_is_served(listener, monkeypatch):
    """It connects after the time was up and before the socket is gone."""
    late = []

    def too_early(_listener, _patience):
        late.append(call())
        return False

    monkeypatch.setattr(serve, "_somebody_calls", too_early)
    served = list(_connections(listener, _Patience(0.0)))
    assert len(served) == len(late) == 1
    for end in served + late:
        end.close()


def test_it_ends_with_its_supernode(listener):
    supernode = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    patience = _Patience(LONG)
    _stay_with(supernode.pid, patience)
    threading.Timer(0.1, supernode.stdin.close).start()
    began = time.monotonic()
    assert list(_connections(listener, patience)) == []
    assert time.monotonic() - began < LONG
    supernode.wait()


def test_it_stays_without_a_supernode_it_could_watch(listener):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    patience = _Patience(0.0)
    _stay_with(gone.pid, patience)
    assert patience.supernode is None
    assert list(_connections(listener, patience)) == []
