"""Whole runs over real sites in this process, each with its own file and private folder."""

from __future__ import annotations

import json

import numpy as np
import pytest

from client.embedded import embedded_rows
from client.messages import decode_request
from tests.server.conftest import SITES, measured
from tests.server.loopback import Loopback, Node, run_server, simulation


@pytest.fixture(scope="module")
def site_files(tmp_path_factory):
    """Three sites' files, of 10, 20 and 30 rows."""
    folder = tmp_path_factory.mktemp("sites")
    for number, site in enumerate(SITES[:3], start=1):
        rows = [row for row in embedded_rows(120, seed=0) if row["domain"] == site][: 10 * number]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def remote_run(small, site_files, tmp_path_factory):
    """Three real sites, each with its own file and private folder; the server has held-out data of its own."""
    folder = tmp_path_factory.mktemp("remote")
    grid = Loopback(
        f"{small} strategy=fc_moe partition=files federation=remote federation.superlink=host:1 "
        "federation.min_sites=3 eval.max_examples=null worker=off"
    )
    for site in SITES[:3][::-1]:
        data, private = site_files / f"{site}.jsonl", folder / f"home of {site}"
        grid.connect(Node({"site": site, "data": str(data), "private": str(private)}))
    return run_server(grid, folder / "run")


def test_real_sites_give_the_adapter_of_their_simulation(small, remote_run, site_files, tmp_path):
    assert remote_run.error is None
    words = f"{small} strategy=fc_moe partition=files data.path={site_files} eval.max_examples=null"
    simulated = run_server(simulation(words, 3), tmp_path / "run")
    for key in ("adapter_sha256", "site_loss", "settings_hash", "bytes_up", "bytes_down"):
        assert remote_run.summary[key] == simulated.summary[key], key


def test_without_data_at_the_server_the_global_loss_is_the_example_weighted_mean(remote_run):
    own = [losses[site] for site, losses in measured(remote_run).items()]
    weights = [loss.num_examples for loss in own]
    assert sorted(weights) == [2, 4, 6]
    assert remote_run.summary["global_loss"] == pytest.approx(np.average([loss.loss for loss in own], weights=weights))
    assert remote_run.rounds()[0]["round"] == 1  # nothing could be measured before


def test_real_sites_keep_their_private_state_at_home(remote_run):
    requests = [decode_request(sent.message())[0] for sent in remote_run.grid.sent if not sent.up]
    assert {request.private_root for request in requests} == {""}
    assert not (remote_run.folder.path / "private").exists()
    for site in SITES[:3]:
        home = remote_run.folder.path.parent / f"home of {site}"
        assert [path.name for path in home.rglob("*.safetensors")] == [f"{site}.safetensors"]
        assert not any(str(home).encode() in sent.content for sent in remote_run.grid.sent)


def test_server_with_held_out_data_measures_the_global_loss_itself(small, site_files, remote_run, tmp_path):
    grid = Loopback(f"{remote_run.grid.overrides} eval.path={site_files}/bank.jsonl rounds=1")
    for node in remote_run.grid.nodes.values():
        grid.connect(node)
    result = run_server(grid, tmp_path / "run")
    start, first = result.rounds()
    assert start["global_loss"] > 0
    weights = [losses[site].num_examples for site, losses in measured(result).items()]
    mean = np.average([losses[site].loss for site, losses in measured(result).items()], weights=weights)
    assert first["global_loss"] != pytest.approx(mean)
