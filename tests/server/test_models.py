"""The commands that write models and example data: what is there stays."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from server.launch import cli


def test_example_data_overwrites_nothing_of_the_users(tmp_path):
    runner = CliRunner()
    assert runner.invoke(cli, ["example-data", str(tmp_path / "data"), "--num-examples", "40"]).exit_code == 0
    written = {path.name: path.read_text() for path in (tmp_path / "data").iterdir()}
    assert sorted(written) == ["bank.jsonl", "clinic.jsonl", "court.jsonl", "workshop.jsonl"]
    assert runner.invoke(cli, ["example-data", str(tmp_path / "data"), "--num-examples", "40"]).exit_code == 0
    (tmp_path / "data" / "court.jsonl").write_text("mine")
    refused = runner.invoke(cli, ["example-data", str(tmp_path / "data"), "--num-examples", "80"])
    assert "bank.jsonl is there already, with other examples" in str(refused.exception)
    found = {path.name: path.read_text() for path in (tmp_path / "data").iterdir()}
    assert found == written | {"court.jsonl": "mine"}


@pytest.mark.parametrize(
    "words",
    [
        ["example-data"],
        ["export-base"],
        ["pretrain"],
        ["reward", "train", "data.path=x", "data.rejected_column=y"],
    ],
)
def test_a_file_is_no_folder_to_write_into(tmp_path, words):
    (tmp_path / "file").write_text("mine")
    command = words[:2] if words[0] == "reward" else words[:1]
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "file"), *words[len(command) :]])
    assert f"{tmp_path}/file cannot be made a folder: File exists" in str(result.exception)
