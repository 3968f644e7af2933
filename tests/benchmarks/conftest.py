"""What commands that test anew find stored, and what they compute beside it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from benchmarks import fc_moe, fc_moe_tested
from benchmarks.fc_moe import study_of
from tests.benchmarks.made_up_runs import measured


@pytest.fixture
def tested_now(monkeypatch, tmp_path):
    """Cells that are computed; runs of FedAvg and FedMoE, two seeds, tuned to a rate of 0.008, lie in ``tmp_path``."""
    study = study_of("clinc", "full", [0, 1], [100])
    rows = []
    for name in ("fedavg", "fedmoe"):
        while needed := study.needed(name):
            for cell in needed:
                rate = float(cell.settings[-1].partition("=")[2])
                rows.append(asdict(cell) | measured(0.5 - abs(rate - 0.008)) | {"settings": [*cell.settings]})
                study.add(rows[-1])
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "fc_moe_clinc_full.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for module in (fc_moe, fc_moe_tested):
        monkeypatch.setattr(module, "HERE", tmp_path)
    cells = []

    def run(cell, data, device):
        assert device == "somewhere"
        cells.append(cell)
        return asdict(cell) | measured(0.6)

    monkeypatch.setattr(fc_moe_tested, "run_cell", run)
    return cells
