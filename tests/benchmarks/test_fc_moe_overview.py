"""FC-MoE's tables in short: that they are those of the cells, and what stands in a line."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks import fc_moe, fc_moe_overview
from benchmarks.cells import Outcome
from benchmarks.fc_moe import study_of
from benchmarks.fc_moe_overview import Found, aim, gains, main, read, report
from benchmarks.render import HERE
from benchmarks.workloads import WORKLOADS

DIVERGED = {"failed": "round 1: loss is nan"}


def measured(value, by_accuracy=True, cosine=0.25):
    """Ten rounds that end at the value: as accuracy they rise over five rounds, as loss they fall."""
    rise = [*(-step for step in range(5, 0, -1)), *[0] * 5]
    curve = [value + (step / 10 if by_accuracy else -step) for step in rise]
    return {"accuracy": curve if by_accuracy else None, "loss": curve, "averaging": {"pairs": cosine}}


def cells_of(table, title="data"):
    line = next(line for line in table.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def found(by_accuracy=True, **tested):
    """Contender -> what its runs end at, seed by seed; or a row."""
    rows = {
        name: [value if isinstance(value, dict) else measured(value, by_accuracy) for value in values]
        for name, values in tested.items()
    }
    return Found("data", "LoRA", {name: Outcome((), dict(enumerate(of))) for name, of in rows.items()})


def test_overview_is_that_of_the_cells():
    """Whoever runs more, or adds a contender, makes it anew."""
    assert json.loads((HERE / "results" / "overview_fc_moe.json").read_text()) == report()


def test_best_other_baseline_is_neither_a_bound_nor_ours_nor_fc_moe():
    """FedProx gains 2 and 4 points; all above it are bounds, FC-MoE, or variants of it."""
    of_data = found(
        fedavg=[0.5, 0.6], fedprox=[0.52, 0.64], fedavgm=[0.51, 0.61], fc_moe=[0.6, 0.7], centralised=[0.9, 0.9],
        local_only=[0.9, 0.9], fc_moe_tokens=[0.8, 0.8], flattening=[0.7, 0.7], noise=[0.8, 0.9],
        fc_moe_plus=[0.55, 0.67],
    )  # fmt: skip
    _, *of_runs, fedavg, best, fc_moe, as_shipped, tuned = cells_of(gains([of_data]))
    assert (of_runs, as_shipped) == (["LoRA", "2", "0.250"], "missing")
    assert [each.split(" ±")[0] for each in (fedavg, best, fc_moe, tuned)] == ["55.0", "+3.0", "+10.0", "+6.0"]
    assert (fedavg[-1], best.split(", ")[1]) == ("%", "FedProx")


def test_aim_counts_who_is_apart_above_and_below():
    """Paired by seed ours is above FedAvg by 10 to 11 points, though their intervals meet; below FedProx by 1."""
    of_data = found(
        fedavg=[0.3, 0.4, 0.5], fedavgm=[0.1, 0.1, 0.1], fedprox=[0.41, 0.52, 0.61], fc_moe=[0.1, 0.5, 0.9],
        fc_moe_plus_as_shipped=[0.4, 0.51, 0.6],
    )  # fmt: skip
    _, _, apart, above, below, rounds = cells_of(aim("fc_moe_plus_as_shipped", [of_data]))
    assert apart == "1 of 4, not FedAvg; FedProx; FC-MoE"
    assert above == "2 of 4, not FedProx; FC-MoE"
    assert below == "FedProx"
    assert rounds == "5.0, x 0.83 ± 0.00"


@pytest.mark.parametrize(
    ("ours", "apart"), [(0.66, "0 of 1, not FedAvg"), (0.68, "1 of 1"), (0.2, "0 of 1, not FedAvg")]
)
def test_intervals_are_apart_if_there_is_room_for_both(ours, apart):
    """Half an interval is 4.30 times 0.03 / sqrt 3 = 0.075 of FedAvg's and 0.099 of ours: together 0.174."""
    of_data = found(fedavg=[0.47, 0.5, 0.53], fc_moe_plus=[ours - 0.04, ours, ours + 0.04])
    assert cells_of(aim("fc_moe_plus", [of_data]))[2] == apart


def test_of_losses_the_lower_is_the_better():
    of_data = found(False, fedavg=[2.0, 2.1], fedprox=[1.5, 1.61], fedavgm=[3.0, 3.01], fc_moe_plus=[1.8, 1.901])
    *_, fedavg, best, _, _, _ = cells_of(gains([of_data]))
    assert (fedavg[-4:], best.split(" ±")[0], best.split(", ")[1]) == ("nats", "-0.495", "FedProx")
    _, _, apart, above, below, _ = cells_of(aim("fc_moe_plus", [of_data]))
    assert (apart, above, below) == ("1 of 3, not FedAvg; FedProx", "2 of 3, not FedProx", "FedProx")


def test_who_has_not_been_run_is_missing_and_who_diverged_is_told():
    alone = found(fedavg=[0.5, 0.6], fc_moe=[DIVERGED, DIVERGED], fc_moe_plus=[DIVERGED])
    assert cells_of(gains([alone]))[5:] == ["missing", "diverged", "missing", "diverged"]
    assert [cells_of(aim(name, [alone]))[2] for name in fc_moe_overview.AIMED] == ["missing", "diverged"]
    partly = found(fedavg=[0.5, 0.6, DIVERGED], fedprox=[0.5, DIVERGED, 0.7], fc_moe_plus=[0.6, 0.7, 0.8])
    assert cells_of(gains([partly]))[4].endswith("(1 diverged) %")
    assert cells_of(aim("fc_moe_plus", [partly]))[3] == "2 of 2"


def test_of_one_seed_there_is_no_verdict_and_few_seeds_are_told():
    """A baseline with one seed has no interval, and so is none."""
    of_data = found(fedavg=[0.5, 0.6, 0.7], fedprox=[0.9, 0.9], fedavgm=[0.9], fc_moe_plus=[0.6, 0.71, 0.8])
    assert cells_of(aim("fc_moe_plus", [of_data]))[2:4] == [
        "0 of 2, not FedAvg; FedProx (2 of 3 seeds)",
        "1 of 2, not FedProx (2 of 3 seeds)",
    ]
    assert cells_of(gains([of_data]))[5].endswith(", FedProx (2 of 3 seeds)")
    once = found(fedavg=[0.5], fedprox=[0.9], fc_moe_plus=[0.6])
    assert cells_of(aim("fc_moe_plus", [once]))[2:5] == [""] * 3
    assert cells_of(gains([once]))[5] == "missing"


def test_cosines_are_of_the_runs_that_measured_them():
    rows = [measured(0.5), measured(0.5, cosine=None), measured(0.5) | {"averaging": None}]
    assert cells_of(gains([found(fedavg=rows)]))[3] == "0.250 (of 1)"
    assert cells_of(gains([found(fedavg=rows[1:])]))[3] == ""


def test_tables_are_read_with_their_seeds_in_the_order_of_the_workloads(monkeypatch, tmp_path):
    """One of CLINC with whole experts, one of Dolly by LoRA, and one in which FedAvg has not been run."""
    for module in (fc_moe, fc_moe_overview):
        monkeypatch.setattr(module, "HERE", tmp_path)
    (tmp_path / "results").mkdir()
    for workload, experts, name in (
        ("dolly", "lora", "fedavg"),
        ("clinc", "full", "fedavg"),
        ("mcq", "lora", "fedmoe"),
    ):
        study = study_of(workload, experts, [3], [107])
        while needed := study.needed(name):
            for cell in needed:
                study.add(asdict(cell) | {"settings": [*cell.settings]} | measured(0.5, workload != "dolly"))
        path = tmp_path / "results" / f"fc_moe_{workload}_{experts}.json"
        path.write_text(json.dumps({"seeds": [3], "tuning_seeds": [107]}))
        path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in study.rows.values()))
    tables = list(read())
    assert [(of.title, of.experts) for of in tables] == [
        (WORKLOADS["clinc"].title, "full"),
        (WORKLOADS["dolly"].title, "LoRA"),
    ]
    assert [of.by_accuracy for of in tables] == [True, False]
    assert [list(of.tested["fedavg"].rows) for of in tables] == [[3], [3]]
    monkeypatch.setattr("sys.argv", ["fc_moe_overview"])
    main()
    written = json.loads((tmp_path / "results" / "overview_fc_moe.json").read_text())
    assert written == report()
    assert written["summary"] == gains(tables)
    assert written["markdown"].startswith(written["summary"])
    assert written["markdown"].count("beside the baselines that were run") == 2
