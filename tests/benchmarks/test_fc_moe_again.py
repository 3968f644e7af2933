"""Runs of FC-MoE's benchmark computed again: with the settings that stand, and compared seed by seed."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks import fc_moe_again
from benchmarks.cells import Outcome
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import study_of
from benchmarks.fc_moe_again import compared


def measured(accuracy):
    return {"accuracy": [accuracy] * 6, "loss": [1 - accuracy] * 6}


def outcome(*accuracies):
    return Outcome((), {seed: measured(accuracy) for seed, accuracy in enumerate(accuracies)})


def test_both_are_paired_by_seed_over_the_seeds_that_both_have():
    """By hand: stored 50 and 60 against 40 and 46, again 51 and 60 against 43 and 45; seed 2 is stored alone."""
    stored = {"fedavg": outcome(0.4, 0.46, 0.9), "fc_moe": outcome(0.5, 0.6, 0.1)}
    anew = {"fedavg": outcome(0.43, 0.45), "fc_moe": outcome(0.51, 0.6)}
    baseline, ours = compared(stored, anew)["rows"]
    title, seeds, *means, difference, alike, gain_stored, gain_again = ours
    assert (title, seeds, alike) == ("FC-MoE", 2, 1)
    assert [cell.split()[0] for cell in means] == ["55.0", "55.5"]
    assert (difference.split()[0], gain_stored.split()[0], gain_again.split()[0]) == ("+0.5", "+12.0", "+11.5")
    assert baseline[4].startswith("+1.0 ±")
    assert baseline[5:] == [0, "", ""]


def test_a_run_that_diverged_is_left_out_and_a_loss_is_told_in_nats():
    loss = {"accuracy": None, "loss": [2.0] * 5}
    stored = {"fedavg": Outcome((), {0: loss, 1: {"failed": "round 1: loss is nan"}})}
    table = compared(stored, {"fedavg": Outcome((), {0: loss, 1: loss})})
    assert table["columns"][2] == "test loss, nats, stored"
    assert table["rows"] == [["FedAvg", 1, "2.000", "2.000", "+0.000", 1, "", ""]]


@pytest.fixture
def stored(monkeypatch, tmp_path):
    """Stored runs of FedAvg on CLINC, tuned to a rate of 0.008, below ``tmp_path``; cells that are computed again."""
    study = study_of("clinc", "lora", [0, 1], [100])
    rows = []
    while needed := study.needed("fedavg"):
        for cell in needed:
            rate = float(cell.settings[-1].partition("=")[2])
            rows.append(asdict(cell) | measured(0.5 - abs(rate - 0.008)) | {"settings": [*cell.settings]})
            study.add(rows[-1])
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "fc_moe_clinc_lora.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(fc_moe_again, "HERE", tmp_path)
    computed = []

    def run(cell, data, device):
        computed.append(cell)
        return asdict(cell) | measured(0.6)

    monkeypatch.setattr(fc_moe_again, "run_cell", run)
    return computed


def test_tests_alone_are_computed_again_with_the_tuned_settings_and_once(stored, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["fc_moe_again", "--strategies", "fedavg", "--seeds", "0", "1"])
    for _ in range(2):
        fc_moe_again.main()
    assert [(cell.seed, cell.split) for cell in stored] == [(0, "test"), (1, "test")]
    assert {cell.settings for cell in stored} == {("strategy=fedavg", "train.learning_rate=0.008")}
    written = json.loads((tmp_path / "results" / "again_clinc_lora.json").read_text())
    assert written["table"]["rows"][0][:2] == [CONTENDERS["fedavg"].title, 2]
    assert written["made_by"][0]["runs"] == 2


def test_who_is_not_tuned_is_refused(stored, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fc_moe_again", "--strategies", "fedavg", "fc_moe"])
    with pytest.raises(SystemExit) as ended:
        fc_moe_again.main()
    assert ended.value.code == 2
    assert "--strategies fc_moe: not tuned in the stored runs" in capsys.readouterr().err
    assert stored == []
