"""When a worker ends, and what it says when a reply is too long: on real sockets."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import EncodeError

from client import messages
from client.call import Call
from client.messages import (
    TRAIN,
    Request,
    Sender,
    decode_update,
    encode_request,
    encode_update,
    from_bytes,
    to_bytes,
)
from client.worker import serve, wire
from client.worker.serve import _connections, _Patience, _stay_with
from client.worker.wire import receive, send
from strategies.base import ClientUpdate

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


UPDATE = ClientUpdate(
    site="ward", adapter={"q.lora_A": np.ones((100, 100), np.float32)}, num_examples=1, expert_tokens={}, metrics={}
)


@pytest.fixture
def answered(listener, monkeypatch):
    """Has a worker train in the name of a ClientApp, whose site answers UPDATE, and decodes what that is sent."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    sender = Sender(site="ward", settings_hash="abc", process="host:1", base_model_loads=1)
    monkeypatch.setattr(serve, "answer", lambda message, call: encode_update(sender, UPDATE, message))
    request = encode_request(TRAIN, 1, Request(run="1", server_round=1, settings_hash="abc"))
    call = Call(node_id=1, node_config={"site": "ward"}, overrides="")

    def work(connection):
        with connection:
            serve._serve(connection, b"hello", _Patience(LONG), listener)

    def exchange():
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        working = threading.Thread(target=work, args=(theirs,))
        working.start()
        with ours:
            assert receive(ours) == b"hello"
            for frame in (b'{"idle_seconds": 1, "supernode": 0}', call.to_json(), to_bytes(request)):
                send(ours, frame)
            reply = receive(ours)
        working.join()
        return decode_update(from_bytes(reply))

    return exchange


def test_message_is_answered(answered):
    np.testing.assert_array_equal(answered()[1].adapter["q.lora_A"], UPDATE.adapter["q.lora_A"])


def test_reply_that_is_longer_than_a_frame_is_answered_with_what_to_set(answered, monkeypatch):
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 20_000)
    with pytest.raises(ValueError, match=r"^a message of 4\d+ bytes, but a worker takes 20000: set worker=off$"):
        answered()


def test_reply_that_protobuf_cannot_hold_is_answered_with_what_to_set(answered, monkeypatch):
    def to_proto(message):
        if messages.payload_bytes(message) > 20_000:
            raise EncodeError("Failed to serialize proto")
        return message_to_proto(message)

    monkeypatch.setattr(messages, "message_to_proto", to_proto)
    with pytest.raises(ValueError, match=r"^a message with 4\d+ bytes of arrays is too long .*: set worker=off$"):
        answered()


def test_it_stays_without_a_supernode_it_could_watch(listener):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    patience = _Patience(0.0)
    _stay_with(gone.pid, patience)
    assert patience.supernode is None
    assert list(_connections(listener, patience)) == []
