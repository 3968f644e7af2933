"""Flower's SuperLink behind a gate: the network reaches what sites need, everything else is for this machine.

A SuperLink serves three interfaces on one port. Flower 1.41 authenticates sites on one of them (``/v1/fleet/``); who
reaches the port may start runs (code on every site), register keys and take tasks through the other two. Here these
are open to local connections only. ``python -m server.gate`` takes the arguments of ``flower-superlink``.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import ssl
import sys
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.superlink import extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.certificates import fingerprint
from server.probe import GATE_HEADER
from server.register import registered_sites

_ACTIVATE = "/v1/fleet/activate-node"
_REFUSED = (
    "this SuperLink takes orders from its own machine only: run bouquet there, or through a tunnel "
    "(ssh -L 8000:127.0.0.1:8000 SERVER, then federation.superlink=127.0.0.1:8000)"
)

log = logging.getLogger("bouquet.gate")


class Gate:
    """ASGI middleware that lets remote connections reach the sites' interface and the health check only."""

    def __init__(self, app: ASGIApp) -> None:
        """Stand before ``app``."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse one connection."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif not _is_open(scope) and not is_local(scope):
            log.warning("refused %s from %s: not from this machine", scope["path"], _peer(scope))
            await JSONResponse({"detail": _REFUSED}, status_code=403)(scope, receive, send)
        elif scope["path"] == "/health":
            await Response(headers={GATE_HEADER: "shut"})(scope, receive, send)
        elif scope["path"] == _ACTIVATE:
            await self.app(scope, receive, _telling(scope, send))
        else:
            await self.app(scope, receive, send)


def is_local(scope: Scope) -> bool:
    """Whether a connection comes from this machine: over loopback, or from the address it goes to."""
    client, server = scope.get("client"), scope.get("server")
    if client is None:
        return False
    peer = str(client[0])
    return bool(ipaddress.ip_address(peer).is_loopback or (server and peer == server[0]))


class TellingSSLObject(ssl.SSLObject):
    """A server's TLS connection that says why a handshake failed; Python would be silent about it."""

    def do_handshake(self) -> None:
        """Shake hands, in as many calls as it takes."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError as error:
            log.warning("a connection was refused: %s", handshake_failure(error.reason or ""))
            raise


def handshake_failure(reason: str) -> str:
    """What the server makes of OpenSSL's reason for a failed handshake."""
    texts = {
        "HTTP_REQUEST": "plain HTTP, this server speaks TLS; the site needs --root-certificates ca.crt and its --key",
        "UNKNOWN_CA": "the client does not trust this server's authority; the site needs this federation's ca.crt",
        "CERTIFICATE_EXPIRED": "the client says server.crt has expired; run bouquet certs again and restart",
        "BAD_CERTIFICATE": "the client says server.crt is not made out to the address it dialled; bouquet certs --host",
        "CERTIFICATE_UNKNOWN": "the client does not accept server.crt; bouquet doctor there says why",
    }
    return next((text for name, text in texts.items() if name in reason.upper()), f"TLS handshake failed ({reason})")


def _is_open(scope: Scope) -> bool:
    path = str(scope.get("path", ""))
    return scope["type"] == "http" and (path == "/health" or path.startswith("/v1/fleet/"))


def _telling(scope: Scope, send: Send) -> Send:
    """``send`` that logs which key a refused site has come with."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] >= 400:
            log.warning("refused a site at %s: %s", _peer(scope), _reason(message["status"], _key_of(scope)))
        await send(message)

    return sending


def _reason(status: int, key: str) -> str:
    if status == 401:
        return f"its signature is wrong or its clock differs by minutes (key {key})"
    known = [site["site"] for site in registered_sites().values() if site["key"] == key]
    if known:
        return f"{known[0]} is still counted as connected from before; it may come back after a minute"
    return f"key {key} is not registered; if it is a site's, put its public key into sites/ of --certificates"


def _key_of(scope: Scope) -> str:
    headers = dict(scope["headers"])
    try:
        pem = base64.b64decode(headers.get(FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode(), b""), validate=True)
        key = serialization.load_pem_public_key(pem)
    except (binascii.Error, ValueError):
        return "unreadable"
    return fingerprint(key) if isinstance(key, ec.EllipticCurvePublicKey) else "of another kind"


def _peer(scope: Scope) -> str:
    client = scope.get("client")
    return str(client[0]) if client else "an unknown address"


def main() -> None:
    """Run the SuperLink with the gate outermost."""
    log.addHandler(logging.StreamHandler(sys.stdout))
    log.handlers[0].setFormatter(logging.Formatter("bouquet: %(message)s"))
    log.propagate = False
    # Flower's hook for middleware. `bouquet server up` ends a SuperLink whose health check is not answered by the gate.
    gate: Any = lambda: (Middleware(Gate),)  # noqa: E731
    extensions.get_middleware = gate
    ssl.SSLContext.sslobject_class = TellingSSLObject
    flower_superlink()


if __name__ == "__main__":
    main()
