"""Several machines in small: network namespaces for a server and its sites, joined by links that can be cut."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.certificates import make_certificates
from tests.server.commands import Service, bouquet, service

SERVER = "10.77.0.1"


@dataclass(frozen=True)
class Machines:
    """A running server and its sites, each in a network namespace with the files it was handed and nothing else."""

    home: Path
    namespaces: Mapping[str, str]
    """Namespace of "server" and of each site. The server's holds one end of each site's link, called like the site."""
    server: Service
    sites: Mapping[str, Service]

    @property
    def settings(self) -> tuple[str, ...]:
        """How ``bouquet run`` finds the server from its own machine."""
        authority = self.home / "certs" / "ca.crt"
        return (
            "federation=remote", f"federation.superlink={SERVER}:8000", f"federation.root_certificates={authority}",
        )  # fmt: skip

    def run(self, place: str, *words: str) -> subprocess.CompletedProcess[str]:
        """``bouquet run`` in the namespace of ``place``, to its end."""
        prefix = ("ip", "netns", "exec", self.namespaces[place])
        return bouquet("run", *self.settings, *words, cwd=self.home, timeout=600, prefix=prefix)


def address(index: int) -> str:
    """Of the site with this index."""
    return f"10.77.0.{2 + index}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def machines(home: Path, data: Mapping[str, Path]) -> Iterator[Machines]:
    """A server and one site for each of its files, over TLS, with a key each; needs root."""
    certs = home / "certs"
    make_certificates(certs, [SERVER], list(data), valid_seconds=86400)
    with _network(list(data)) as namespaces, contextlib.ExitStack() as stack:
        words = ("server", "up", "--certificates", str(certs / "server"), "--home", str(home / "server" / "home"))
        server = stack.enter_context(service(home / "server", *words, netns=namespaces["server"]))
        server.wait_for("may join", times=len(data))
        sites = {}
        for site, file in data.items():
            own = certs / "sites" / site
            options = ["--name", site, "--superlink", f"{SERVER}:8000", "--data", str(file)]
            options += ["--root-certificates", str(own / "ca.crt"), "--key", str(own / "site.key")]
            options += ["--home", str(home / site / "home")]
            sites[site] = stack.enter_context(service(home / site, "site", "up", *options, netns=namespaces[site]))
        for running in sites.values():
            running.wait_for("SuperNode ID:")
        yield Machines(home, namespaces, server, sites)


@contextlib.contextmanager
def _network(sites: list[str]) -> Iterator[dict[str, str]]:
    """Namespace of the server, which holds a bridge, and one for each site at the other end of a cable."""
    names = {"server": f"bq{os.getpid()}s"} | {site: f"bq{os.getpid()}{index}" for index, site in enumerate(sites)}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        server = names["server"]
        ip("-n", server, "link", "add", "bridge", "type", "bridge")
        ip("-n", server, "addr", "add", f"{SERVER}/24", "dev", "bridge")
        ip("-n", server, "link", "set", "bridge", "up")
        for index, site in enumerate(sites):
            ip("-n", server, "link", "add", site, "type", "veth", "peer", "name", "eth0", "netns", names[site])
            ip("-n", server, "link", "set", site, "master", "bridge", "up")
            ip("-n", names[site], "addr", "add", f"{address(index)}/24", "dev", "eth0")
            ip("-n", names[site], "link", "set", "eth0", "up")
        yield names
