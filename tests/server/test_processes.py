"""SuperLink, three SuperNodes and the launcher as separate processes, exactly as the README starts them."""

from __future__ import annotations

import contextlib

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.server.commands import (
    SMALL,
    bouquet,
    rows,
    run_folder,
    summary,
    superlink,
    supernode,
    write_site_files,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(900)]

SETTINGS = ("strategy=fc_moe", "partition=files", *SMALL)


@pytest.fixture(scope="module")
def supernodes():
    """Site -> process of its SuperNode, filled by ``federation``."""
    return {}


@pytest.fixture(scope="module")
def federation(tmp_path_factory, supernodes):
    """Three sites of different data, connected to a SuperLink."""
    home = tmp_path_factory.mktemp("federation")
    files = dict(list(write_site_files(home / "sites").items())[:3])
    (home / "sites" / "workshop.jsonl").unlink()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(superlink(home / "superlink"))
        for site, file in files.items():
            private = home / site / "private"
            node_config = f'site="{site}" data="{file}" private="{private}"'
            supernodes[site] = stack.enter_context(supernode(home / site, address, node_config))
        yield home, address
    lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert [line for line in lines if str(home) in line] == []


@pytest.fixture(scope="module")
def remote_run(federation):
    home, address = federation
    words = ("federation=remote", f"federation.superlink={address}", "federation.min_sites=3", "output=remote")
    return bouquet("run", *SETTINGS, *words, cwd=home, timeout=600)


def test_run_over_processes_completes_and_brings_the_adapter_home(remote_run, federation):
    assert remote_run.returncode == 0, remote_run.stdout + remote_run.stderr
    folder = run_folder(remote_run.stdout)
    assert folder == federation[0] / "remote"
    result = summary(folder)
    assert result["status"] == "completed"
    assert sorted(result["site_loss"]) == ["bank", "clinic", "court"]
    assert {row["round"] for row in rows(folder, "round")} == {1, 2}
    assert len(rows(folder, "site")) == 2 * 3
    assert (folder / "adapter" / "adapter_config.json").exists()
    # Without data of its own the server reports the example-weighted mean over the sites.
    losses = {row["site"]: row for row in rows(folder, "site") if row["round"] == 2}
    assert result["global_loss"] == pytest.approx(np.mean([row["loss"] for row in losses.values()]), rel=0.2)


def worker(home, site):
    """The process that wrote the site's log last."""
    lines = (home / site / "private" / f"{site}.worker.log").read_text().splitlines()
    return psutil.Process(int([line for line in lines if line.endswith("ready")][-1].split()[2]))


def test_each_site_has_one_worker_that_loaded_the_base_once(remote_run, federation):
    """Nine messages to the three sites: join, and two rounds of training and evaluation."""
    loads = summary(federation[0] / "remote")["base_model_loads"]
    assert len(loads) == 1 + 3
    assert set(loads.values()) == {1}
    for site in ("bank", "clinic", "court"):
        log = (federation[0] / site / "private" / f"{site}.worker.log").read_text()
        assert log.count(" ready") == 1
        assert log.count("train of run") == log.count("evaluate of run") == 2


def test_private_state_stays_at_its_site(remote_run, federation):
    home, _ = federation
    run_id = summary(home / "remote")["run_id"]
    for site in ("bank", "clinic", "court"):
        files = list((home / site / "private").rglob("*.safetensors"))
        assert [file.name for file in files] == [f"{site}.safetensors"]
        assert files[0].parent.name == run_id
        assert files[0].stat().st_mode & 0o077 == 0
    assert not list((home / "remote").rglob("private"))


def test_simulation_of_the_same_files_gives_the_same_adapter(remote_run, federation):
    home, _ = federation
    words = (f"data.path={home / 'sites'}", "federation.min_sites=3", "output=simulated")
    simulated = bouquet("run", *SETTINGS, *words, cwd=home)
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    here, there = summary(home / "simulated"), summary(home / "remote")
    assert here["settings_hash"] == there["settings_hash"]
    assert here["adapter_sha256"] == there["adapter_sha256"]
    assert here["site_loss"] == pytest.approx(there["site_loss"])


def test_fetch_rebuilds_the_folder_from_the_log(remote_run, federation):
    folder = federation[0] / "remote"
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    metrics = (folder / "metrics.jsonl").read_text()
    for name in ("metrics.jsonl", "summary.json", "adapter/adapter_model.safetensors"):
        (folder / name).unlink()
    fetched = bouquet("fetch", str(folder), cwd=federation[0])
    assert fetched.returncode == 0, fetched.stdout + fetched.stderr
    assert (folder / "metrics.jsonl").read_text() == metrics
    again = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == again.keys()
    assert all(np.array_equal(adapter[name], again[name]) for name in adapter)


def test_too_few_sites_end_the_run_with_their_number(federation):
    home, address = federation
    words = ("federation=remote", f"federation.superlink={address}", "federation.min_sites=4")
    failed = bouquet(
        "run", *SETTINGS, *words, "federation.join_timeout_seconds=60", "output=too-many", cwd=home, timeout=300
    )
    assert failed.returncode == 1
    assert "3 of 4 needed sites joined (federation.join_timeout_seconds=60)" in failed.stderr
    assert summary(home / "too-many")["status"] == "failed"


def test_workers_stay_between_runs_and_end_with_their_supernode(remote_run, federation, supernodes):
    workers = {site: worker(federation[0], site) for site in supernodes}
    assert all(process.is_running() for process in workers.values())
    supernodes["bank"].terminate()
    supernodes["bank"].wait(60)  # Flower's SuperExec, which starts the ClientApps, stays as long as there is a zombie
    workers["bank"].wait(60)
    assert workers["clinic"].is_running()


def test_no_superlink_there_is_a_clear_error(tmp_path):
    failed = bouquet("run", "federation=remote", "federation.superlink=127.0.0.1:9", *SMALL, cwd=tmp_path)
    assert failed.returncode == 1
    assert "127.0.0.1:9" in failed.stderr
