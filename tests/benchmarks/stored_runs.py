"""Runs of FC-MoE's benchmark as they are stored, made up; and what commands that test anew compute beside them."""

from __future__ import annotations

import json
from dataclasses import asdict

from benchmarks import fc_moe, fc_moe_again
from benchmarks.cells import Outcome
from benchmarks.fc_moe import study_of

DIVERGED = {"failed": "round 1: loss is nan"}


def measured(accuracy, loss=1.0, sites=None):
    """A row of six rounds that are all alike."""
    return {"accuracy": [accuracy] * 6, "loss": [loss] * 6, "sites": sites or {"a": accuracy}}


def outcome(*rows):
    """Of the seeds from 0, rows or accuracies."""
    return Outcome((), {seed: row if isinstance(row, dict) else measured(row) for seed, row in enumerate(rows)})


def told(cells):
    """Of cells the means alone."""
    return [cell.split(" ±")[0] if isinstance(cell, str) else cell for cell in cells]


def store(monkeypatch, folder):
    """Runs of FedAvg and FedMoE of two seeds below ``folder``, tuned to a rate of 0.008; cells that are computed."""
    study = study_of("clinc", "full", [0, 1], [100])
    rows = []
    for name in ("fedavg", "fedmoe"):
        while needed := study.needed(name):
            for cell in needed:
                rate = float(cell.settings[-1].partition("=")[2])
                rows.append(asdict(cell) | measured(0.5 - abs(rate - 0.008)) | {"settings": [*cell.settings]})
                study.add(rows[-1])
    (folder / "results").mkdir()
    path = folder / "results" / "fc_moe_clinc_full.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for module in (fc_moe, fc_moe_again):
        monkeypatch.setattr(module, "HERE", folder)
    cells = []

    def run(cell, data, device):
        assert device == "somewhere"
        cells.append(cell)
        return asdict(cell) | measured(0.6)

    monkeypatch.setattr(fc_moe_again, "run_cell", run)
    return cells
