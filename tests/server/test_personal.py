"""A finished run's personal models: exported, loaded without Bouquet, and made for a site that comes later."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import client.assemble
from client.assemble import simulated_site
from client.embedded import embedded_rows
from client.grafting.grafts import load_personal
from client.private import under
from conf.compose import load_config
from server.personal import export_personal, join_run
from server.record import RunFolder
from tests.client.tiny_models import random_tokens
from tests.server.loopback import Loopback, Node, run_server

FLEX = "strategy=flex train.optimizer_state=keep"
ALONE = """
import sys
import torch

sys.modules |= dict.fromkeys(["client", "conf", "server", "strategies"])
sys.path.insert(0, sys.argv[1])
from graft import load_personal

tokens = torch.arange(40, 60)[None]
print(load_personal(sys.argv[1]).generate(input_ids=tokens, max_new_tokens=8, do_sample=False).tolist())
"""
"""What a user of transformers runs who has no Bouquet."""


@pytest.fixture(scope="module")
def flex(honest):
    return honest(FLEX).folder.path


def in_use(run: Path, config, site: str):
    """The site's model, put together by the site itself."""
    site = simulated_site(config, site, run / "private")
    site.adapted.load_adapter(site.adapter_in_use(site.adapted.read_peft(run / "adapter")))
    return site.adapted.model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens()).logits


def test_an_exported_model_computes_what_the_site_measured(honest, flex, tmp_path):
    config = load_config(honest(FLEX).grid.overrides)
    found = {}
    for site in ("bank", "court"):
        export_personal(flex, site, tmp_path / site)
        found[site] = logits(load_personal(tmp_path / site))
        torch.testing.assert_close(found[site], logits(in_use(flex, config, site)), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found["bank"], found["court"])
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    without = logits(PeftModel.from_pretrained(base, tmp_path / "bank").eval())
    assert not torch.allclose(found["bank"], without)
    assert AutoTokenizer.from_pretrained(tmp_path / "bank").pad_token_id is not None


@pytest.mark.slow
def test_an_exported_model_generates_where_there_is_no_bouquet(honest, flex, tmp_path):
    export_personal(flex, "bank", tmp_path / "bank")
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path / "bank")],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    model = in_use(flex, load_config(honest(FLEX).grid.overrides), "bank")
    tokens = torch.arange(40, 60)[None]
    expected = model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False)
    assert json.loads(run.stdout.strip().splitlines()[-1]) == expected.tolist()


@pytest.mark.parametrize("words", ["strategy=fedavg", "strategy=local_only", "strategy=fc_moe model.router=local"])
def test_without_a_graft_the_sites_adapter_is_stock_pefts(honest, tmp_path, words):
    result = honest(words)
    export_personal(result.folder.path, "clinic", tmp_path / "clinic")
    assert not (tmp_path / "clinic/graft.safetensors").exists()
    config = load_config(result.grid.overrides)
    base = AutoModelForCausalLM.from_pretrained(config.model.name)
    theirs = logits(PeftModel.from_pretrained(base, tmp_path / "clinic").eval())
    site = simulated_site(config, "clinic", result.folder.path / "private")
    read = site.adapted.read_peft(result.folder.path / "adapter")
    shared = {name: array for name, array in read.items() if site.method.shares(name) and "gate.weight" not in name}
    site.adapted.load_adapter(site.adapter_in_use(shared))
    torch.testing.assert_close(logits(site.adapted.model.eval()), theirs, atol=1e-5, rtol=1e-4)


def copied(run: Path, folder: Path, **summary: object) -> Path:
    """The parts of a run folder that the server has, with another summary."""
    folder.mkdir()
    for name in ("config.yaml", "adapter"):
        (folder / name).symlink_to(run / name)
    facts = RunFolder(run).summary() | summary
    (folder / "summary.json").write_text(json.dumps(facts))
    return folder


def test_what_cannot_be_exported_is_refused_with_the_reason(honest, flex, tmp_path):
    with pytest.raises(ValueError, match="had no site 'mill'; its sites: bank, clinic, court, workshop"):
        export_personal(flex, "mill", tmp_path / "mill")
    with pytest.raises(ValueError, match=r"private state of site 'bank' is not on this machine .*: export where it is"):
        export_personal(copied(flex, tmp_path / "elsewhere"), "bank", tmp_path / "bank")
    with pytest.raises(ValueError, match="holds no completed run"):
        export_personal(copied(flex, tmp_path / "failed", status="failed"), "bank", tmp_path / "bank")
    with pytest.raises(ValueError, match="its sites mix two models"):
        export_personal(honest("strategy=pfl_moe").folder.path, "bank", tmp_path / "bank")
    assert not (tmp_path / "bank").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="Directory not empty"):
        export_personal(flex, "bank", tmp_path / "full")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", b"rounds: {", "config.yaml: damaged settings"),
        ("summary.json", b'{"status"', "summary.json is damaged"),
        ("adapter/adapter_model.safetensors", b"half", "adapter cannot be read: SafetensorError"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(flex, tmp_path, name, content, message):
    run = tmp_path / "run"
    shutil.copytree(flex, run)
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{run}/{message}"):
        export_personal(run, "bank", tmp_path / "bank")
    assert list(tmp_path.iterdir()) == [run]


def test_a_site_that_was_never_asked_has_nothing_to_export(honest, tmp_path):
    run = honest(f"{FLEX} rounds=1 federation.fraction=0.5").folder.path
    asked = {row["site"] for row in RunFolder(run).rows() if "train_loss" in row and "site" in row}
    (site, *_) = {"bank", "clinic", "court", "workshop"} - asked
    with pytest.raises(ValueError, match=f"site '{site}' trained in no round: it has nothing of its own to export"):
        export_personal(run, site, tmp_path / "never")


def test_a_real_site_exports_at_home_from_a_copy_of_the_run_folder(small, tmp_path):
    words = (
        "strategy=flex partition=files federation=remote federation.superlink=host:1 federation.min_sites=2 worker=off"
    )
    grid = Loopback(f"{small} {words} rounds=1 eval.max_examples=null")
    homes = {}
    for site in ("bank", "court"):
        rows = [row for row in embedded_rows(60, seed=0) if row["domain"] == site]
        (tmp_path / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        homes[site] = tmp_path / f"home of {site}"
        data = str(tmp_path / f"{site}.jsonl")
        grid.connect(Node({"site": site, "data": data, "private": str(homes[site])}))
    result = run_server(grid, tmp_path / "run")
    assert result.error is None
    export_personal(result.folder.path, "bank", tmp_path / "exported", homes["bank"])
    assert load_personal(tmp_path / "exported").generate(input_ids=random_tokens(1), max_new_tokens=2).shape[0] == 1
    with pytest.raises(ValueError, match="private state of site 'bank' is not on this machine"):
        export_personal(result.folder.path, "bank", tmp_path / "again", homes["court"])


@pytest.fixture
def newcomer(tmp_path):
    """A file of a fifth site's."""
    rows = [row for row in embedded_rows(80, seed=7) if row["domain"] == "court"]
    path = tmp_path / "mill.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_new_site_gets_a_graft_beside_the_adapter_as_it_is(honest, flex, newcomer, tmp_path):
    run = copied(flex, tmp_path / "run")
    adapter = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    steps = ["rounds=2", "train.max_steps=10", "eval.max_examples=null"]
    losses = list(join_run(run, "mill", newcomer, steps))
    assert [server_round for server_round, _ in losses] == [0, 1, 2]
    assert losses[-1][1] < losses[0][1]
    assert {path.name: path.read_bytes() for path in (run / "adapter").iterdir()} == adapter
    config = load_config(honest(FLEX).grid.overrides)
    site = replace_data(config, run)
    own = under("own/", site.store.load())
    assert own
    assert all(".graft." in name for name in own)
    assert all(".graft." in name for name in under("optimizer/", site.store.load()))
    export_personal(run, "mill", tmp_path / "mill")
    personal = logits(load_personal(tmp_path / "mill"))
    site.adapted.load_adapter(site.adapter_in_use(site.adapted.read_peft(run / "adapter")))
    torch.testing.assert_close(personal, logits(site.adapted.model.eval()), atol=1e-5, rtol=1e-4)


def replace_data(config, run: Path):
    """The newcomer as a site without data, for what it keeps."""
    site = simulated_site(config, "bank", run / "private")
    site.name, site.store = "mill", replace(site.store, site="mill")
    return site


def stored(run: Path):
    """The newcomer's arrays."""
    with safe_open(run / "private/mill.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_an_interrupted_join_goes_on_where_it_stopped(flex, newcomer, tmp_path, caplog):
    runs = [copied(flex, tmp_path / name) for name in ("whole", "interrupted")]
    whole = list(join_run(runs[0], "mill", newcomer, ["rounds=3"]))
    first = join_run(runs[1], "mill", newcomer, ["rounds=3"])
    assert [next(first), next(first)] == whole[:2]
    first.close()
    export_personal(runs[1], "mill", tmp_path / "too early")
    assert "site 'mill' joined later: this is its model after round 1; if that join was interrupted" in caplog.text
    assert list(join_run(runs[1], "mill", newcomer, ["rounds=3"])) == whole[1:]
    found, expected = map(stored, runs[::-1])
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    export_personal(runs[1], "mill", tmp_path / "mill")
    assert "its model after round 3" in caplog.text
    with pytest.raises(ValueError, match="site 'mill' has joined .* in 3 rounds already: .* or more rounds"):
        next(join_run(runs[1], "mill", newcomer, ["rounds=3"]))


@pytest.mark.parametrize(
    "override",
    ["method.graft.rank=2", "method.graft.start=paper", "method=sft", "model=smollm2_moe", "model.experts=lora",
     "lora.alpha=4", "seed=1"],
)  # fmt: skip
def test_what_the_adapter_depends_on_cannot_be_overridden(flex, newcomer, override):
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=f"{override}: {key} must stay what it is in .*, whose adapter and grafts"):
        next(join_run(flex, "mill", newcomer, [override]))


def test_other_settings_can(flex, newcomer, tmp_path):
    words = "train.max_steps=2 rounds=1 data.max_length=96 eval.max_examples=3 device=cpu worker=off"
    run = copied(flex, tmp_path / "run")
    steps = [*words.split(), "method.graft.calibration_examples=4", "model.wheel_dir=/wheels"]
    assert [server_round for server_round, _ in join_run(run, "mill", newcomer, steps)] == [0, 1]


@pytest.mark.parametrize("sees_cuda", [False, True])
def test_a_run_of_a_gpu_is_exported_and_joined_with_what_is_here(flex, newcomer, tmp_path, monkeypatch, sees_cuda):
    """Where there is a GPU these commands have all of it; here it computes on the CPU."""
    run = copied(flex, tmp_path / "run")
    saved = (flex / "config.yaml").read_text()
    assert saved.count("device: cpu") == saved.count("gpus_per_site: null") == 1
    (run / "config.yaml").unlink()
    (run / "config.yaml").write_text(
        saved.replace("device: cpu", "device: cuda").replace("gpus_per_site: null", "gpus_per_site: 0.25")
    )
    devices, shares, made = set(), [], client.assemble.adapted_model

    def on_cpu(model, lora, device, graft):
        devices.add(device.type)
        return made(model, lora, torch.device("cpu"), graft)

    monkeypatch.setattr(client.assemble, "adapted_model", on_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees_cuda)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    list(join_run(run, "mill", newcomer, ["rounds=1"]))
    export_personal(run, "mill", tmp_path / "mill")
    assert devices == {"cuda" if sees_cuda else "cpu"}
    assert shares == []


def test_who_cannot_join_is_refused(honest, flex, newcomer, tmp_path):
    with pytest.raises(ValueError, match="site 'bank' has a part in .* already: choose another name"):
        next(join_run(flex, "bank", newcomer, []))
    with pytest.raises(ValueError, match="ran method=sft, whose sites have nothing of their own to train"):
        next(join_run(honest("strategy=fedavg").folder.path, "mill", newcomer, []))
    assert not (flex / "private/mill.safetensors").exists()
