"""Run folders as a report reads them: whole, old, cut off, damaged, absent."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from server.launch import cli
from server.record import RunFolder
from server.report import runs
from server.report.page import render
from server.report.runs import natural, read_runs, thinned
from tests.server.report.folders import LAYERS, NASTY, write_run


def test_run_is_read_whole(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "fc_moe")])
    assert run.label == "fc_moe"
    assert run.missing == []
    assert run.sites == sorted(["bank", "clinic", NASTY])
    assert run.blocks() == [*LAYERS, "router"]
    assert run.of_round("aggregation_gap") == {1: 0.5, 2: 0.5, 3: 0.5}
    assert run.of_site("clinic", "loss") == {1: 2.5, 2: 2.0, 3: 1.75}


def test_folder_of_runs_stands_for_all_of_them_and_each_counts_once(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / "sweep" / name)
    found = read_runs([tmp_path / "sweep", tmp_path / "sweep" / "a"])
    assert [run.label for run in found] == ["a", "b"]


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [write_run(tmp_path / parent / "fc_moe") for parent in ("monday", "friday")]
    assert [run.label for run in read_runs(folders)] == ["monday/fc_moe", "friday/fc_moe"]


def test_old_run_says_what_is_missing(tmp_path):
    folder = write_run(tmp_path / "old")
    (folder / "diagnostics/rounds.jsonl").unlink()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("bytes_by_kind", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = " / ".join(read_runs([folder])[0].missing)
    assert "no diagnostics/rounds.jsonl" in told
    assert "not yet counted by kind" in told


def test_run_that_was_cut_off_or_failed_says_so(tmp_path):
    cut, failed = write_run(tmp_path / "cut"), write_run(tmp_path / "failed", status="failed")
    (cut / "summary.json").unlink()
    told = [run.missing for run in read_runs([cut, failed])]
    assert [len(each) for each in told] == [1, 1]
    assert "has not ended" in told[0][0]
    assert told[1][0] == "the run failed: clinic went away"


def test_run_that_was_refused_before_it_wrote_a_row_is_one(tmp_path):
    folder = write_run(tmp_path / "sweep" / "refused", status="failed")
    (folder / "metrics.jsonl").unlink()
    (folder / "diagnostics/rounds.jsonl").unlink()
    (run,) = read_runs([tmp_path / "sweep"])
    assert run.missing == ["the run failed: clinic went away", "no round was completed: there is nothing to draw"]
    assert render([run]).count('role="note"') == 2


def test_rounds_that_the_log_could_not_carry_are_counted(tmp_path):
    folder = write_run(tmp_path / "remote")
    path = folder / "diagnostics/rounds.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    assert "diagnostics of 1 rounds were too large" in read_runs([folder])[0].missing[0]


def test_run_before_its_first_round_has_nothing_to_draw(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "new", rounds=0)])
    assert run.missing == ["no round was completed: there is nothing to draw"]


LINE = '{"round": 1, "sites": [], "layers": {}, "kinds": {}}\n'


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"round": 0}\n{"rou\n', "metrics.jsonl line 2 is damaged"),
        ("metrics.jsonl", '{"round": 0}\n{"rou\n{"round": 1', "metrics.jsonl line 2 is damaged"),
        ("metrics.jsonl", '{"round": 0}\n{"type": "other"}\n', r"metrics.jsonl line 2 is .*: no round"),
        ("metrics.jsonl", '{"round": true}\n', "no round"),
        ("metrics.jsonl", '{"round": 1, "type": "site"}\n', "no site"),
        ("metrics.jsonl", '{"round": 1, "type": "round", "bytes_up": 3}\n', "bytes_down: no number"),
        ("metrics.jsonl", '{"round": 1, "type": "site", "site": "a", "loss": "x"}\n', "loss: no number"),
        ("diagnostics/rounds.jsonl", '{"round": 1}\n', "rounds.jsonl line 1 is damaged, or of another version"),
        (
            "diagnostics/rounds.jsonl",
            LINE.replace('"sites": []', '"sites": NaN'),
            "line 1 is damaged: NaN is no number",
        ),
        ("diagnostics/rounds.jsonl", LINE.replace('"kinds": {}', '"kinds": []'), "layers or kinds hold no tables"),
        ("diagnostics/rounds.jsonl", LINE.replace('"sites": []', '"sites": 3'), "sites are no list"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", "{}", "summary.json is .*: no status"),
        ("summary.json", "[]", "summary.json is damaged"),
        ("summary.json", '{"status": "failed"}', "summary.json is .*: no error"),
        ("summary.json", '{"status": "completed"}', "summary.json is .*: no bytes_down, bytes_up, global_loss"),
        ("summary.json", '{"status": "failed", "error": NaN}', "summary.json is damaged: NaN is no number"),
        ("config.yaml", "a: [1, 2", "config.yaml is damaged: while parsing"),
        ("config.yaml", "- 1", "config.yaml is damaged: it holds no settings"),
        ("evaluation.json", "{}", "evaluation.json is .*: no cost, routing, scores, summary"),
    ],
)
def test_damaged_file_is_named_in_one_line(tmp_path, command, name, content, message):
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        CliRunner().invoke(cli, [command, str(folder)], catch_exceptions=False)
    assert str(folder / name) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "diagnostics/rounds.jsonl", "summary.json", "config.yaml"])
def test_file_that_is_no_text_or_no_file_is_named(tmp_path, name):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(b"a: \xff")
    with pytest.raises(ValueError, match=rf"{name} is damaged: no UTF-8 at byte 3"):
        read_runs([folder])
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(ValueError, match=rf"{name} cannot be read: Is a directory"):
        read_runs([folder])


@pytest.mark.parametrize("name", ["metrics.jsonl", "diagnostics/rounds.jsonl"])
def test_last_line_that_was_cut_off_is_left_out_and_told(tmp_path, name):
    folder = write_run(tmp_path / "run", rounds=2)
    text = (folder / name).read_text()
    (folder / name).write_text(text + text.splitlines()[0][:20])
    (run,) = read_runs([folder])
    assert run.missing == [f"the last line of {name} was cut off: left out"]
    assert len(run.rows if name == "metrics.jsonl" else run.diagnostics) == len(text.splitlines())
    (folder / name).write_text(text.removesuffix("\n"))
    assert read_runs([folder])[0].missing == []


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no run in it \(no metrics.jsonl, no summary.json\)"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match=r"absent: not a folder"):
        read_runs([tmp_path / "absent"])


def test_page_stays_bounded_by_leaving_rounds_out(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "long", rounds=12)
    length = (folder / "diagnostics/rounds.jsonl").stat().st_size
    monkeypatch.setattr(runs, "MAX_DIAGNOSTICS_BYTES", length // 3)
    (run,) = read_runs([folder])
    assert [line["round"] for line in run.diagnostics] == [3, 6, 9, 12]
    assert "show 4 of them" in run.missing[0]


def test_runs_of_a_page_share_its_room(tmp_path, monkeypatch):
    folders = [write_run(tmp_path / name, rounds=4) for name in ("a", "b")]
    length = (folders[0] / "diagnostics/rounds.jsonl").stat().st_size
    monkeypatch.setattr(runs, "MAX_DIAGNOSTICS_BYTES", length + 100)
    assert [len(run.diagnostics) for run in read_runs(folders)] == [2, 2]
    assert len(read_runs(folders[:1])[0].diagnostics) == 4


def test_names_with_numbers_have_their_natural_order():
    names = ["hospital-10", "a", "hospital-2", "2", "10", "hospital", "hospital-2b"]
    assert sorted(names, key=natural) == ["2", "10", "a", "hospital", "hospital-2", "hospital-2b", "hospital-10"]


def test_thinning_keeps_everything_that_fits_and_always_the_last():
    lines = [{"round": number} for number in range(10)]
    assert thinned(lines, 10_000) == lines
    assert thinned(lines, 1) == [{"round": 9}]
    assert thinned([], 1) == []


def test_real_run_is_read_whole(fc_moe_run):
    (run,) = read_runs([fc_moe_run.folder.path])
    assert run.missing == []
    assert run.blocks() == ["model.layers.0.mlp", "attention"]
    assert RunFolder(fc_moe_run.folder.path).diagnostics() == run.diagnostics


def test_frozen_experts_are_told_from_too_many(tmp_path):
    """What of a layer is in the log decides: tokens alone, everything but pairs of sites, or everything."""
    folder = write_run(tmp_path / "run")
    log = folder / "diagnostics" / "rounds.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]

    def told(kept):
        for line in lines:
            line["layers"] = {name: {k: layer[k] for k in layer if kept(k)} for name, layer in line["layers"].items()}
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return read_runs([folder])[0].missing

    assert told(lambda key: True) == []
    assert "too many experts" in told(lambda key: key != "pairs")[0]
    assert told(lambda key: key in {"tokens", "num_tokens"}) == ["experts are not sent: of them there are tokens alone"]
