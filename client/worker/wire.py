"""How the ClientApp and a worker talk: frames of bytes over a Unix socket, between processes of one user.

An exchange: the worker greets with its key and the hash of its code; the ClientApp sends its terms and the call (JSON)
and the message (Flower's protobuf); the worker sends the reply. Nothing is unpickled.
"""

from __future__ import annotations

import os
import socket
import struct

_LENGTH = struct.Struct(">Q")
_CREDENTIALS = struct.Struct("3i")
MAX_FRAME_BYTES = 1 << 31
"""Protobuf's own limit of a message."""
STARTER = "CLIENTAPP_STARTER"
"""Environment variable of a ClientApp that was forked: process id of what started it in the SuperNode's name."""


def greeting(key: str, code_sha256: str) -> bytes:
    """What a worker says first: which one it is, and what it runs."""
    return f"{key} {code_sha256}".encode()


def send(connection: socket.socket, content: bytes) -> None:
    """Send one frame.

    Raises:
        ValueError: If it is longer than ``MAX_FRAME_BYTES``.
        OSError: If the peer is gone.
    """
    if len(content) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(content)} bytes, but a worker takes {MAX_FRAME_BYTES}: set worker=off")
    connection.sendall(_LENGTH.pack(len(content)))
    connection.sendall(content)


def receive(connection: socket.socket) -> bytes:
    """The next frame.

    Raises:
        ConnectionError: If the peer hung up before its end, or announces more than ``MAX_FRAME_BYTES``.
        OSError: If the connection broke.
    """
    (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
    if length > MAX_FRAME_BYTES:
        raise ConnectionError(f"a frame of {length} bytes was announced, the limit is {MAX_FRAME_BYTES}")
    return bytes(_receive_exactly(connection, length))


def check_peer(connection: socket.socket) -> None:
    """Raise ``PermissionError`` unless the process at the other end belongs to our user: the kernel knows."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user != os.getuid():
        raise PermissionError(f"the other end of the worker's socket belongs to user {user}, not {os.getuid()}")


def _receive_exactly(connection: socket.socket, length: int) -> bytearray:
    content = bytearray(length)
    view, received = memoryview(content), 0
    while received < length:
        count = connection.recv_into(view[received:])
        if count == 0:
            raise ConnectionResetError(f"the other end hung up after {received} of {length} bytes")
        received += count
    return content
