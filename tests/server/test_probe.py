"""What a site makes of those that answer where a SuperLink should: which are waited for, and which are wrong."""

from __future__ import annotations

import socket
import ssl
import struct

import pytest

from server.certificates import make_certificates
from server.probe import UnreachableError, look_at
from tests.server.listeners import answering, hang_up

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe") / "certs"
    make_certificates(folder, ["127.0.0.1"], [], valid_seconds=3600)
    return folder


def reset(connection):
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def busy(connection):
    connection.recv(1000)
    connection.sendall(BUSY)


def secured(certs, answer):
    """``answer`` over TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certs / "server" / "server.crt", certs / "server" / "server.key")

    def answer_secured(connection):
        with context.wrap_socket(connection, server_side=True) as encrypted:
            answer(encrypted)

    return answer_secured


@pytest.mark.parametrize("answer", [hang_up, reset])
@pytest.mark.parametrize("tls", [True, False])
def test_closed_and_reset_connections_are_waited_for(certs, answer, tls):
    with answering(answer) as address, pytest.raises(UnreachableError, match=address):
        look_at(address, certs / "ca.crt" if tls else None)


def test_a_busy_server_is_waited_for(certs):
    text = "answers GET /health with status 503"
    with answering(busy) as address, pytest.raises(UnreachableError, match=text):
        look_at(address, None)
    with answering(secured(certs, busy)) as address, pytest.raises(UnreachableError, match=text):
        look_at(address, certs / "ca.crt")


def test_a_connection_closed_after_the_handshake_is_waited_for(certs):
    with answering(secured(certs, hang_up)) as address, pytest.raises(UnreachableError, match=address):
        look_at(address, certs / "ca.crt")


def test_the_wrong_protocol_is_not_waited_for(certs):
    with answering(secured(certs, busy)) as address, pytest.raises(ValueError, match="speaks TLS, not plain HTTP"):
        look_at(address, None)
    with answering(busy) as address, pytest.raises(ValueError, match="speaks plain HTTP, not TLS"):
        look_at(address, certs / "ca.crt")
