"""Three machines in small: network namespaces for a server and two sites, joined by links that can be cut."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time

import pytest

from server.certificates import make_certificates
from tests.server.commands import SMALL, bouquet, rows, service, summary, write_site_files

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

SERVER = "10.77.0.1"
SITES = {"bank": "10.77.0.2", "clinic": "10.77.0.3"}
SETTINGS = ("strategy=fc_moe", "partition=files", *SMALL)


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network():
    """Namespace of the server, which holds a bridge, and one for each site at the other end of a cable."""
    names = {"server": f"bq{os.getpid()}s"} | {site: f"bq{os.getpid()}{site[0]}" for site in SITES}
    with contextlib.ExitStack() as stack:
        for name in names.values():
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        server = names["server"]
        ip("-n", server, "link", "add", "bridge", "type", "bridge")
        ip("-n", server, "addr", "add", f"{SERVER}/24", "dev", "bridge")
        ip("-n", server, "link", "set", "bridge", "up")
        for site, address in SITES.items():
            ip("-n", server, "link", "add", site, "type", "veth", "peer", "name", "eth0", "netns", names[site])
            ip("-n", server, "link", "set", site, "master", "bridge", "up")
            ip("-n", names[site], "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", names[site], "link", "set", "eth0", "up")
        yield names


@pytest.fixture(scope="module")
def federation(network, tmp_path_factory):
    """A server and two sites, each with the files it was handed and nothing else."""
    home = tmp_path_factory.mktemp("namespaces")
    data = write_site_files(home / "data")
    for site in data.keys() - SITES.keys():
        data[site].unlink()
    certs = home / "certs"
    make_certificates(certs, [SERVER], list(SITES), valid_seconds=86400)
    with contextlib.ExitStack() as stack:
        words = ("server", "up", "--certificates", str(certs / "server"), "--home", str(home / "server" / "home"))
        server = stack.enter_context(service(home / "server", *words, netns=network["server"]))
        server.wait_for("may join", times=2)
        sites = {}
        for site in SITES:
            own = certs / "sites" / site
            words = ["--name", site, "--superlink", f"{SERVER}:8000", "--data", str(data[site])]
            words += ["--root-certificates", str(own / "ca.crt"), "--key", str(own / "site.key")]
            words += ["--home", str(home / site / "home")]
            sites[site] = stack.enter_context(service(home / site, "site", "up", *words, netns=network[site]))
            sites[site].wait_for("SuperNode ID:")
        yield home, server, sites


def remote(home):
    return (
        "federation=remote", f"federation.superlink={SERVER}:8000",
        f"federation.root_certificates={home / 'certs' / 'ca.crt'}",
    )  # fmt: skip


def in_namespace(name, *words, cwd, timeout=600):
    return bouquet(*words, cwd=cwd, timeout=timeout, prefix=("ip", "netns", "exec", name))


def test_adapter_is_that_of_a_simulation_of_the_same_files(federation, network):
    home, _, _ = federation
    ran = in_namespace(
        network["server"], "run", *SETTINGS, *remote(home), "federation.min_sites=2", "output=remote", cwd=home
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    simulated = bouquet("run", *SETTINGS, f"data.path={home / 'data'}", "output=simulated", cwd=home, timeout=600)
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    assert summary(home / "remote")["adapter_sha256"] == summary(home / "simulated")["adapter_sha256"]


def test_a_sites_machine_can_neither_start_runs_nor_register_keys(federation, network):
    """With Flower alone both would work: its keys guard one of the three interfaces on the port."""
    home, server, _ = federation
    ran = in_namespace(network["bank"], "run", *SETTINGS, *remote(home), "output=stolen", cwd=home)
    assert ran.returncode == 1
    assert "takes orders from its own machine only" in " ".join(ran.stderr.split())
    server.wait_for(f"refused /v1/control/start-run from {SITES['bank']}")


def test_site_whose_link_was_down_for_a_while_takes_part_again(federation, network):
    home, _, sites = federation
    words = ("rounds=60", "federation.min_sites=1", "federation.round_timeout_seconds=600", "output=cut")
    cable = ("-n", network["server"], "link", "set", "clinic")
    with service(home / "launch", "run", *SETTINGS, *remote(home), *words, netns=network["server"]) as launcher:
        folder = home / "launch" / "cut"
        before = wait_for_round(launcher, folder, after=0, num_sites=2)
        ip(*cable, "down")
        # Flower misses the site after a minute; its round ends without it.
        without = wait_for_round(launcher, folder, after=before, num_sites=1)
        ip(*cable, "up")
        wait_for_round(launcher, folder, after=without, num_sites=2)
        assert sites["clinic"].process.poll() is None


def wait_for_round(launcher, folder, *, after, num_sites, timeout=900):
    """Number of the first round after ``after`` in which so many sites gave good replies."""
    deadline = time.monotonic() + timeout
    while True:
        done = rows(folder, "round") if (folder / "metrics.jsonl").exists() else []
        for row in done:
            if row["round"] > after and row["num_sites"] == num_sites:
                return row["round"]
        assert launcher.process.poll() is None, launcher.printed()
        assert time.monotonic() < deadline, f"{done[-3:]}\n{launcher.printed()}"
        time.sleep(0.5)
