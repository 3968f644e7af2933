"""FC-MoE's tables in short: that they are those of the cells, and what stands in a line."""

from __future__ import annotations

import json

from benchmarks.cells import Outcome
from benchmarks.fc_moe_overview import Found, aim, gains, report
from benchmarks.render import HERE


def outcome(*values, by_accuracy=True, cosine=0.25):
    """Ten rounds that end at the values, one a seed: as accuracy they rise over five rounds, as loss they fall."""
    rise = [*(-value for value in range(5, 0, -1)), *[0] * 5]
    curves = {
        seed: [value + (step / 10 if by_accuracy else -step) for step in rise] for seed, value in enumerate(values)
    }
    rows = {
        seed: {"accuracy": curve if by_accuracy else None, "loss": curve, "averaging": {"pairs": cosine}}
        for seed, curve in curves.items()
    }
    return Outcome((), rows)


def cells_of(table, title):
    line = next(line for line in table.splitlines() if line.startswith(f"| {title} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def found(by_accuracy=True, **tested):
    runs = {name: outcome(*values, by_accuracy=by_accuracy) for name, values in tested.items()}
    return Found("data", "LoRA", runs, by_accuracy)


def test_overview_is_that_of_the_cells():
    """Whoever runs more, or adds a contender, makes it anew."""
    assert json.loads((HERE / "results" / "overview_fc_moe.json").read_text()) == report()


def test_best_other_baseline_is_neither_a_bound_nor_ours_nor_fc_moe():
    """FedProx gains 2 and 4 points; all above it are bounds, FC-MoE, or variants of it."""
    of_data = found(
        fedavg=[0.5, 0.6], fedprox=[0.52, 0.64], fedavgm=[0.51, 0.61], fc_moe=[0.6, 0.7], centralised=[0.9, 0.9],
        fc_moe_tokens=[0.8, 0.8], flattening=[0.7, 0.7], noise=[0.8, 0.9], fc_moe_plus=[0.55, 0.67],
    )  # fmt: skip
    _, *of_runs, fedavg, best, fc_moe, as_shipped, tuned = cells_of(gains([of_data]), "data")
    assert (of_runs, as_shipped) == (["LoRA", "2", "0.250"], "missing")
    assert [each.split(" ±")[0] for each in (fedavg, best, fc_moe, tuned)] == ["55.0", "+3.0", "+10.0", "+6.0"]
    assert (fedavg[-1], best.split(", ")[1]) == ("%", "FedProx")


def test_aim_counts_who_is_apart_above_and_below():
    """Paired by seed ours is above FedAvg by 10 to 11 points, though their intervals meet; below FedProx by 1."""
    of_data = found(
        fedavg=[0.3, 0.4, 0.5], fedavgm=[0.1, 0.1, 0.1], fedprox=[0.41, 0.52, 0.61], fc_moe=[0.1, 0.5, 0.9],
        fc_moe_plus_as_shipped=[0.4, 0.51, 0.6],
    )  # fmt: skip
    _, _, apart, above, below, rounds = cells_of(aim("fc_moe_plus_as_shipped", [of_data]), "data")
    assert apart == "1 of 4, not FedAvg; FedProx; FC-MoE"
    assert above == "2 of 4, not FedProx; FC-MoE"
    assert below == "FedProx"
    assert rounds == "5.0, x 0.83 ± 0.00"


def test_of_losses_the_lower_is_the_better():
    of_data = found(
        by_accuracy=False, fedavg=[2.0, 2.1], fedprox=[1.5, 1.61], fedavgm=[3.0, 3.01], fc_moe_plus=[1.8, 1.901]
    )
    *_, fedavg, best, _, _, _ = cells_of(gains([of_data]), "data")
    assert (fedavg[-4:], best.split(" ±")[0], best.split(", ")[1]) == ("nats", "-0.4950", "FedProx")
    _, _, apart, above, below, _ = cells_of(aim("fc_moe_plus", [of_data]), "data")
    assert (apart, above, below) == ("1 of 3, not FedAvg; FedProx", "2 of 3, not FedProx", "FedProx")


def test_who_has_not_been_run_is_missing():
    alone = [found(fedavg=[0.5, 0.6])]
    assert cells_of(aim("fc_moe_plus", alone), "data")[2] == "missing"
    assert cells_of(gains(alone), "data")[5:] == ["missing"] * 4
