"""Looks at a SuperLink from a site's side before Flower does, and says what is wrong in words."""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from server.certificates import load_certificate

PATIENCE_SECONDS = 10.0
GATE_HEADER = "bouquet-gate"
"""Header of the gate's answer to a health check."""
CLOCK_AHEAD_SECONDS, CLOCK_BEHIND_SECONDS = 5.0, 300.0
"""How far Flower lets a site's signed clock differ from the server's."""

_WRONG_HOST = (62, 64)
_EXPIRED, _NOT_YET_VALID = 10, 9
_MEETS_PLAIN_HTTP = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "HTTP_REQUEST")


@dataclass(frozen=True)
class Seen:
    """A SuperLink that answered."""

    expires: float | None
    """End of its certificate, seconds since the epoch; None over plain HTTP."""
    clock_ahead_seconds: float
    """This machine's clock minus the server's, to about a second."""
    gated: bool
    """Whether it stands behind our gate."""


class UnreachableError(RuntimeError):
    """No SuperLink answers there now; one may later."""


def split_address(address: str, setting: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ValueError: Naming ``setting``, if ``address`` is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"{setting} must be HOST:PORT, got {address!r}")
    return host.strip("[]"), int(port)


def look_at(address: str, root_certificates: Path | None) -> Seen:
    """Connect to a SuperLink, check its certificate as Flower will, and ask for its health.

    Args:
        address: HOST:PORT.
        root_certificates: PEM file of the authority; None: plain HTTP.

    Raises:
        UnreachableError: If nothing answers, or what does is starting, stopping or a way there that is cut.
        ValueError: If what answers cannot be used; names what to change.
    """
    host, port = split_address(address, "--superlink")
    context = None if root_certificates is None else _context(root_certificates)
    try:
        with socket.create_connection((host, port), timeout=PATIENCE_SECONDS) as raw:
            if context is None:
                return _health(address, raw)
            with context.wrap_socket(raw, server_hostname=host) as secured:
                return _health(address, secured)
    except ssl.SSLCertVerificationError as error:
        raise ValueError(_distrust(address, host, root_certificates, error)) from error
    except ssl.SSLEOFError as error:
        raise UnreachableError(f"{address} closed the connection within the TLS handshake") from error
    except ssl.SSLError as error:
        if any(word in (error.reason or "") for word in _MEETS_PLAIN_HTTP):
            raise ValueError(
                f"{address} speaks plain HTTP, not TLS: start it with bouquet server up --certificates DIR"
            ) from error
        raise ValueError(f"{address}: TLS failed: {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        foreign = isinstance(error, (ConnectionResetError, http.client.HTTPException))
        if context is None and foreign and _speaks_tls(host, port):
            raise ValueError(f"{address} speaks TLS, not plain HTTP: add --root-certificates ca.crt") from error
        raise UnreachableError(f"nothing answers at {address}: {error}") from error


def check_clock(seen: Seen, address: str) -> None:
    """Raise ``ValueError`` if this clock differs so much that the server would refuse a site's signature."""
    ahead = seen.clock_ahead_seconds
    if ahead > CLOCK_AHEAD_SECONDS + 1 or ahead < -CLOCK_BEHIND_SECONDS:
        raise ValueError(
            f"this clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {address}; Flower takes "
            f"signatures from {CLOCK_AHEAD_SECONDS:.0f} s ahead to {CLOCK_BEHIND_SECONDS:.0f} s behind: set the clock "
            "(timedatectl set-ntp true)"
        )


def _context(root_certificates: Path) -> ssl.SSLContext:
    if not root_certificates.is_file():
        raise ValueError(f"--root-certificates {root_certificates} is not a file: the federation's ca.crt")
    load_certificate(root_certificates)
    return ssl.create_default_context(cafile=str(root_certificates))


def _health(address: str, connection: socket.socket) -> Seen:
    connection.settimeout(PATIENCE_SECONDS)
    connection.sendall(f"GET /health HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
    response = http.client.HTTPResponse(connection)
    response.begin()
    if response.status >= 500:
        raise UnreachableError(f"{address} answers GET /health with status {response.status}")
    if response.status != 200:
        raise ValueError(f"{address} answers, but is no SuperLink: GET /health gave status {response.status}")
    told = email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp() if response.headers["Date"] else None
    certificate = connection.getpeercert() if isinstance(connection, ssl.SSLSocket) else None
    return Seen(
        expires=ssl.cert_time_to_seconds(str(certificate["notAfter"])) if certificate else None,
        clock_ahead_seconds=0.0 if told is None else time.time() - told,
        gated=GATE_HEADER in response.headers,
    )


def _speaks_tls(host: str, port: int) -> bool:
    """Whether a handshake succeeds there, with any certificate: servers hang up on plain HTTP without a word."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=PATIENCE_SECONDS) as raw:
        trusting.wrap_socket(raw).close()
        return True
    return False


def _distrust(address: str, host: str, authority: Path | None, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _WRONG_HOST:
        return (
            f"the certificate of {address} is not made out to {host!r}: on the server, bouquet certs DIR --host {host} "
            "(with the other names it needs), then restart it"
        )
    if error.verify_code == _EXPIRED:
        return f"the certificate of {address} has expired: on the server, bouquet certs DIR, then restart it"
    if error.verify_code == _NOT_YET_VALID:
        return f"the certificate of {address} is not valid yet by this machine's clock: set the clock"
    return (
        f"the certificate of {address} was not issued by the authority in --root-certificates {authority} "
        f"({error.verify_message}): get ca.crt of this federation from the server's operator"
    )
