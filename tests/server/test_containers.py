"""docker/compose.yaml as a user starts it: images, certificates, a run, a site that is killed, and the same adapter.

The engine and the two images come first (``make test-containers``); everything started here is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.server.commands import SMALL, bouquet, free_port, summary, superlink, supernode
from tests.server.machines import machines

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(shutil.which("docker") is None, reason="no container engine"),
]

ROOT = Path(__file__).parents[2]
SITES = ("bank", "clinic", "court")
SETTINGS = ("strategy=fc_moe", "partition=files", *SMALL)


def docker(*words, timeout=600, check=True, **variables):
    environment = os.environ | variables
    done = subprocess.run(
        ["docker", *words], env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """The compose file under a project name of its own, with its folder of results."""
    project = f"bouquet-test-{os.getpid()}"
    home = tmp_path_factory.mktemp("containers")
    # Results go to ../outputs of the compose file.
    shutil.copytree(ROOT / "docker", home / "docker")
    (home / "outputs").mkdir()
    variables = {"BOUQUET_USER": f"{os.getuid()}:{os.getgid()}", "BOUQUET_PORT": str(free_port())}
    file = str(home / "docker" / "compose.yaml")

    def compose(*words, **options):
        return docker("compose", "-p", project, "-f", file, *words, **options, **variables)

    try:
        compose("up", "--detach", "--no-build")
        for site in SITES:
            wait_for(lambda site=site: "SuperNode ID:" in logs(project, site))
        yield home, project, compose
    finally:
        compose("--profile", "run", "down", "--volumes", check=False)


def logs(project, service):
    done = docker("logs", f"{project}_{service}_1", check=False)
    if done.returncode != 0:  # Docker's compose joins names with '-', Podman's with '_'
        done = docker("logs", f"{project}-{service}-1", check=False)
    return done.stdout + done.stderr


def wait_for(reached, timeout=600):
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(1)


def launch(compose, output, *words):
    remote = (
        "federation=remote", "federation.superlink=127.0.0.1:8000", "federation.root_certificates=/certs/ca.crt",
        "federation.min_sites=3", f"output=outputs/{output}",
    )  # fmt: skip
    return compose(
        "--profile", "run", "run", "--rm", "-T", "bouquet", "run", *SETTINGS, *remote, *words, timeout=1500, check=False
    )


@pytest.fixture(scope="module")
def adapter(federation):
    home, _, compose = federation
    ran = launch(compose, "first")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return summary(home / "outputs" / "first")["adapter_sha256"]


def test_run_leaves_its_folder_on_the_host(federation, adapter):
    folder = federation[0] / "outputs" / "first"
    assert sorted(summary(folder)["site_loss"]) == sorted(SITES)
    assert (folder / "adapter" / "adapter_config.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_simulation_processes_and_namespaces_give_the_same_adapter(federation, adapter):
    """Wherever the same sites are, the same settings give the same bytes (one type of processor, one thread)."""
    home, _, _ = federation
    written = bouquet("example-data", "data", cwd=home)
    assert written.returncode == 0, written.stderr
    data = {site: home / "data" / f"{site}.jsonl" for site in SITES}
    for path in set((home / "data").iterdir()) - set(data.values()):
        path.unlink()
    simulated = bouquet(
        "run", *SETTINGS, f"data.path={home / 'data'}", "federation.min_sites=3", "output=simulation", cwd=home,
        timeout=900,
    )  # fmt: skip
    over_processes = run_processes(home / "processes", data, f"output={home / 'over-processes'}")
    with machines(home / "machines", data) as running:
        over_links = running.run("server", *SETTINGS, "federation.min_sites=3", f"output={home / 'over-links'}")
    for done in (simulated, over_processes, over_links):
        assert done.returncode == 0, done.stdout + done.stderr
    for name in ("simulation", "over-processes", "over-links"):
        assert summary(home / name)["adapter_sha256"] == adapter, name


def run_processes(home, data, output):
    """As the README starts Flower's own commands."""
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(superlink(home))
        for site, path in data.items():
            config = f'site="{site}" data="{path}" private="{home / site / "private"}"'
            stack.enter_context(supernode(home / site, address, config))
        words = ("federation=remote", f"federation.superlink={address}", "federation.min_sites=3", output)
        return bouquet("run", *SETTINGS, *words, cwd=home, timeout=900)


def test_killed_site_comes_back_and_the_next_run_has_all(federation, adapter):
    home, project, compose = federation
    compose("kill", "clinic")
    compose("up", "--detach", "--no-build", "clinic")
    wait_for(lambda: logs(project, "clinic").count("SuperNode ID:") == 2)
    ran = launch(compose, "second")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert summary(home / "outputs" / "second")["adapter_sha256"] == adapter


def test_containers_run_as_nobody_special_and_hold_their_own_keys_only(federation):
    _, _, compose = federation
    for site in SITES:
        assert compose("exec", "-T", site, "id", "-u").stdout.strip() == "1000"
        listed = compose("exec", "-T", site, "find", "/certs", "-type", "f").stdout.split()
        assert sorted(listed) == ["/certs/ca.crt", "/certs/site.key"]
        assert compose("exec", "-T", site, "ls", "/data").stdout.split() == [f"{site}.jsonl"]
    served = compose("exec", "-T", "server", "find", "/certs", "-name", "*.key").stdout.split()
    assert served == ["/certs/server.key"]


def test_health_checks_of_the_images_succeed(federation):
    _, _, compose = federation
    code = (
        "from pathlib import Path; from server.probe import look_at; look_at('127.0.0.1:8000', Path('/certs/ca.crt'))"
    )
    compose("exec", "-T", "server", "python", "-c", code)
    compose("exec", "-T", "bank", "grep", "-q", "connected", "/state/status")
    stored = json.loads(compose("exec", "-T", "server", "cat", "/state/sites.json").stdout)
    assert sorted(facts["site"] for facts in stored.values()) == sorted(SITES)
