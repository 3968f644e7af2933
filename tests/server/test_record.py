"""The run folder, and that the tagged lines of a log rebuild it bit for bit."""

from __future__ import annotations

import base64
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from server import record
from server.record import RunFolder, RunRecord, adapter_sha256, apply_line, emit, parse_line, to_json


def replay(log, folder):
    """What a launcher far away makes of a log."""
    for line in log.splitlines():
        values = parse_line(line)
        if values is not None:
            apply_line(values, folder)


def files(folder, *left_out):
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(left_out)}


@pytest.fixture
def copy(tmp_path):
    return RunFolder(tmp_path / "copy")


def test_log_rebuilds_the_run_folder_bit_for_bit(fc_moe_run, copy):
    replay(fc_moe_run.log, copy)
    # Simulated sites' private files stay where they were written.
    assert files(copy.path) == files(fc_moe_run.folder.path, "private/")
    assert "diagnostics/rounds.jsonl" in files(copy.path)
    assert "adapter/adapter_model.safetensors" in files(copy.path)


def test_log_with_other_lines_in_between_and_in_front_rebuilds_the_same(fc_moe_run, copy):
    """Flower and Ray write into the same stream, and Flower may put its own words before a line."""
    noisy = "".join(
        f"INFO :      something else\n\x1b[36m(actor)\x1b[0m {line}\n" for line in fc_moe_run.log.splitlines()
    )
    replay(noisy, copy)
    assert files(copy.path) == files(fc_moe_run.folder.path, "private/")


def test_log_read_again_from_its_beginning_changes_nothing(fc_moe_run, copy):
    half = fc_moe_run.log[: len(fc_moe_run.log) // 2]
    replay(half[: half.rindex("\n")], copy)
    replay(fc_moe_run.log, copy)
    assert files(copy.path) == files(fc_moe_run.folder.path, "private/")


def test_large_file_goes_in_pieces_and_comes_back_whole(tmp_path, copy, monkeypatch, capsys):
    monkeypatch.setattr(record, "_CHUNK_BYTES", 7)
    source = RunFolder(tmp_path / "run")
    content = bytes(range(256))
    source.write_bytes("adapter/weights", content)
    source.write_bytes("adapter/empty", b"")
    RunRecord(source).ended({"status": "completed"})
    log = capsys.readouterr().out
    assert log.count('"kind": "file"') == math.ceil(256 / 7) + 1
    replay(log, copy)
    assert (copy.path / "adapter" / "weights").read_bytes() == content
    assert (copy.path / "adapter" / "empty").read_bytes() == b""


def test_adapter_too_large_for_a_log_is_left_at_the_server_and_said_to_be(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "LOGGED_ADAPTER_BYTES", 10)
    source = RunFolder(tmp_path / "run")
    source.write_bytes("adapter/weights", bytes(11))
    RunRecord(source).ended({"status": "completed"})
    log = capsys.readouterr().out
    assert '"kind": "file"' not in log
    assert f"copy it from {source.path / 'adapter'} at the server" in log


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "adapter/../../outside"])
@pytest.mark.parametrize("start", [0, 3])
def test_line_that_names_a_file_outside_the_folder_is_refused(copy, name, start):
    copy.path.mkdir()
    (copy.path.parent / "outside").write_bytes(b"abc")
    line = {"kind": "file", "name": name, "start": start, "base64": base64.b64encode(b"x").decode()}
    with pytest.raises(ValueError, match=r"outside lies outside the run folder$"):
        apply_line(line, copy)
    assert (copy.path.parent / "outside").read_bytes() == b"abc"


def test_link_out_of_the_folder_is_refused(copy):
    copy.path.mkdir()
    (copy.path / "adapter").symlink_to(copy.path.parent)
    with pytest.raises(ValueError, match="lies outside the run folder"):
        copy.write_text("adapter/x", "")


@pytest.mark.parametrize("already", [b"", b"ab", b"abcd"])
def test_missing_piece_of_a_file_is_an_error_that_says_where(copy, already):
    if already:
        copy.write_bytes("adapter/x", already)
    line = {"kind": "file", "name": "adapter/x", "start": 3, "base64": ""}
    with pytest.raises(ValueError, match=rf"^adapter/x: a piece .* missing from the log at byte {len(already)}$"):
        apply_line(line, copy)


@pytest.mark.parametrize("line", ["", "INFO : loss 3", "BOUQUET", "BOUQUET no json", "BOUQUET [1]", 'BOUQUET {"a": 1}'])
def test_line_that_is_not_ours_is_none(line):
    assert parse_line(line) is None


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.none() | st.floats(allow_nan=False)))
def test_line_comes_back_as_it_was_emitted(values):
    sent = {f"_{key}": value for key, value in values.items()}
    line = f"{record.TAG}{to_json({'kind': 'row', **sent})}"
    assert "\n" not in line
    finite = {key: None if value in (math.inf, -math.inf) else value for key, value in sent.items()}
    assert parse_line(line) == {"kind": "row", **finite}


def test_emitted_line_is_one_line(capsys):
    emit("event", {"text": "two\nlines"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert parse_line(out) == {"kind": "event", "text": "two\nlines"}


def test_json_is_strict_whatever_numbers_come():
    values = {"nan": math.nan, "inf": [np.float32("inf")], "array": np.arange(3), "scalar": np.float64(1.5), 3: (1, 2)}
    written = json.loads(to_json(values), parse_constant=pytest.fail)
    assert written == {"nan": None, "inf": [None], "array": [0, 1, 2], "scalar": 1.5, "3": [1, 2]}


def test_nothing_is_written_over_a_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create()
    folder.write_text("config.yaml", "")
    with pytest.raises(ValueError, match=rf"^output={tmp_path} already holds a run: choose another folder"):
        folder.create()


def test_folder_without_a_run_has_neither_rows_nor_summary(copy):
    assert copy.rows() == []
    assert copy.summary() is None


def test_rows_go_to_the_folder_the_log_and_the_logger(tmp_path, capsys):
    logged = []
    kept = RunRecord(RunFolder(tmp_path / "run"))
    kept.log_row = logged.append
    kept.started("seed: 0\n", {"rounds": 1})
    row = {"type": "round", "round": 1, "loss": math.nan}
    kept.row(row)
    kept.diagnostics({"scale": np.ones(2)})
    assert kept.folder.rows() == [{"type": "round", "round": 1, "loss": None}]
    assert logged == [row]
    assert [parse_line(line)["kind"] for line in capsys.readouterr().out.splitlines()] == [
        "config", "started", "row", "diagnostics",
    ]  # fmt: skip
    assert kept.folder.diagnostics() == [{"scale": [1.0, 1.0]}]


def test_diagnostics_too_long_for_a_log_are_kept_at_the_server(tmp_path, monkeypatch, capsys):
    kept = RunRecord(RunFolder(tmp_path))
    monkeypatch.setattr(record, "LOGGED_DIAGNOSTICS_BYTES", 20)
    kept.diagnostics({"short": 1})
    kept.diagnostics({"long": list(range(10))})
    assert [parse_line(line)["kind"] for line in capsys.readouterr().out.splitlines()] == ["diagnostics"]
    assert len(kept.folder.diagnostics()) == 2


@pytest.mark.parametrize("line", ["{", "3", '{"a": 1}}', '{"a": NaN}'])
def test_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"round": 0}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is damaged"):
        RunFolder(tmp_path).rows()


@pytest.mark.parametrize(("end", "is_cut"), [("", False), ('{"round": 1}', False), ('{"rou', True), ("3", True)])
def test_last_line_that_was_cut_off_is_left_out(tmp_path, end, is_cut):
    (tmp_path / "metrics.jsonl").write_text(f'{{"round": 0}}\n{end}')
    rows = [{"round": 0}, {"round": 1}] if end and not is_cut else [{"round": 0}]
    assert RunFolder(tmp_path).lines("metrics.jsonl") == (rows, is_cut)
    assert RunFolder(tmp_path).rows() == rows


ADAPTER = {"b": np.float32([[1, 2]]), "a": np.float32([0.0, -0.0])}


def test_hash_is_over_names_shapes_and_values_and_nothing_else():
    same = adapter_sha256({"a": np.asfortranarray(ADAPTER["a"]), "b": ADAPTER["b"].astype(">f4")})
    assert same == adapter_sha256(ADAPTER)
    others = [
        ADAPTER | {"a": np.float32([0.0, 0.0])},
        ADAPTER | {"b": np.float32([[1], [2]])},
        ADAPTER | {"c": np.float32([])},
        {"b": ADAPTER["b"], "A": ADAPTER["a"]},
        {},
    ]
    assert len({adapter_sha256(other) for other in [ADAPTER, *others]}) == 6


def test_hash_in_the_summary_is_that_of_the_global_adapter(fc_moe_run):
    """PEFT's file holds the same numbers, in PEFT's layout."""
    stored = load_file(fc_moe_run.folder.path / "adapter" / "adapter_model.safetensors")
    assert len(fc_moe_run.summary["adapter_sha256"]) == 64
    assert sum(array.nbytes for array in stored.values()) > 0
