"""The benchmark of FLEx: what a cell measures, that a tie is an error, what the tables say."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest

from benchmarks import dolly_tasks
from benchmarks.cells import Outcome
from benchmarks.contenders import PERSONAL
from benchmarks.dolly_tasks import PARTITIONS, SIZES, TASKS, Size
from benchmarks.flex import Cell, graft_spread, report, run_cell, score, study_of
from benchmarks.flex_tables import markdown
from client.evaluation.measured import ExpertUse, Measured, RelativeCost, Score, Scored
from server.evaluation import put_together
from strategies.base import ClientUpdate

SMALL = ("model=tiny_moe", "data.template=plain", "lora.rank=4", "device=cpu", "rounds=1", "train.max_steps=1",
         "train.batch_size=2", "eval.num_answers=1", "eval.max_new_tokens=2",
         "eval.choices.max_questions=1", "eval.max_examples=2", "data.max_length=48")  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Tables with the columns of the real ones: forty rows of each task, others, and questions."""
    monkeypatch.setenv("BOUQUET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(SIZES, "tiny", Size(SMALL, {"train": 64, "validation": 32, "test": 32}, num_general=2))
    rows = [
        {"instruction": f"Do {n}.", "context": "", "response": f"{task} {n}", "category": task}
        for task in (*TASKS, "open_qa") for n in range(40)
    ]  # fmt: skip
    questions = [
        {"dataset": name, "question": f"Which {n}?", "choices": ["this", "that"], "answer": n % 2}
        for name in ("arc_easy", "piqa", "mmlu") for n in range(4)
    ]  # fmt: skip
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(folder / "dolly15k.parquet"))
    datasets.Dataset.from_list(questions).to_parquet(str(folder / "eval_mcq.parquet"))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("strategy", "model"), [("fedavg", "global"), ("flex", "personal")])
def test_a_test_cell_has_the_whole_matrix(data, strategy, model):
    cell = Cell("tiny", "pathological", (f"strategy={strategy}",), 0, "test")
    row = json.loads(json.dumps(run_cell(cell, data)))
    assert Cell.of(row) == cell
    found = {(each["of"], each["on"]) for each in row["evaluation"]["scores"] if each["model"] == model}
    sets = {*TASKS, "*general*", "*arc_easy*", "*piqa*"}
    own = TASKS if model == "personal" else (None,)
    assert found == {(of, on) for of in own for on in sets}
    assert row["bytes_up"] == row["bytes_down"] > 0
    assert row["graft_spread"].keys() == (set(TASKS) if strategy == "flex" else set())
    table = report_of({strategy: [row]})
    assert f"{row['evaluation']['summary'][model]['rouge_l']['mean']:.4f}" in table


@pytest.mark.slow
def test_a_validation_cell_has_the_losses_of_all_sites_and_never_sees_test_data(data):
    row = run_cell(Cell("tiny", "pathological", ("strategy=fedavg",), 0, "validation"), data)
    assert sorted(row["losses"]) == sorted(TASKS)
    assert score(row) == pytest.approx(-np.mean(list(row["losses"].values())))
    study = study_of("tiny", "pathological", [0], [100])
    assert {cell.split for cell in study.needed("fedavg")} == {"validation"}


def test_without_tuning_seeds_knobs_stay_where_they_start():
    study = study_of("words", "pathological", [3], [])
    (cell,) = study.needed("fedadam")
    assert (cell.seed, cell.split) == (3, "test")
    assert cell.settings == ("strategy=fedadam", "strategy.learning_rate=0.01", "train.learning_rate=0.004")


def update_of(site, **metrics):
    return ClientUpdate(site=site, adapter={}, num_examples=1, expert_tokens={}, metrics=metrics)


def test_a_tie_in_the_selection_is_an_error_that_names_the_site():
    updates = [update_of("a", graft_ties=0.0, graft_spread=0.25), update_of("b", graft_ties=2.0, graft_spread=0.0)]
    with pytest.raises(RuntimeError, match=r"is a tie at b: .* set model.upcycle.differentiate="):
        graft_spread(updates)
    assert graft_spread([updates[0], update_of("c")]) == {"a": 0.25}


def row_of(seed, losses, model="global"):
    """A test row; ROUGE-L is 1 less a tenth of the loss."""

    def scored(name, site, loss):
        found = Score(loss=loss, num_tokens=1, num_examples=1, rouge_l=1 - loss / 10, num_answers=1)
        return Scored(model=name, on=site, score=found)

    cost = RelativeCost(flops=1.5, seconds=2.0) if model == "personal" else None
    measured = {
        site: Measured(
            scores=(scored("base", site, 5.0), scored(model, site, loss)),
            cost=cost,
            routing={"mlp": ExpertUse((0.5, 0.5))},
        )
        for site, loss in losses.items()
    }
    here = [Scored(model=name, on="*piqa*", score=Score(accuracy=share, num_questions=4))
            for name, share in (("base", 0.75), (model, 0.5))]  # fmt: skip
    if model == "personal":
        measured["a"] = replace(measured["a"], scores=(*measured["a"].scores, here.pop()))
    return {"seed": seed, "bytes_up": 3000.0, "bytes_down": 4000.0, "graft_spread": {"a": 0.1} if cost else {},
            "evaluation": put_together(measured, here)}  # fmt: skip


def report_of(rows):
    tested = {name: Outcome((), {row["seed"]: row for row in rows.get(name, [])}) for name in PERSONAL}
    return markdown("tiny", tested, [0, 1])


def cells_of(table, title, which):
    lines = [line for line in table.splitlines() if line.startswith(f"| {title}")]
    return [cell.strip() for cell in lines[which].strip("|").split("|")]


def test_tables_show_the_model_in_use_paired_differences_and_costs():
    """FedAvg's ROUGE-L is 0.8 and 0.6 (mean .7) on its sites, FLEx's 0.9 and 0.8 (mean .85) with either seed; of the
    loss 2 and 4 (mean 3), and 1 and 2 (mean 1.5)."""
    table = report_of({
        "fedavg": [row_of(seed, {"a": 2.0, "b": 4.0}) for seed in (0, 1)],
        "flex": [row_of(seed, {"a": 1.0, "b": 2.0}, "personal") for seed in (0, 1)],
    })  # fmt: skip
    still = " ± 0.0000"
    assert cells_of(table, "FLEx, exact", 0)[1:9] == [
        "0.8500" + still, "+0.1500" + still, "0.9000" + still, "0.8000" + still, "0.8000" + still, "0.0500" + still,
        "1.5000" + still, "-1.5000" + still,
    ]  # fmt: skip
    assert cells_of(table, "FedAvg |", 0)[1:3] == ["0.7000" + still, ""]
    assert cells_of(table, "base model", 0)[1] == "0.5000" + still
    assert cells_of(table, "FLEx, exact", 1)[1:] == [
        "0.5000" + still, "3.0 ± 0.0", "4.0 ± 0.0", "1.000 ± 0.000", "0.500 ± 0.000", "1.500 ± 0.000", "2.00 ± 0.00",
        "0.1000" + still,
    ]  # fmt: skip
    assert cells_of(table, "FedAvg |", 1)[-1] == ""
    assert cells_of(table, "base model", 1)[1] == "0.7500" + still
    assert cells_of(table, "FedProx", 0)[1] == "missing"


def test_score_is_the_loss_of_the_model_in_use():
    assert score(row_of(0, {"a": 1.0, "b": 2.0}, "personal")) == -1.5
    assert score({"losses": {"a": 1.0, "b": 4.0}}) == -2.5
    assert score({"failed": "round 1: loss is nan"}) == -float("inf")


def test_diverged_and_missing_seeds_are_told():
    table = report_of({"fedavg": [row_of(0, {"a": 2.0})], "fedprox": [{"seed": 0, "failed": "round 1: loss is nan"}]})
    assert cells_of(table, "FedAvg (1 of 2 seeds missing)", 0)[1] == "0.8000"
    assert cells_of(table, "FedProx", 0)[1] == "diverged"
    assert "| FLEx as printed | missing |" in table


def test_every_partition_has_a_report_before_any_run():
    for partition in PARTITIONS:
        assert "missing" in report(study_of("words", partition, [0], [100]), "words", partition)["markdown"]
    assert len({dolly_tasks.version_of(*of) for of in itertools.product(SIZES, PARTITIONS)}) == 6
