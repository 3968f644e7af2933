"""Which worker serves a message, and in which folder it may be looked for."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

import client.worker.place
from client.node import real_node
from client.worker.place import CODE_ROOT, base_key, place_of, runtime_folder
from conf.model import ExpertTraining, ModelConfig, Precision
from conf.schema import Device

NODE = {"site": "ward", "data": "/data/a.jsonl", "private": "/private"}


@pytest.mark.parametrize(
    "other",
    [{"site": "lab"}, {"data": "/data/b.jsonl"}, {"private": "/elsewhere"}],
)
def test_sites_do_not_share_a_worker(other):
    assert place_of(real_node(NODE), "base").key == place_of(real_node(NODE), "base").key
    assert place_of(real_node(NODE), "base").key != place_of(real_node(NODE | other), "base").key


def test_worker_is_found_again_under_every_setting_but_base_and_device(monkeypatch):
    model = ModelConfig()
    assert base_key(model, Device.cpu) == base_key(replace(model, experts=ExpertTraining.full), Device.cpu)
    for has_gpu, device in ((False, Device.cpu), (True, Device.cuda)):
        monkeypatch.setattr(client.worker.place, "may_have_gpu", lambda has_gpu=has_gpu: has_gpu)
        assert base_key(model, Device.auto) == base_key(model, device)
    assert base_key(model, Device.cpu) != base_key(model, Device.cuda)
    assert base_key(model, Device.cpu) != base_key(replace(model, dtype=Precision.bfloat16), Device.cpu)
    assert base_key(model, Device.cpu) != base_key(replace(model, name="other"), Device.cpu)


@pytest.mark.parametrize(("name", "counts"), [("CUDA_VISIBLE_DEVICES", True), ("BOUQUET_CACHE", True), ("TERM", False)])
def test_worker_of_another_environment_is_another_worker(name, counts, monkeypatch):
    before = place_of(real_node(NODE), "base").key
    monkeypatch.setenv(name, "changed")
    assert (place_of(real_node(NODE), "base").key != before) == counts


def test_changed_code_is_another_worker(tmp_path):
    """A copy of the code, as Flower unpacks each bundle into a folder of its own, then one changed setting in it."""
    for package in ("strategies", "conf", "client"):
        shutil.copytree(
            CODE_ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "bases.json")
        )
    ask = "from client.worker.place import code_sha256; print(code_sha256())"

    def hash_there():
        run = subprocess.run(
            [sys.executable, "-c", ask], cwd=tmp_path, env={}, capture_output=True, text=True, check=True
        )
        return run.stdout

    before = hash_there()
    assert hash_there() == before
    (tmp_path / "conf" / "worker" / "on.yaml").write_text("enabled: true \n")
    assert hash_there() != before


@pytest.fixture
def short(monkeypatch):
    """A folder whose path leaves room for a socket's name, as pytest's own may not."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)


def test_folder_of_sockets_is_the_owners_alone(short):
    assert runtime_folder() == short / "bouquet"
    assert stat.S_IMODE(runtime_folder().stat().st_mode) == 0o700


def test_folder_that_others_can_enter_is_refused_with_the_ways_out(short):
    (short / "bouquet").mkdir(mode=0o755)
    (short / "bouquet").chmod(0o755)
    with pytest.raises(ValueError, match=r"bouquet is drwxr-xr-x of user \d+, but must be .*XDG_RUNTIME_DIR.*worker="):
        runtime_folder()


def test_link_to_a_folder_is_refused(short):
    """Whoever may write to the temporary folder could point it anywhere."""
    (short / "real").mkdir(mode=0o700)
    (short / "bouquet").symlink_to(short / "real")
    with pytest.raises(ValueError, match="bouquet is l.* of user"):
        runtime_folder()


def test_path_too_long_for_a_socket_is_refused_with_both_lengths(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/{'x' * 90}")
    with pytest.raises(ValueError, match=r"path of 125 bytes, the limit is 107: set XDG_RUNTIME_DIR"):
        runtime_folder()
    assert not Path(f"/{'x' * 90}").exists()
