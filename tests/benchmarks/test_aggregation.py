"""The benchmark of aggregation at a tiny size: what it compares does the same, and its table can be rendered."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import conf.compose
from benchmarks import aggregation
from benchmarks.aggregation import BESIDE, FLOWER, SLOW, STRATEGIES, Replies, measure, peak_of_a_process, row, table
from benchmarks.made_up_round import Size, sent
from benchmarks.render import rendered
from client.records import to_arrays
from strategies.centralised import Centralised
from strategies.fedavg import FedAvg
from strategies.local_only import LocalOnly

TINY = Size(sites=3, layers=1, hidden=8, width=4, experts=2, rank=2)


def test_flower_and_our_fedavg_give_the_sites_the_same():
    replies = Replies(TINY, [FLOWER, "fedavg"])
    flowers = {name: array.numpy() for name, array in replies.work(FLOWER).items()}
    ours = to_arrays(replies.work("fedavg"))
    assert ours.keys() == flowers.keys() == TINY.shapes().keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, flowers[name], atol=1e-6)


def test_default_size_is_the_one_of_the_goal():
    assert Size().mebibytes() == pytest.approx(52, rel=0.02)
    update = next(sent(TINY))
    assert sum(array.nbytes for array in update.adapter.values()) == TINY.mebibytes() * 2**20


def test_every_strategy_has_a_row_or_aggregates_as_one_that_has_or_not_at_all():
    measured = {type(strategy) for strategy in STRATEGIES.values()}
    others = {strategy for strategy in conf.compose.STRATEGIES if strategy not in measured}
    assert {strategy.name for strategy in others} == {
        "fedprox", "firm", "flex", "pfl_moe", "local_only", "centralised",
    }  # fmt: skip
    for strategy in others - {LocalOnly, Centralised}:
        assert strategy.aggregate is FedAvg.aggregate


def test_every_strategy_is_measured_by_turns_and_shown():
    names = [FLOWER, *STRATEGIES, *BESIDE]
    seconds = measure(TINY, names, turns=5)
    assert all(len(seconds[name]) == (1 if name in SLOW else 5) and min(seconds[name]) > 0 for name in names)
    shown = table({name: row(seconds[name], seconds[FLOWER], 2**20) for name in names})
    page = rendered("<!-- a -->\n<!-- /a -->", "a", shown["columns"], shown["rows"])
    assert page.count("\n| ") == len(names) + 2
    assert shown["rows"][0][3:] == ["1.00", "1"]


@pytest.mark.slow
def test_peak_is_that_of_another_process():
    """16 MiB a site more are at least 16 MiB more for the mean."""
    small, large = (peak_of_a_process("fedavg", Size(2, 1, 8, 4, 2, rank)) for rank in (1, 2**16))
    assert large - small > 2**24


def test_results_hold_command_size_and_table(tmp_path, monkeypatch):
    monkeypatch.setattr(aggregation, "peak_of_a_process", lambda name, size: 2**20)
    words = ["--sites=2", "--layers=1", "--hidden=8", "--width=4", "--experts=2", "--rank=1"]
    path = tmp_path / "a.json"
    monkeypatch.setattr(sys, "argv", ["x", *words, "--strategies", "fc_moe", "--json", str(path)])
    aggregation.main()
    results = json.loads(path.read_text())
    assert results["command"].startswith("python -m benchmarks.aggregation --sites=2")
    assert results["size"]["experts"] == 2
    assert [cells[0] for cells in results["table"]["rows"]] == [FLOWER, "fc_moe"]
    monkeypatch.setattr(sys, "argv", ["x", "--turns=2"])
    with pytest.raises(SystemExit):
        aggregation.main()
