"""A federation of three machines: what one may not do to the others, and a link that is cut for a while."""

from __future__ import annotations

import os
import time

import pytest

from tests.server.commands import SMALL, bouquet, rows, service, summary, write_site_files
from tests.server.machines import address, ip, machines

pytestmark = [
    pytest.mark.namespaces,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

SITES = ("bank", "clinic")
SETTINGS = ("strategy=fc_moe", "partition=files", *SMALL)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    home = tmp_path_factory.mktemp("namespaces")
    data = write_site_files(home / "data")
    for site in data.keys() - set(SITES):
        data.pop(site).unlink()
    with machines(home, data) as running:
        yield running


def test_adapter_is_that_of_a_simulation_of_the_same_files(federation):
    home = federation.home
    ran = federation.run("server", *SETTINGS, "federation.min_sites=2", "output=remote")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    simulated = bouquet("run", *SETTINGS, f"data.path={home / 'data'}", "output=simulated", cwd=home, timeout=600)
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    assert summary(home / "remote")["adapter_sha256"] == summary(home / "simulated")["adapter_sha256"]


def test_a_sites_machine_can_neither_start_runs_nor_register_keys(federation):
    """With Flower alone both would work: its keys guard one of the three interfaces on the port."""
    ran = federation.run("bank", *SETTINGS, "output=stolen")
    assert ran.returncode == 1
    assert "takes orders from its own machine only" in " ".join(ran.stderr.split())
    federation.server.wait_for(f"refused /v1/control/start-run from {address(SITES.index('bank'))}")


def test_site_whose_link_was_down_for_a_while_takes_part_again(federation):
    words = ("rounds=60", "federation.min_sites=1", "federation.round_timeout_seconds=600", "output=cut")
    server = federation.namespaces["server"]
    cable = ("-n", server, "link", "set", "clinic")
    with service(federation.home / "launch", "run", *SETTINGS, *federation.settings, *words, netns=server) as launcher:
        folder = federation.home / "launch" / "cut"
        before = wait_for_round(launcher, folder, after=0, num_sites=2)
        ip(*cable, "down")
        # Flower misses the site after a minute; its round ends without it.
        without = wait_for_round(launcher, folder, after=before, num_sites=1)
        ip(*cable, "up")
        wait_for_round(launcher, folder, after=without, num_sites=2)
        assert federation.sites["clinic"].process.poll() is None


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
