"""The table that sets runs side by side."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from server.compare import comparison
from server.record import RunFolder

SUMMARY = {
    "status": "completed",
    "strategy": "fedavg",
    "global_loss": 1.25,
    "site_loss": {"a": 1.0, "b": 2.5, "c": 1.0},
    "bytes_up": 3_000_000,
    "bytes_down": 6_000,
    "num_sites": 3,
    "wall_seconds": 12.4,
}


def shown(folders):
    console = Console(file=io.StringIO(), width=160)
    console.print(comparison(folders))
    return console.file.getvalue()


def run_folder(parent, name, **changes):
    RunFolder(parent / name).write_text("summary.json", json.dumps(SUMMARY | changes))
    return parent / name


def cells(table, name):
    line = next(line for line in table.splitlines() if name in line)
    return [cell.strip() for cell in line.strip("│┃").split("│")]


def test_row_holds_losses_worst_site_and_bytes_of_a_site(tmp_path):
    """Mean of the sites: (1 + 2.5 + 1) / 3 = 1.5; bytes up: 3,000,000 / 3 sites."""
    folder = run_folder(tmp_path, "fc_moe")
    RunFolder(folder).append_row({"type": "round", "round": 3, "bytes_up": 0, "bytes_down": 0})
    assert cells(shown([folder]), "fc_moe") == [
        "fc_moe", "fedavg", "3", "1.2500", "1.5000", "2.5000 (b)", "1.0 MB", "2.0 kB", "12", "-", "-",
    ]  # fmt: skip


def test_speed_is_the_median_and_memory_the_largest_of_the_sites_rounds(tmp_path):
    folder = RunFolder(run_folder(tmp_path, "fc_moe"))
    for speed, memory in ((100.0, 4e9), (300.0, 5e9), (200.4, 3e9)):
        folder.append_row(
            {"type": "site", "round": 1, "site": "a", "tokens_per_second": speed, "peak_memory_bytes": memory}
        )
    folder.append_row({"type": "round", "round": 1, "bytes_up": 0, "bytes_down": 0})
    assert cells(shown([tmp_path / "fc_moe"]), "fc_moe")[-2:] == ["200", "5.0 GB"]


def test_names_with_brackets_are_only_text(tmp_path):
    """A sweep over a list names its folders so."""
    table = shown([run_folder(tmp_path, "topic=[a,b]", site_loss={"[red]x": 1.0})])
    assert cells(table, "topic")[0] == "topic=[a,b]"
    assert "([red]x)" in table


def test_runs_stand_in_the_order_given(tmp_path):
    table = shown([run_folder(tmp_path, name) for name in ("zeta", "alpha")])
    assert table.index("zeta") < table.index("alpha")


def test_run_without_evaluated_sites_has_no_mean(tmp_path):
    table = shown([run_folder(tmp_path, "bare", site_loss={}, global_loss=None)])
    assert cells(table, "bare")[3:6] == ["-", "-", "-"]


def test_sites_without_a_number_at_the_end_are_left_out_of_the_mean(tmp_path):
    table = shown([run_folder(tmp_path, "diverged", site_loss={"a": None, "b": 2.0})])
    assert cells(table, "diverged")[4:6] == ["2.0000", "2.0000 (b)"]


@pytest.mark.parametrize(("folder", "word"), [("broken", "failed"), ("running", "no summary")])
def test_run_that_did_not_complete_says_so_instead_of_numbers(tmp_path, folder, word):
    if folder == "broken":
        run_folder(tmp_path, "broken", status="failed", error="1 of 3 sites answered")
    row = cells(shown([tmp_path / folder]), folder)
    assert (row[0], row[3:5]) == (folder, [word, ""])


def test_failed_run_says_why_in_few_words(tmp_path):
    table = shown([run_folder(tmp_path, "broken", status="failed", error="site [a] went away " + 30 * "for long ")])
    assert "site [a] went away for long" in table
    assert 0 < table.count("for long") < 10


def test_runs_of_one_name_are_told_apart_and_long_names_are_whole(tmp_path):
    names = ["monday/fc_moe", "friday/fc_moe", "friday/" + "x" * 150]
    table = shown([run_folder(tmp_path, name) for name in names])
    assert "monday/fc_moe" in table
    assert "friday/fc_moe" in table
    assert table.count("x") >= 150


def test_runs_of_other_data_are_told_to_be_incomparable(tmp_path):
    folders = [run_folder(tmp_path, name) for name in ("a", "b")]
    for folder, count in zip(folders, (400, 800), strict=True):
        RunFolder(folder).write_text("config.yaml", f"data:\n  num_examples: {count}\noutput: {folder}\n")
    assert "losses may not be comparable: the runs differ in data.num_examples" in shown(folders)
    assert "comparable" not in shown(folders[:1])


def test_line_that_was_cut_off_is_left_out_and_told(tmp_path):
    folder = run_folder(tmp_path, "running")
    (folder / "metrics.jsonl").write_text('{"type": "round", "round": 1, "bytes_up": 0, "bytes_down": 0}\n{"type": "si')
    table = shown([folder])
    assert cells(table, "running")[2] == "1"
    assert "running: the last line of metrics.jsonl was cut off: left out" in table


def test_real_run_fits_the_table(fc_moe_run):
    table = shown([fc_moe_run.folder.path])
    assert f"{fc_moe_run.summary['global_loss']:.4f}" in table
