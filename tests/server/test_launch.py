"""The command line up to the moment a run starts, and the commands that need no run."""

from __future__ import annotations

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


def test_export_base_and_merge_give_models_that_transformers_loads(tmp_path):
    from transformers import AutoModelForCausalLM

    runner = CliRunner()
    exported = runner.invoke(cli, ["export-base", str(tmp_path / "base"), "model=tiny_moe"])
    assert exported.exit_code == 0, exported.exception
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").config.model_type == "olmoe"
    refused = runner.invoke(cli, ["merge", str(tmp_path)])
    assert "holds no adapter" in str(refused.exception)


@pytest.mark.parametrize(
    ("content", "reason"), [("{", "JSONDecodeError"), ('{"run_id": "1"}', "KeyError: 'superlink'"), ("[]", "TypeError")]
)
def test_damaged_note_of_a_remote_run_is_named(tmp_path, content, reason):
    (tmp_path / "launch.json").write_text(content)
    result = CliRunner().invoke(cli, ["fetch", str(tmp_path)])
    assert f"{tmp_path}/launch.json is damaged ({reason}" in str(result.exception)


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_output_that_can_be_no_folder_is_refused_before_anything_starts(tmp_path, monkeypatch, output):
    monkeypatch.delattr("server.launch.connect")
    (tmp_path / "file").write_text("mine")
    result = CliRunner().invoke(cli, ["run", f"output={tmp_path / output}"])
    assert f"output={tmp_path / output} cannot be made a folder: " in str(result.exception)


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
