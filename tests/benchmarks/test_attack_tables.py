"""Which attacks do harm, and what the tables make of it."""

from __future__ import annotations

import pytest

from benchmarks.attack_tables import DIFFERENT, NO_ATTACK, does_harm, harmful, rows


def run(attack, *, fraction=0.1, seed=0, defence="none", loss=1.0, **more):
    facts = {"attack": attack, "fraction": fraction, "seed": seed, "defence": defence}
    return facts | {"loss": loss, "clean_loss": 1.0, "clean_success": 0.1} | more


@pytest.mark.parametrize(
    ("runs", "harm"),
    [
        ([run("noise", loss=1.05), run("noise", seed=1, loss=1.0)], True),
        ([run("noise", loss=1.05), run("noise", seed=1, loss=0.98)], False),
        ([run("backdoor", success=0.25)], True),
        ([run("backdoor", success=0.15)], False),
    ],
)
def test_harm_is_a_mean_over_seeds_of_loss_or_success_without_defence(runs, harm):
    assert does_harm(runs) == harm


def test_summary_is_over_attacks_that_do_harm_at_fractions_that_are_promised():
    attacked = [
        run(attack, fraction=fraction, defence=defence, loss=loss if defence == "none" else 1.01, **found)
        for attack, fraction, loss, recall in [
            (NO_ATTACK, 0.1, 1.0, None),
            ("noise", 0.1, 1.5, 1.0),
            ("noise", 0.3, 1.5, 0.5),
            ("noise", 0.4, 9.0, 0.0),
            ("harmless", 0.3, 1.0, 0.0),
        ]
        for defence, found in [("none", {}), ("CLAIR", {"recall": recall, "false_alarms": 0.1})]
    ]
    different = [run(DIFFERENT), run(DIFFERENT, defence="CLAIR", recall=None, false_alarms=0.3)]
    assert harmful(attacked) == [("noise", 0.1), ("noise", 0.3), ("noise", 0.4)]
    table = rows({"sites": 10, "runs": [*attacked, *different]})
    promised, beyond = table.split("beyond")[:2]
    assert "| CLAIR | 0.75 | 0.50 | 0.10 | +1.0 % | +1.0 % | 0.20 |" in promised
    assert "| none | - | - | - | +50.0 % | +50.0 % | - |" in promised
    assert "| CLAIR | 0.00 | 0.00 | 0.10 | +1.0 % | +1.0 % | 0.20 |" in beyond
    assert "| noise * | +50.0 | +1.0 (0.50 / 0.10) |" in beyond
    assert "| harmless | +0.0 | +1.0 (0.00 / 0.10) |" in beyond
