"""Tests that were run anew: that the stored tables are those of their cells."""

from __future__ import annotations

import json

import pytest

from benchmarks import fc_moe, fc_moe_again, fc_moe_fresh
from benchmarks.cells import stored_rows
from benchmarks.fc_moe import stored, study_of
from benchmarks.fc_moe_tested import tuning_of
from benchmarks.render import HERE

REPORTS = {"again": fc_moe_again.report, "fresh": fc_moe_fresh.report}
PATHS = [path for kind in REPORTS for path in sorted((HERE / "results").glob(f"{kind}_*.jsonl"))]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_table_is_that_of_the_cells(path):
    """Whoever changes what stands, or tests more, makes it anew."""
    kind, *workload, experts = path.stem.split("_")
    of = "_".join(workload), experts
    before = stored(*of, [], [100])
    now = tuning_of(before, study_of(*of, [], [100]))
    for row in stored_rows(path):
        now.add(row)
    assert len(now.rows) == len(stored_rows(path)) + sum(row["split"] == "validation" for row in before.rows.values())
    made = REPORTS[kind](fc_moe.tested_of(before, *of), fc_moe.tested_of(now, *of))
    assert json.loads(path.with_suffix(".json").read_text()) == made
