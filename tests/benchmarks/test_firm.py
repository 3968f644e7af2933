"""The benchmark of FIRM on a language model: its cells, FSMGDA beside FedCMOO at a tiny size, and its tables."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.firm import CONTENDERS, REWARDS, WORKLOADS, Apart, Cell, cells, evaluated, played, report, run_cell
from benchmarks.firm_tables import markdown
from conf.compose import load_config
from strategies.adapters import difference, dot
from strategies.fedavg import mean_by_examples
from tests.client.tiny_models import save_tiny_base


@pytest.mark.parametrize("workload", WORKLOADS)
def test_every_cell_is_a_run_of_its_own_with_valid_settings(workload):
    found = cells(list(CONTENDERS), workload, REWARDS[workload], [0, 1], "cpu")
    assert len(set(found)) == len(found)
    for cell in found[: len(found) // 2 : 14]:
        config = load_config([*cell.settings, f"seed={cell.seed}"])
        assert config.method.num_objectives() == 2
        assert Cell.of(json.loads(json.dumps(vars(cell)))) == cell


def tiny(folder, strategy, *words):
    base = save_tiny_base(folder / "base", "olmoe")
    return (
        strategy, f"model.name={base.name}", "model.source=hub", "data.template=plain", "data.num_examples=40",
        "data.max_length=64", "partition=iid", "partition.num_sites=2", "rounds=2", "lora.rank=2", "train.max_steps=1",
        "train.batch_size=2", "eval.max_examples=4", "method.rewards=[length,format]", "method.group_size=2",
        "method.max_new_tokens=4", "method.eval_prompts=2", "train.num_threads=1", *words,
    )  # fmt: skip


@pytest.mark.slow
def test_fsmgda_steps_along_the_least_combination_of_separate_changes(tmp_path):
    words = tiny(tmp_path, "strategy=firm", "method.beta=inf")
    apart, again = Apart(words, tmp_path / "one"), Apart(words, tmp_path / "two")
    start = apart.adapter
    one, two = (difference(mean_by_examples(federation.train(1)), start) for federation in again._alone)
    next(apart.rounds())
    share = np.clip(dot(two, difference(two, one)) / dot(difference(one, two), difference(one, two)), 0, 1)
    for name, array in apart.adapter.items():
        expected = start[name] + share * one[name] + (1 - share) * two[name]
        np.testing.assert_allclose(array, expected, atol=1e-6)
    assert apart.bytes_up == 2 * 2 * sum(array.nbytes for array in start.values())
    assert {"reward/length", "reward/format", "kl"} <= evaluated(apart).keys()
    assert [len(groups) for groups in played(apart)] == [2]


@pytest.mark.slow
def test_rows_tell_rewards_disagreement_and_uploads(tmp_path):
    """FedCMOO sends its gradients beside the adapter, and its sites agree by construction."""
    rows = [
        run_cell(Cell(name, 0.5, 0, tiny(tmp_path, f"strategy={strategy}")))
        for name, strategy in (("mgda", "firm"), ("fedcmoo", "fedcmoo"))
    ]
    assert rows[0]["uploads"] == 1
    assert rows[1]["uploads"] == pytest.approx(2, rel=0.01)
    assert rows[1]["disagreement"] == [0.0, 0.0]
    assert all(len(row["ends"]) == len(row["drift"]) == 2 for row in rows)
    page = report("tiny", ("length", "format"), json.loads(json.dumps(rows)))["markdown"]
    assert "| FedCMOO |" in page


def row(contender, share, seed, first, second):
    end = {"reward/x": first, "reward/y": second, "kl": 0.1}
    return {
        "contender": contender, "share": share, "seed": seed, "ends": [end], "disagreement": [0.0], "drift": [1.0],
        "uploads": 1.0, "seconds": 3.0,
    }  # fmt: skip


def test_table_by_hand():
    """Reference (0, 0), the least of all; the front of a is (1, 4), (2, 2), (3, 1): 4 + 2 + 1 = 7, at 0.5 alone 4."""
    rows = [row("a", 0.1, 0, 1, 4), row("a", 0.5, 0, 2, 2), row("a", 0.9, 0, 3, 1), row("b", 0.5, 0, 0, 0)]
    rows.append({"contender": "b", "share": 0.5, "seed": 1, "failed": "round 1: nan"})
    page = markdown(rows, {"a": "A", "b": "B"})
    assert "| A | 7 | 4 | 1.00 | 0 | 1 | 0.1 | 1.00 | 3 |" in page
    assert "| A | 0.9 | 3 | 1 | 1 |" in page
    assert "| B | 0 | 0 |  | 0 | 1 |" in page
    assert "Failed: B, seed 1: round 1: nan" in page
    assert markdown(rows[-1:], {"b": "B"}) == "No run has finished."
