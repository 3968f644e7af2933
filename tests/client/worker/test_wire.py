"""Frames over a real socket."""

from __future__ import annotations

import os
import socket
import threading

import pytest

from client.worker.wire import MAX_FRAME_BYTES, check_peer, receive, send


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_frames_arrive_whole_and_in_order(pair, size):
    """The longest is more than a socket holds, so it arrives in pieces."""
    content = os.urandom(size)
    sender = threading.Thread(target=lambda: [send(pair[0], frame) for frame in (content, b"next")])
    sender.start()
    assert [receive(pair[1]), receive(pair[1])] == [content, b"next"]
    sender.join()


def test_peer_that_hangs_up_in_a_frame_is_an_error_that_says_how_far_it_came(pair):
    pair[0].sendall((5).to_bytes(8, "big") + b"abc")
    pair[0].close()
    with pytest.raises(ConnectionError, match="hung up after 3 of 5 bytes"):
        receive(pair[1])


def test_announced_length_is_not_believed(pair):
    pair[0].sendall((MAX_FRAME_BYTES + 1).to_bytes(8, "big"))
    with pytest.raises(ConnectionError, match=f"{MAX_FRAME_BYTES + 1} bytes was announced"):
        receive(pair[1])


def test_process_of_the_same_user_is_let_in_and_another_is_not(pair, monkeypatch):
    check_peer(pair[0])
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(PermissionError, match=rf"belongs to user {os.geteuid()}, not {os.geteuid() + 1}"):
        check_peer(pair[0])
