"""FC-MoE's ablation in the layout of the paper's: that it is that of the cells, and what stands in a line."""

from __future__ import annotations

import json

from benchmarks import fc_moe_ablation
from benchmarks.fc_moe_ablation import main, table
from benchmarks.render import HERE
from tests.benchmarks.made_up_runs import outcome


def test_table_is_that_of_the_cells():
    """Whoever runs more, or adds a contender, makes it anew."""
    assert json.loads((HERE / "results" / "ablation_fc_moe.json").read_text()) == {"table": table()}


def test_variants_stand_below_each_other_beside_what_is_printed(monkeypatch, tmp_path):
    """Over the seeds that all have: the whole method's second one is not shown. Nothing is known of MMLU."""
    known = {
        "ag_news": {"fc_moe": outcome(0.5, 0.9), "fc_moe_no_projection": outcome(0.25), "fedavg": outcome(0.7)},
        "mcq": {},
    }
    monkeypatch.setattr(fc_moe_ablation, "stored_tests", lambda workload, _: known[workload])
    monkeypatch.setattr(fc_moe_ablation, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["fc_moe_ablation"])
    main()
    written = json.loads((tmp_path / "results" / "ablation_fc_moe.json").read_text())["table"]
    ours = ["AG News, LoRA, 1 seeds", "AG News, whole experts, 1 seeds", "MMLU, LoRA"]
    assert written["columns"] == ["variant", *ours, "AG News, printed", "MMLU, printed"]
    assert [line[:2] for line in written["rows"]] == [
        ["- consensus projection", "0.2500 / 0.2500"],
        ["- local retention", "missing"],
        ["- importance weighting", "missing"],
        ["full", "0.5000 / 0.5000"],
    ]
    assert written["rows"][-1][3:] == ["missing", ".8359 / .6732", ".3764 / .3559"]
