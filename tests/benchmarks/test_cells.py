"""What a study computes within its time, and that its tables are those of its cells."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import cells, fc_moe
from benchmarks.cells import finished, rows_to_go_on_from, stored_rows
from benchmarks.fc_moe import report, stored
from benchmarks.render import HERE

TABLES = sorted(path.stem for path in (HERE / "results").glob("fc_moe_*.json"))


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_fc_moe_are_those_of_its_cells(name):
    """Whoever adds a contender or a knob, or runs more, makes the tables anew."""
    written = json.loads((HERE / "results" / f"{name}.json").read_text())
    study = stored(written["workload"], written["experts"], written["seeds"], written["tuning_seeds"])
    made = report(study, written["workload"], written["experts"])
    for key in ("runs", "made_by", "summary", "markdown"):
        assert made[key] == written[key]


def test_a_cell_that_a_kill_left_half_written_is_computed_again(tmp_path):
    """Who only reads leaves it: another process may be writing it."""
    path = tmp_path / "cells.jsonl"
    assert rows_to_go_on_from(path) == stored_rows(path) == []
    path.write_text('{"seed": 0}\n{"seed": 1}\n{"se')
    assert stored_rows(path) == [{"seed": 0}, {"seed": 1}]
    assert path.read_text().endswith('{"se')
    for _ in range(2):
        assert rows_to_go_on_from(path) == [{"seed": 0}, {"seed": 1}]
        assert path.read_text() == '{"seed": 0}\n{"seed": 1}\n'
    path.write_text('{"se')
    assert rows_to_go_on_from(path) == []
    assert path.read_text() == ""


class Clock:
    """Of ``time``: as far as it was moved."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize(("jobs", "expected"), [(1, [0, 1]), (2, [0, 1, 2])])
def test_no_cell_is_begun_after_the_deadline_but_those_begun_are_finished(jobs, expected, monkeypatch):
    """Ten seconds a cell, fifteen are given. Two at a time: the third begins when the first ends, after ten."""
    clock = Clock()
    monkeypatch.setattr(cells, "time", clock)
    found = []
    for row in finished([(("cell", index),) for index in range(6)], dict, jobs, deadline=15):
        found.append(row["cell"])
        clock.now += 10
    assert sorted(found) == expected


def test_all_tables_share_the_time_that_is_given(monkeypatch, tmp_path):
    """A minute and a half: the first table takes a minute of it, the second has the rest, the third less than none."""
    clock, left = Clock(), []

    def carried_out(study, names, run, report, results, given):
        left.append(given.budget_minutes)
        clock.now += 60

    monkeypatch.setattr(fc_moe, "time", clock)
    monkeypatch.setattr(fc_moe, "carry_out", carried_out)
    monkeypatch.setattr("sys.argv", ["fc_moe", "--workload", "embedded", "mcq", "clinc", "--budget-minutes", "1.5"])
    fc_moe.main()
    assert left == [1.5, 0.5, -0.5]
    monkeypatch.setattr("sys.argv", ["fc_moe"])
    fc_moe.main()
    assert left[-1] == math.inf
