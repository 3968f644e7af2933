"""Run folders of a few random rounds, written as a run writes them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from server.record import RunFolder
from strategies.base import ClientUpdate
from strategies.diagnostics import round_diagnostics
from strategies.fc_moe import FcMoe

LAYERS = {"model.layers.0.mlp": 4, "model.layers.1.mlp": 4}
NASTY = '</script><img src=x onerror="document.title=1"> & {{ 7 * 7 }}'
SITES = ["bank", "clinic", NASTY]


def write_run(
    path, strategy=None, *, seed=0, rounds=3, sites=SITES, layers=LAYERS, status="completed", share=None, beta=1,
    extras_of=None,
):  # fmt: skip
    """A run's folder with metrics, diagnostics, summary and settings; returns it.

    With ``share`` it has two objectives, the first preferred by that much. ``extras_of`` makes what a site sends beside
    its adapter.
    """
    strategy = strategy or FcMoe()
    folder = RunFolder(path)
    folder.create()
    method = "" if share is None else f"method:\n  beta: {beta}\n  preference: [{share}, {round(1 - share, 6)}]\n"
    folder.write_text("config.yaml", f"seed: {seed}  # <b>not bold</b>\n{method}")
    rng = np.random.default_rng(seed)
    adapter = {
        f"{layer}.experts.down_proj.lora_{end}": np.zeros((count, *shape), np.float32)
        for layer, count in layers.items()
        for end, shape in (("A", (2, 5)), ("B", (6, 2)))
    }
    adapter |= {"model.layers.0.mlp.gate.weight": np.ones((4, 5), np.float32)}
    state = strategy.init_state(adapter)
    for number in range(rounds + 1):
        losses = {site: 3.0 / (number + 1) + index for index, site in enumerate(sites)}
        if number:
            updates = [_update(rng, site, adapter, layers) for site in sites]
            if extras_of is not None:
                updates = [replace(update, extras=extras_of(update)) for update in updates]
            result = strategy.aggregate(adapter, state, updates)
            folder.append_diagnostics({"round": number, **round_diagnostics(adapter, updates, result)})
            adapter, state = result.adapter, result.state
            for site, loss in losses.items():
                row = {"type": "site", "round": number, "site": site, "loss": loss, "bytes_up": 900, "bytes_down": 2000}
                row |= {} if share is None else _objectives(share, beta, number, sites.index(site))
                folder.append_row(row | ({"dropped": "late"} if (site, number) == ("bank", 2) else {}))
        kinds = {"up": {"experts": 2000, "router": 100}, "down": {"experts": 4000, "router": 2000}}
        folder.append_row({
            "type": "round", "round": number, "global_loss": 3.0 / (number + 1),
            "aggregation_gap": 0.5 if number else None,
            "drift": 0.1 * number if number and share is not None else None,
            "bytes_up": 2700 if number else 0, "bytes_down": 6000 if number else 0,
            "bytes_by_kind": kinds if number else {"up": {}, "down": {}},
        })  # fmt: skip
    summary = {
        "status": status, "error": None if status == "completed" else "clinic went away", "strategy": "fc_moe",
        "global_loss": 0.75, "site_loss": losses, "wall_seconds": 12.4,
        "bytes_up": 2700 * rounds, "bytes_down": 6000 * rounds, "num_sites": len(sites),
    }  # fmt: skip
    folder.write_text("summary.json", json.dumps(summary))
    return path


def _objectives(share, beta, number, place):
    """Rewards near a quarter circle, reached in three rounds; weights that are further apart with a small beta."""
    apart = 0.1 * (place - 1) / beta
    angle = (1 - share) * np.pi / 2
    reached = min(number, 3) / 3 - 0.01 * place
    return {
        "reward/brevity": reached * np.cos(angle), "reward/format": reached * np.sin(angle), "kl": 0.1 * number,
        "lambda/brevity": share + apart, "lambda/format": 1 - share - apart,
    }  # fmt: skip


def _update(rng, site, adapter, layers):
    trained = {name: array + rng.normal(size=array.shape).astype(np.float32) for name, array in adapter.items()}
    tokens = {layer: rng.integers(0, 2000, count).astype(np.float64) for layer, count in layers.items()}
    return ClientUpdate(site=site, adapter=trained, num_examples=5, expert_tokens=tokens)


def rewritten(path, change):
    """Change every line of a file of JSON lines."""
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
