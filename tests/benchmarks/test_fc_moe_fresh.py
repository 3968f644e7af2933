"""Tests of FC-MoE's benchmark with fresh seeds: with the settings that stand, beside what stored seeds had shown."""

from __future__ import annotations

import json

import pytest

from benchmarks import fc_moe_fresh
from benchmarks.cells import Outcome
from benchmarks.fc_moe_fresh import compared
from tests.benchmarks.made_up_runs import DIVERGED, measured, outcome, told


def test_gains_of_fresh_seeds_stand_beside_those_of_the_stored_ones():
    """By hand: 60 and 62 against 50 and 56 now, 55 against 51 before; sites 40 and 70 against 30 and 50."""
    before = {"fedavg": outcome(0.51), "fc_moe": outcome(0.55), "fedprox": outcome(0.9)}
    two = {"a": 0.3, "b": 0.5}, {"a": 0.4, "b": 0.7}
    fresh = {
        "fedavg": Outcome((), {7: measured(0.5, sites=two[0]), 8: measured(0.56, sites=two[0])}),
        "fc_moe": Outcome((), {7: measured(0.6, sites=two[1]), 8: measured(0.62, sites=two[1])}),
        "fedprox": outcome(),
    }
    baseline, other = compared(before, fresh)["rows"]
    assert told(baseline) == ["FedAvg", 2, "53.0", "", "", "", ""]
    assert told(other)[:5] == ["FC-MoE", 2, "61.0", "+8.0", "+4.0"]
    assert [told([cell])[0] for cell in other[5].split(" / ")] == ["+15.0", "+10.0"]
    assert other[6].startswith("1.0, x 1.00")


def test_a_run_that_diverged_is_told_and_without_fedavg_nothing_is_compared():
    ((*cells,),) = compared({"fc_moe": outcome(0.5)}, {"fc_moe": outcome(0.5, DIVERGED)})["rows"]
    assert cells == ["FC-MoE", 2, "50.0 (1 diverged)", "", "", "", ""]


def run_fresh(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["fc_moe_fresh", "--experts", "full", "--device", "somewhere", *words])
    fc_moe_fresh.main()


def test_tests_alone_are_computed_with_the_tuned_settings_and_once(tested_now, monkeypatch, tmp_path):
    run_fresh(monkeypatch, "--seeds", "5", "6")
    assert [(cell.seed, cell.split) for cell in tested_now] == [(5, "test"), (6, "test")] * 2
    assert {cell.settings[-1] for cell in tested_now} == {"train.learning_rate=0.008"}
    run_fresh(monkeypatch, "--seeds", "5", "6", "7", "--strategies", "fedavg")
    assert [cell.seed for cell in tested_now[4:]] == [7]
    written = json.loads((tmp_path / "results" / "fresh_clinc_full.json").read_text())
    assert [told(cells)[:3] for cells in written["table"]["rows"]] == [
        ["FedAvg", 3, "60.0"],
        ["FedMoE (sites that used the expert)", 2, "60.0"],
    ]
    assert [maker["runs"] for maker in written["made_by"]] == [5]


@pytest.mark.parametrize(("seeds", "told"), [(["1", "5"], "1"), (["5", "100"], "100")])
def test_seeds_that_were_looked_at_are_refused(tested_now, monkeypatch, capsys, seeds, told):
    """Of stored tests, and the one that everything is tuned on."""
    with pytest.raises(SystemExit) as ended:
        run_fresh(monkeypatch, "--seeds", *seeds)
    assert ended.value.code == 2
    assert f"--seeds {told}: not fresh" in capsys.readouterr().err
    assert tested_now == []


def test_who_is_not_compared_there_is_refused(tested_now, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_fresh(monkeypatch, "--seeds", "5", "--strategies", "fc_moe_product")
    assert ended.value.code == 2
    assert "--strategies fc_moe_product: not compared on clinc full" in capsys.readouterr().err
    assert tested_now == []
