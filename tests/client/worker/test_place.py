"""Which worker serves a message, and in which folder it may be looked for."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from client.node import real_node
from client.worker.place import CODE_ROOT, base_key, place_of, runtime_folder
from conf.schema import Device, ExpertTraining, ModelConfig, Precision

NODE = {"site": "ward", "data": "/data/a.jsonl", "private": "/private"}


@pytest.mark.parametrize(
    "other",
    [{"site": "lab"}, {"data": "/data/b.jsonl"}, {"private": "/elsewhere"}],
)
def test_sites_do_not_share_a_worker(other):
    assert place_of(real_node(NODE), "base").key == place_of(real_node(NODE), "base").key
    assert place_of(real_node(NODE), "base").key != place_of(real_node(NODE | other), "base").key


def test_worker_is_found_again_under_every_setting_but_base_and_device():
    model = ModelConfig()
    assert base_key(model, Device.cpu) == base_key(replace(model, experts=ExpertTraining.full), Device.cpu)
    assert base_key(model, Device.cpu) != base_key(model, Device.auto)
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


def test_folder_of_sockets_is_the_owners_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert runtime_folder() == tmp_path / "run" / "bouquet"
    assert stat.S_IMODE(runtime_folder().stat().st_mode) == 0o700


def test_folder_that_others_can_enter_is_refused_with_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "bouquet").mkdir(mode=0o755)
    (tmp_path / "bouquet").chmod(0o755)
    with pytest.raises(ValueError, match=r"bouquet is drwxr-xr-x of user \d+, but must be .*XDG_RUNTIME_DIR.*worker="):
        runtime_folder()


def test_link_to_a_folder_is_refused(tmp_path, monkeypatch):
    """Whoever may write to the temporary folder could point it anywhere."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "bouquet").symlink_to(tmp_path / "real")
    with pytest.raises(ValueError, match="bouquet is l.* of user"):
        runtime_folder()


def test_path_too_long_for_a_socket_is_refused_with_both_lengths(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/{'x' * 90}")
    with pytest.raises(ValueError, match=r"path of 125 bytes, the limit is 107: set XDG_RUNTIME_DIR"):
        runtime_folder()
    assert not Path(f"/{'x' * 90}").exists()
