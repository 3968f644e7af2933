"""Runs of FC-MoE's benchmark computed again: with the settings that stand, and compared seed by seed."""

from __future__ import annotations

import json

import pytest

from benchmarks import fc_moe_again
from benchmarks.fc_moe_again import compared, of_both, report
from tests.benchmarks.made_up_runs import DIVERGED, measured, outcome, told


def test_both_are_paired_by_seed_over_the_seeds_that_both_have():
    """By hand: stored 50 and 60 against 40 and 46, again 51 and 60 against 43 and 45; seed 2 is stored alone."""
    before = {"fedavg": outcome(0.4, 0.46, 0.9), "fc_moe": outcome(0.5, 0.6, 0.1), "fedprox": outcome(0.1)}
    again = {"fedavg": outcome(0.43, 0.45), "fc_moe": outcome(0.51, 0.6), "fedprox": outcome()}
    table = compared(of_both(before, again))
    assert [told(cells) for cells in table["rows"]] == [
        ["FedAvg", 2, "43.0", "44.0", "+1.0", 0, "", ""],
        ["FC-MoE", 2, "55.0", "55.5", "+0.5", 1, "+12.0", "+11.5"],
    ]
    assert table["columns"][2] == "test accuracy, %, stored"


def test_curves_are_equal_if_both_are():
    before = {"fedavg": outcome(measured(0.5, 1.0), measured(0.5, 1.0), measured(0.5, 1.0), DIVERGED)}
    again = {"fedavg": outcome(measured(0.5, 1.1), measured(0.6, 1.0), measured(0.5, 1.0), DIVERGED)}
    ((_, seeds, *_, alike, _, _),) = compared(of_both(before, again))["rows"]
    assert (seeds, alike) == (4, 2)


def test_a_run_that_diverged_is_told_and_a_loss_is_in_nats():
    loss = {"accuracy": None, "loss": [2.0] * 5}
    table = compared(of_both({"fc_moe": outcome(loss, loss)}, {"fc_moe": outcome(loss, DIVERGED)}))
    assert table["columns"][2] == "test loss, nats, stored"
    ((title, seeds, one, other, change, alike, *gains),) = table["rows"]
    assert (title, seeds, one, other) == ("FC-MoE", 2, "2.000 ± 0.000", "2.000 (1 diverged)")
    assert (change, alike, gains) == ("+0.000", 1, ["", ""])
    ((*_, other, change, _, _, _),) = compared(of_both({"fc_moe": outcome(loss)}, {"fc_moe": outcome(DIVERGED)}))[
        "rows"
    ]
    assert (other, change) == ("diverged", "")


def test_makers_are_those_of_the_runs_in_the_table():
    one, other = {"commit": "a"}, {"commit": "b"}
    before = {"fedavg": outcome(*(measured(0.5) | {"made_by": one} for _ in range(3)))}
    again = {"fedavg": outcome(*(measured(0.5) | {"made_by": other} for _ in range(2)))}
    found = report(before, again)
    assert found["stored_by"] == [{"made_by": one, "runs": 2}]
    assert found["made_by"] == [{"made_by": other, "runs": 2}]


def run_again(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["fc_moe_again", "--experts", "full", "--device", "somewhere", *words])
    fc_moe_again.main()


def test_tests_alone_are_computed_again_with_the_tuned_settings_and_once(tested_now, monkeypatch, tmp_path):
    """By default everyone's; who was computed before stays in the table."""
    run_again(monkeypatch, "--strategies", "fedavg", "--seeds", "0", "1")
    assert [(cell.seed, cell.split, cell.experts) for cell in tested_now] == [(0, "test", "full"), (1, "test", "full")]
    assert {cell.settings for cell in tested_now} == {("strategy=fedavg", "train.learning_rate=0.008")}
    run_again(monkeypatch, "--seeds", "0")
    assert [cell.settings[0] for cell in tested_now[2:]] == ["strategy=fedmoe"]
    written = json.loads((tmp_path / "results" / "again_clinc_full.json").read_text())
    assert [told(cells)[1:5] for cells in written["table"]["rows"]] == [
        [2, "50.0", "60.0", "+10.0"],
        [1, "50.0", "60.0", "+10.0"],
    ]
    assert [maker["runs"] for maker in written["made_by"]] == [3]


def test_who_is_not_tuned_is_refused(tested_now, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run_again(monkeypatch, "--strategies", "fedavg", "fc_moe")
    assert ended.value.code == 2
    assert "--strategies fc_moe: not tuned in the stored runs" in capsys.readouterr().err
    assert tested_now == []
