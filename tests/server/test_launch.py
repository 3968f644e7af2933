"""The command line up to the moment a run starts, and the commands that need no run."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server.flower
from server.jobs import plan
from server.launch import cli, connect

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("address", ["", "nowhere", "host:port"])
def test_remote_run_needs_an_address(address):
    words = ["federation=remote", *([f"federation.superlink={address}"] if address else [])]
    jobs, _ = plan(words, multirun=False)
    with pytest.raises(ValueError, match=r"needs federation.superlink=HOST:PORT"), connect(jobs[0].config):
        pass


def test_compare_and_fetch_name_the_folder_that_holds_no_run(tmp_path):
    runner = CliRunner()
    assert f"{tmp_path}: no run in it" in str(runner.invoke(cli, ["compare", str(tmp_path)]).exception)
    assert "holds no launch.json" in str(runner.invoke(cli, ["fetch", str(tmp_path)]).exception)


INTERRUPTED_LAST = """
import os, signal, sys
from server.launch import main

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=int(sys.argv.pop())):
        kill(process, number)

late = Late()
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_when_all_is_done_is_not_the_exit_code(tmp_path, number):
    """Python takes a program's own handlers away before it takes away its objects."""
    words = [sys.executable, "-c", INTERRUPTED_LAST, "compare", str(tmp_path), str(int(number))]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 2


def test_export_base_and_merge_give_models_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    runner = CliRunner()
    exported = runner.invoke(cli, ["export-base", str(tmp_path / "base"), "model=tiny_moe"])
    assert exported.exit_code == 0, exported.exception
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.model_type == "olmoe"
    refused = runner.invoke(cli, ["merge", str(tmp_path)])
    assert "holds no adapter" in str(refused.exception)


def test_a_long_temporary_folder_is_not_used_where_sockets_are_made(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert len(str(tmp_path)) > 18
    home = server.flower._temporary_home()
    home.rmdir()
    assert home.parent == Path("/tmp")
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    home = server.flower._temporary_home()
    home.rmdir()
    assert home.parent == Path("/var/tmp")
