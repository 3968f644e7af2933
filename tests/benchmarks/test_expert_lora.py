"""The benchmark of expert LoRA at a tiny size: that all three variants train, and which number is over which."""

from __future__ import annotations

import pytest

from benchmarks import expert_lora
from benchmarks.expert_lora import VARIANTS, Size, _print_peak, _ratios, measure, rows

TINY = Size(2, 32, 16, 4, 2, 2, 8, 2, 50, "float32")


@pytest.fixture(scope="module")
def results():
    """Five steps of each; peak memory, which takes processes of their own, is made up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            expert_lora, "_peak_of_a_process", lambda name, size: {"peft": 400, "ours": 100, "floor": 80}[name]
        )
        return measure(TINY, "cpu", 5)


def test_ours_computes_what_peft_computes(results):
    assert results["difference_from_peft"].keys() == {"outputs", "gradients"}
    assert max(results["difference_from_peft"].values()) < 1e-5


def test_every_variant_is_measured_in_all_turns(results):
    assert results["variants"].keys() == set(VARIANTS)
    assert {len(row["samples"]) for row in results["variants"].values()} == {5}
    assert results["ratio_step_vs_peft"] > 0
    assert results["ratio_step_vs_floor"] > 0
    assert results["ratio_memory_vs_peft"] == 0.25
    assert "0.25 of PEFT's memory" in rows(results)


def test_ratios_by_hand():
    """PEFT's step over ours is 2, 3 and 2, ours over the floor's 2, 1 and 1.5: a turn slow for all counts once."""
    samples = {"peft": [2.0, 3.0, 30.0], "ours": [1.0, 1.0, 15.0], "floor": [0.5, 1.0, 10.0]}
    memory = {"peft": 8, "ours": 4, "floor": 2}
    found = _ratios({name: {"samples": samples[name], "peak_memory_bytes": memory[name]} for name in VARIANTS})
    assert found == {
        "ratio_step_vs_peft": 2.0,
        "ratio_step_vs_floor": 1.5,
        "ratio_memory_vs_peft": 0.5,
        "ratio_memory_vs_floor": 2.0,
    }


def test_peak_memory_is_printed_in_bytes(capsys):
    _print_peak("ours", TINY)
    assert 1 << 20 < int(capsys.readouterr().out) < 1 << 40
