"""The benchmark of FIRM on a language model: its cells, FSMGDA beside FedCMOO at a tiny size, and its tables."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.federation import simulated
from benchmarks.firm import Apart, evaluated, played, report, run_cell, train_missing_heads
from benchmarks.firm_contenders import BETWEEN, CONTENDERS, WORKLOADS, Cell, Workload, cells
from benchmarks.firm_tables import Runs, markdown
from benchmarks.render import HERE
from client.alignment.reward_models import LinearHead
from conf.compose import load_config
from strategies.adapters import difference, dot
from strategies.fedavg import mean_by_examples
from tests.client.tiny_models import save_tiny_base


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """A workload whose cells say all that is set."""
    monkeypatch.setitem(WORKLOADS, "toy", Workload((), ("length", "format"), None))


@pytest.mark.parametrize("workload", ["tiny", "heads", "smollm2"])
def test_every_cell_is_a_run_of_its_own_with_valid_settings(workload, monkeypatch):
    # The data of another benchmark's workload are made from data sets that a clone lacks; ``test_fc_moe`` has them.
    monkeypatch.setattr("benchmarks.workloads.Workload.source", lambda *_: ["data.path=embedded"])
    found = cells(list(CONTENDERS), workload, WORKLOADS[workload].rewards, [0, 1], "cpu")
    assert len(set(found)) == len(found)
    left_out = {"tiny": {"dpo"}, "heads": {name for name, of in CONTENDERS.items() if not of.is_main}, "smollm2": set()}
    assert {cell.contender for cell in found} == CONTENDERS.keys() - left_out[workload]
    assert not any(str(HERE) in setting for cell in found for setting in cell.settings)
    for cell in found[: len(found) // 2 : 14]:
        config = load_config(cell.overrides(Path("../shared/data")))
        assert config.method.num_objectives() == 2
        assert Cell.of(json.loads(json.dumps(vars(cell)))) == cell


def test_methods_come_before_sweeps_and_seeds_in_turn():
    found = cells(list(CONTENDERS), "tiny", ["length", "format"], [0, 1], "cpu")
    order = [(not CONTENDERS[cell.contender].is_main, cell.seed) for cell in found]
    assert order == sorted(order)


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
    assert {array.dtype for array in apart.adapter.values()} == {np.dtype(np.float32)}
    assert {"reward/length", "reward/format", "kl"} <= evaluated(apart).keys()
    assert [len(groups) for groups in played(apart)] == [2]


def pairs_file(folder):
    """Pairs of which half were judged by each of the two rewards."""
    rows = [
        {"instruction": f"Say {number}.", "response": "a long one {}" if number % 2 else "no", "worse": "?{}",
         "by": ["length", "format"][number % 2]}
        for number in range(40)
    ]  # fmt: skip
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f"data.path={path}", "data.prompt_column=instruction", "data.context_column=null", "data.rejected_column=worse",
        "data.objective_column=by",
    )  # fmt: skip


@pytest.mark.slow
def test_heads_that_are_missing_are_trained_on_the_pairs_of_their_objective_and_told_of(tmp_path, monkeypatch):
    path, *columns = pairs_file(tmp_path)
    base = tuple(word for word in tiny(tmp_path, "") if word.startswith(("model", "data.template")))
    source = path.removeprefix(f"data.path={tmp_path}/")
    monkeypatch.setitem(WORKLOADS, "toy", Workload(tuple(columns), ("length", "format"), source, base=base))
    rewards = [f"length:{tmp_path / 'length'}", f"format:{tmp_path / 'format'}", "brevity"]
    before = WORKLOADS["toy"].version(rewards)
    train_missing_heads("toy", rewards, tmp_path, "cpu")
    assert before == "" != WORKLOADS["toy"].version(rewards)
    weights = [LinearHead.load(tmp_path / name).weight_D for name in ("length", "format")]
    assert not torch.equal(*weights)
    (tmp_path / "pairs.jsonl").unlink()
    train_missing_heads("toy", rewards, tmp_path, "cpu")
    page = report("toy", rewards, [row("firm_smooth", 0.5, 0, 1, 2)])["markdown"]
    assert page.count("Head `") == 2
    assert re.search(r"Head `format`, of \d+ pairs; accuracy: training [01]\.\d{3}, held_out [01]\.\d{3}", page)


@pytest.mark.slow
def test_dpo_is_trained_on_pairs_and_measured_as_firm_is(tmp_path):
    """By hand: a run of DPO, whose adapter a site of FIRM evaluates."""
    words = (*tiny(tmp_path, "strategy=firm"), *pairs_file(tmp_path))
    row = run_cell(Cell("toy", "dpo", 0.3, 0, words, ""), tmp_path)
    plain = [word for word in words if not word.startswith(("strategy=", "method."))]
    mixed = ["strategy=fedavg", "method=dpo", "method.objectives=[length,format]", "method.preference=[0.3,0.7]"]
    dpo = simulated(load_config([*mixed, *plain]), tmp_path / "dpo")
    firm = simulated(load_config([*words, "method.preference=[0.3,0.7]"]), tmp_path / "firm")
    for end in row["ends"]:
        dpo.play()
        rewards = [site.evaluate(dpo.adapter)[name].metrics for name, site in firm.sites.items()]
        assert end == {
            name.removeprefix("held_out_"): pytest.approx(np.mean([one[name] for one in rewards]), rel=1e-6)
            for name in rewards[0]
        }
    assert row["ends"][-1]["kl"] != 0
    assert (row["uploads"], row["disagreement"], row["kl"]) == (1, [], [])
    assert "| DPO on pairs, mixed by preference |" in report("smollm2", ("a", "b"), [row])["markdown"]


@pytest.mark.slow
def test_rows_tell_rewards_disagreement_and_uploads(tmp_path):
    """FedCMOO sends its gradients beside the adapter, and its sites agree by construction."""
    rows = [
        run_cell(Cell("toy", name, 0.5, 0, tiny(tmp_path, f"strategy={strategy}"), ""), tmp_path)
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
        "uploads": 1.0, "seconds": 3.0, "start": [0.0, 0.0],
    }  # fmt: skip


FRONT = ((0.1, 1, 4), (0.5, 2, 2), (0.9, 3, 1))
"""Above (0, 0) they dominate 4 + 2 + 1 = 7, at 0.5 alone 4."""


def test_table_by_hand():
    """b has a run at 0.5 alone, where it is worse than the base in one reward; c lacks one of two preferences."""
    front = Runs("A", (0.1, 0.5, 0.9), [row("a", share, 0, *point) for share, *point in FRONT])
    failed = {"contender": "b", "share": 0.5, "seed": 1, "failed": "round 1: nan"}
    others = [
        Runs("B", (0.5,), [row("b", 0.5, 0, -1, 9), failed]),
        Runs("C", (0.1, 0.9), [row("c", 0.1, 0, 1, 1)]),
        Runs("D", (0.5,), [row("d", 0.5, 0, 1, 1) | {"disagreement": []}]),
    ]
    page = markdown([front, *others], [])
    assert "| A | 3 | 7 | 7 | 4 | 7 | 1.00 | 0 | 1 | 0.1 | 1.00 | 3 |" in page
    assert "| A | 0.9 | 3 | 1 | 0.1 | 1 |" in page
    assert "| B | 1 | 0 |  | 0 | 0 |  | 0 | 1 |" in page
    assert "| C | 2 |  |  |  |  |  |  |  |  | 1.00 |" in page
    assert "| D | 1 | 1 |  | 1 | 1 |  |  | 1 |" in page
    assert "The untrained base: x 0, y 0." in page
    assert "Failed: B, seed 1: round 1: nan" in page
    assert markdown([Runs("B", (0.5,), [failed])], []) == "No run has finished."


def test_volumes_are_above_each_seeds_own_base():
    """From (0, 0) the front dominates 7; from (1, 1) only (2, 2) is left, with 1: a mean of 4."""
    rows = [row("a", share, 0, *point) for share, *point in FRONT]
    rows += [row("a", share, 1, *point) | {"start": [1.0, 1.0]} for share, *point in FRONT]
    runs = Runs("A", (0.1, 0.5, 0.9), rows)
    assert "| A | 3 | 4 ± 38 | 4 ± 38 | 2.5 ± 19 | 7 ± 0 |" in markdown([runs], [])


def test_a_preference_is_respected_within_noise_in_both_rewards():
    """Of four changes the second of the first reward, -0.5, goes against it; +0.01 of the other does not."""
    runs = Runs("A", (0.1, 0.5, 0.9), [row("a", 0.1, 0, 1, 1), row("a", 0.5, 0, 2, 1.01), row("a", 0.9, 0, 1.5, 0)])
    assert "| 0.75 | 0 | 1 | 0.1 |" in markdown([runs], [])


def test_pairs_differ_at_the_rivals_preferences():
    """Seed 1 of the leader lacks c's second preference; the leader's volume at 0.5 is 4, at 0.1 and 0.9 it is 6."""
    leader = Runs("F", (0.1, 0.5, 0.9), [row("f", share, 0, *point) for share, *point in FRONT])
    leader.rows.append(row("f", 0.5, 1, 2, 2))
    one = Runs("B", (0.5,), [row("b", 0.5, seed, 1, 1) | {"drift": [3.0]} for seed in (0, 1)])
    two = Runs(
        "C", (0.1, 0.9), [row("c", share, s, 1, 1) | {"disagreement": []} for share in (0.1, 0.9) for s in (0, 1)]
    )
    page = markdown([leader, one, two], [(leader, [one, two])])
    assert "| B | 0.5 | +3.0000 ± 0.0000 | +3.0000 ± 0.0000 | -2.0000 ± 0.0000 | +0.0000 ± 0.0000 | 2 |" in page
    assert "| B | 0.1, 0.5, 0.9 against its one end | +6.0000 | +6.0000 | -2.0000 | +0.0000 | 1 |" in page
    assert "| C | 0.1, 0.9 | +5.0000 | +5.0000 | +0.0000 |  | 1 |" in page


def test_runs_between_count_with_those_that_they_add_to():
    """(2, 2) between (1, 4) and (3, 1): of the nine preferences three are there, so the sum is not told yet."""
    rows = [row("scalarised", share, 0, *point) for share, *point in (FRONT[0], FRONT[2])]
    rows += [row("scalarised_between", share, 0, 2, 2) for share in BETWEEN]
    assert "| linear scalarisation, nine preferences | 9 |  |" in report("tiny", ("x", "y"), rows)["markdown"]
    rows += [row("scalarised", share, 0, 0, 0) for share in (0.3, 0.5, 0.7)]
    page = report("tiny", ("x", "y"), rows)["markdown"]
    assert "| linear scalarisation, nine preferences | 9 | 7 |" in page
    assert "| linear scalarisation, nine preferences | 0.4 | 2 | 2 | 0.1 | 1 |" in page
    assert "| linear scalarisation, nine preferences | 0.1 | 1" not in page  # stands with those of the five
