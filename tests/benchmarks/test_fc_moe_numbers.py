"""From rows to numbers by seed: by hand."""

from __future__ import annotations

import pytest

from benchmarks.fc_moe_numbers import growth, on_sites, rounds_needed, rounds_to


def test_rounds_to_counts_from_one():
    assert rounds_to([0.1, 0.5, 0.4, 0.6], 0.5, higher=True) == 2
    assert rounds_to([3.0, 2.0], 2.5, higher=False) == 2
    assert rounds_to([0.1], 0.5, higher=True) is None


def test_rounds_to_the_baselines_end_are_paired_with_its_own():
    """The mean of the baseline's last five is 0.4: itself it gets there in round 4, the other in 2, never, or in 6."""
    baseline = {seed: {"accuracy": [0.1, 0.2, 0.3, 0.5, 0.4, 0.6]} for seed in (0, 1, 2)}
    rows = {
        0: {"accuracy": [0.3, 0.4]},
        1: {"accuracy": [0.3, 0.3]},
        2: {"accuracy": [0.0] * 5 + [0.9]},
        3: {"accuracy": [0.9]},
        4: {"failed": "round 1: loss is nan"},
    }
    assert rounds_needed(rows, baseline, by_accuracy=True) == ({0: 2, 1: None, 2: 6}, {0: 0.5, 2: 1.5})


def test_rounds_by_loss_are_downhill():
    baseline = {0: {"loss": [4.0, 2.0, 2.0, 2.0, 2.0, 2.0]}}
    assert rounds_needed({0: {"loss": [1.5]}}, baseline, by_accuracy=False) == ({0: 1}, {0: 0.5})


@pytest.mark.parametrize(("by_accuracy", "worst"), [(True, 20.0), (False, 0.6)])
def test_worst_site_has_the_least_accuracy_or_the_largest_loss(by_accuracy, worst):
    """Sites at 0.2 and 0.6: mean 0.4, standard deviation 0.2."""
    scale = 100 if by_accuracy else 1
    rows = {3: {"sites": {"a": 0.2, "b": 0.6}}, 4: {"failed": "round 1: loss is nan"}}
    mean, of_worst, spread = on_sites(rows, by_accuracy)
    assert (mean, of_worst, spread) == ({3: pytest.approx(0.4 * scale)}, {3: worst}, {3: pytest.approx(0.2 * scale)})


def test_growth_of_older_rows_is_known_of_whole_experts_alone():
    """They have the lengths of what was trained, by LoRA of factors, of which the product's cannot be told."""
    older = {"expert_norm": [2.0, 3.0], "settings": ["strategy=fedavg"]}
    assert growth(older | {"experts": "full"}) == 1.5
    assert growth(older | {"experts": "lora"}) is None
    measured = older | {"experts": "lora", "expert_growth": 1.25}
    assert growth(measured) == 1.25
    assert growth(measured | {"settings": ["strategy=local_only"]}) is None  # its global model never moves
