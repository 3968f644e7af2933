"""The study of FC-MoE: what is computed, what a restart skips, what the tables say."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks import fc_moe
from benchmarks.cells import Outcome
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe import Cell, compared, report, run_cell, study_of
from benchmarks.fc_moe_averaging import MEASURES
from benchmarks.fc_moe_tables import ablation, averaging, comparison, one_knob_changed, sites, summary
from benchmarks.provenance import MADE_BY
from benchmarks.workloads import WORKLOADS, Workload


def row(seed, accuracy, **changes):
    curve = [accuracy] * 6
    facts = {"accuracy": curve, "loss": [1 - accuracy] * 6, "sites": {"a": accuracy, "b": accuracy / 2}}
    of_run = {"seed": seed, "bytes": 2e6, "experts": "full", "expert_norm": [2.0, 3.0]}
    return facts | of_run | {"settings": ["train.learning_rate=1"]} | changes


def cells_of(table, title):
    line = next(line for line in table.splitlines() if line.startswith(f"| {title}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_pairs_by_seed_and_says_what_is_missing():
    """Differences 0.2 and 0.0 of seeds 1 and 2: mean 10 points, though the means over all seeds differ by 0.15."""
    tested = {name: Outcome((), {}) for name in CONTENDERS}
    tested["fedavg"] = Outcome(("train.learning_rate=1",), {0: row(0, 0.6), 1: row(1, 0.4), 2: row(2, 0.5)})
    tested["fc_moe"] = Outcome((), {1: row(1, 0.6), 2: row(2, 0.5)})
    tested["fedprox"] = Outcome((), {0: {"failed": "round 2: loss is nan"}})
    tested["fc_moe_plus_as_shipped"] = Outcome((), {1: row(1, 0.65), 2: row(2, 0.65)})
    table = comparison("title", tested, [0, 1, 2])
    fedavg, ours = cells_of(table, "FedAvg |"), cells_of(table, "FC-MoE (2")
    assert fedavg[1].startswith("50.0 ±")
    assert fedavg[-1] == "lr=1"
    assert ours[0] == "FC-MoE (2 of 3 seeds)"
    assert ours[2].startswith("+10.0 ±")
    assert ours[3].startswith("+10.0 ±")  # 5 and 15
    assert (fedavg[3].split(" ")[0], cells_of(table, "FC-MoE plus, as shipped")[3]) == ("+20.0", "")
    assert (fedavg[5], ours[5].split(" ±")[0]) == ("0.500", "0.450, -0.100")
    assert (fedavg[6], ours[6:9]) == ("1.0", ["1.0, x 1.00 ± 0.00", "2.0", "x 1.50"])
    assert cells_of(table, "FedProx")[1] == "diverged"
    assert cells_of(table, "FedAdam")[1] == "missing"


def test_rules_on_factors_are_compared_by_lora_alone():
    by_lora, in_full = set(compared("clinc", "lora")), set(compared("clinc", "full"))
    of_factors = {"fc_moe_product", "fc_moe_in_products", "fc_moe_component", "fc_moe_plus_whole_factors"}
    assert by_lora - in_full == of_factors
    assert in_full < by_lora == CONTENDERS.keys() - {"fedavgm_momentum_0.3"}


def test_growth_of_experts_is_shown_of_runs_that_measured_it():
    lora = {0: row(0, 0.6, experts="lora"), 1: row(1, 0.6, experts="lora", expert_growth=1.25)}
    tested = {"fedavg": Outcome((), lora), "fc_moe": Outcome((), {0: lora[0]})}
    table = comparison("title", tested, [0])
    assert cells_of(table, "FedAvg |")[8] == "x 1.25 (of 1)"
    assert cells_of(table, "FC-MoE |")[8] == ""


def test_rounds_to_fedavgs_end_have_a_ratio_to_its_own_where_several_seeds_get_there():
    """FedAvg's mean of its last five is 0.56, which it reaches in round 2; FC-MoE in 1 and 3, FC-MoE plus once in 1."""
    late = [0.0, 0.0, 0.9, 0.9, 0.9, 0.9]
    tested = {
        "fedavg": Outcome((), {seed: row(seed, 0.6) | {"accuracy": [0.2, 0.7, 0.6, 0.5, 0.5, 0.5]} for seed in (0, 1)}),
        "fc_moe": Outcome((), {0: row(0, 0.6), 1: row(1, 0.6) | {"accuracy": late}}),
        "fc_moe_plus": Outcome((), {0: row(0, 0.6), 1: row(1, 0.5)}),
    }
    table = comparison("title", tested, [0, 1])
    assert cells_of(table, "FedAvg |")[6] == "2.0"
    assert cells_of(table, "FC-MoE |")[6] == "2.0, x 1.00 ± 6.35"
    assert cells_of(table, "FC-MoE plus")[6] == "1.0 (1 of 2)"


def test_sites_own_data_have_a_table_with_differences_paired_by_seed():
    """Sites at 60 and 30 %, then 40 and 20: means 45 and 30, worst 30 and 20. The other: 80 and 40 with the latter."""
    tested = {name: Outcome((), {}) for name in CONTENDERS}
    tested["fedavg"] = Outcome((), {0: row(0, 0.6), 1: row(1, 0.4)})
    tested["fc_moe_plus"] = Outcome((), {1: row(1, 0.8)})
    tested["fc_moe_plus_whole_step_3"] = Outcome((), {1: row(1, 0.8)})
    table = sites(tested)
    assert table.startswith("On sites' own data, accuracy, %")
    assert cells_of(table, "FedAvg |")[1:] == ["37.5 ± 95.3", "", "25.0 ± 63.5", "", "12.5 ± 31.8"]
    assert cells_of(table, "FC-MoE plus")[1:] == ["60.0", "+30.0", "40.0", "+20.0", "20.0"]
    assert table.count("\n") == 5
    assert sites({"fedavg": Outcome((), {})}) == ""


def test_rows_of_another_version_are_not_told_of():
    study = study_of("clinc", "full", [0], [100])
    settings = ["strategy=fedavg", "train.learning_rate=0.004"]
    told = {"workload": "clinc", "experts": "full", "settings": settings, "split": "test"}
    study.add({**told, "seed": 9, "version": "00000000"})
    assert study.all_seeds() == [0]
    study.add({**told, "seed": 9, "version": WORKLOADS["clinc"].version})
    assert study.all_seeds() == [0, 9]


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_has_its_tables_before_anything_has_run(name):
    table = report(study_of(name, "lora", [0], [100]), name, "lora")["markdown"]
    assert cells_of(table, "FedAvg |")[1] == "missing"
    assert ("one knob changed" in table) == (name in {"clinc", "banking"})
    assert ("| variant |" in table) == (name in {"clinc", "banking", "ag_news", "mcq"})
    assert ("| printed, % |" in table) == (name in {"ag_news", "ag_news_0.5", "ag_news_1.0", "mcq"})


def test_ablation_shows_the_variants_that_are_compared():
    """Last rounds' accuracy, and the mean over sites, here of a and half of a; without variants there is no table.

    One that differs from the whole by -0.4 and -0.2, its sites by -0.3 and -0.15: t at one degree of freedom is 12.706.
    """
    tested = {"fc_moe": Outcome((), {0: row(0, 0.6), 1: row(1, 0.4)}), "fc_moe_no_retention": Outcome((), {})}
    table = ablation(tested)
    assert cells_of(table, "full")[1:] == ["0.5000 ± 1.2706 / 0.3750 ± 0.9529", ""]
    assert cells_of(table, "- local retention")[1:3] == ["missing", ""]
    assert "projection" not in table
    assert ablation({"fc_moe": tested["fc_moe"]}) == ""
    on_one_seed = tested | {"fc_moe_no_retention": Outcome((), {0: row(0, 0.2)})}
    assert cells_of(ablation(on_one_seed), "full")[1:3] == ["0.6000 / 0.4500", ""]
    assert cells_of(ablation(on_one_seed), "- local retention")[1:3] == ["0.2000 / 0.1500", "-0.4000 / -0.3000"]
    on_two = tested | {"fc_moe_no_retention": Outcome((), {0: row(0, 0.2), 1: row(1, 0.2)})}
    assert cells_of(ablation(on_two), "- local retention")[2] == "-0.3000 ± 1.2706 / -0.2250 ± 0.9529"
    without_the_whole = on_two | {"fc_moe": Outcome((), {})}
    assert cells_of(ablation(without_the_whole), "- local retention")[2] == ""


def test_printed_accuracy_has_a_column_and_those_not_compared_here_a_line():
    tested = {"fedavg": Outcome((), {0: row(0, 0.6)}), "fc_moe_plus": Outcome((), {})}
    table = comparison("title", tested, [0], {"fedavg": 0.774, "fedmoe": 0.8137})
    assert cells_of(table, "FedAvg |")[-1] == "77.4"
    assert cells_of(table, "FC-MoE plus")[-1] == ""
    fedmoe = cells_of(table, "FedMoE")
    assert (fedmoe[1], fedmoe[-1]) == ("not compared", "81.4")
    assert len({len(cells.split("|")) for cells in table.splitlines()[2:]}) == 1
    assert "printed" not in comparison("title", tested, [0])


def test_values_around_the_tuned_ones_have_a_table_of_their_own():
    """70 - 50 and 50 - 40 points against the leader at seeds 1 and 2; nothing of it stands among the methods."""
    tested = {name: Outcome((), {}) for name in CONTENDERS if name == "fedavg" or "fc_moe_plus" in name}
    tested["fc_moe_plus_whole"] = Outcome(("strategy.step=2",), {1: row(1, 0.5), 2: row(2, 0.4), 3: row(3, 0.9)})
    tested["fc_moe_plus_whole_step_3"] = Outcome((), {1: row(1, 0.7), 2: row(2, 0.5)})
    tested["fc_moe_plus_whole_flatten_0"] = Outcome((), {1: {"failed": "round 2: loss is nan"}})
    table = one_knob_changed(tested)
    assert table.startswith("fc_moe_plus_as_shipped: one knob changed")
    _, table = table.split("fc_moe_plus_whole: one knob changed")
    assert cells_of(table, "as tuned: step=2")[1:] == ["60.0 ± 65.7", "", ""]
    assert [cell.partition(" ±")[0] for cell in cells_of(table, "step 3")[1:]] == ["60.0", "45.0", "+15.0"]
    assert cells_of(table, "flatten 0, own")[1:] == ["diverged", "", ""]
    assert cells_of(table, "ridge 0.1")[1:] == ["missing", "", ""]
    assert "step 3" not in comparison("title", tested, [1, 2])
    assert one_knob_changed({"fedavg": tested["fedavg"]}) == ""


def test_values_at_an_end_of_what_was_tried_are_marked():
    """Nothing was tried below a rate of 6.25e-5 and above a step of 4; a flattening of 1 is all there is."""
    settings = ("strategy=fc_moe_plus", "strategy.flatten=1", "strategy.momentum=0", "strategy.step=4")
    tested = {
        "fedavg": Outcome(("strategy=fedavg", "train.learning_rate=6.25e-05"), {0: row(0, 0.5)}),
        "fc_moe_plus": Outcome((*settings, "train.learning_rate=0.004"), {0: row(0, 0.5)}),
        "fc_moe_plus_as_shipped": Outcome((*settings, "train.learning_rate=0.032"), {0: row(0, 0.5)}),
    }
    table = comparison("title", tested, [0])
    assert cells_of(table, "FedAvg |")[-1] == "lr=6.25e-05 (end)"
    assert cells_of(table, "FC-MoE plus |")[-1] == "flatten=1, momentum=0, step=4 (end), lr=0.004"
    assert cells_of(table, "FC-MoE plus, as")[-1] == "flatten=1, momentum=0, step=4, lr=0.032 (end)"


def test_what_averaging_did_is_shown_of_runs_that_measured_it():
    """0.4 and 0.5: 0.45, whether or not a third run measured it; what a rule does not report stays empty.

    So does what older rows do not know of.
    """
    measured = dict.fromkeys(MEASURES, 0.5) | {"factor": None}
    older = {measure: 0.5 for measure in MEASURES if measure != "opposed"} | {"factor": None, "kept": 0.4}
    rows = {0: row(0, 0.5, averaging=measured), 1: row(1, 0.5, averaging=older), 2: row(2, 0.5)}
    table = averaging({"fedavg": Outcome((), rows), "fedmoe": Outcome((), {0: row(0, 0.5)})})
    told = ["0.45", "0.500", "0.500 (of 1)", "0.500", "0.50", "", "0.50", "0.50"]
    assert cells_of(table, "FedAvg |")[1:] == told
    assert "FedMoE" not in table
    far = {seed: row(seed, 0.5, averaging=measured | {"step": step}) for seed, step in enumerate((1.0, 2.0, -90.0))}
    assert cells_of(averaging({"fedavg": Outcome((), far)}), "FedAvg |")[5] == "1.00"
    assert cells_of(averaging({"fedavg": Outcome((), {1: rows[1]})}), "FedAvg |")[1:4] == ["0.40", "0.500", ""]
    nothing = Outcome((), {0: row(0, 0.5, averaging=dict.fromkeys(MEASURES))})
    assert averaging({"local_only": nothing}) == ""


def test_workloads_judged_by_loss_show_rouge_l_instead_of_the_loss_again():
    rows = {seed: row(seed, 0.5) | {"accuracy": None, "rouge_l": 0.1 * seed} for seed in (1, 3)}
    others = {seed: row(seed, 0.5) | {"accuracy": None, "rouge_l": 0.1 * seed + 0.05} for seed in (1, 3)}
    table = comparison("title", {"fedavg": Outcome((), rows), "fedprox": Outcome((), others)}, [1, 3])
    assert "ROUGE-L, minus FedAvg's" in table
    assert cells_of(table, "FedAvg |")[5].startswith("0.200 ± 1.271")
    assert "," not in cells_of(table, "FedAvg |")[5]
    assert cells_of(table, "FedProx |")[5] == "0.250 ± 1.271, +0.050 ± 0.000"


@pytest.fixture
def tiny(monkeypatch):
    """The embedded default, a round of one step."""
    settings = ("data.num_examples=24", "eval.max_examples=2", "train.max_steps=1", "train.batch_size=1", "lora.rank=1",
                "eval.num_answers=1", "eval.max_new_tokens=2")  # fmt: skip
    workload = Workload("tiny", "tiny", 1, settings)
    monkeypatch.setitem(WORKLOADS, "tiny", workload)
    return workload


@pytest.mark.slow
def test_a_cell_is_measured_after_every_round(tiny, tmp_path):
    found = run_cell(Cell("tiny", "lora", ("strategy=fedavg", "train.learning_rate=0.01"), 0, "test", "1"), tmp_path)
    assert len(found["loss"]) == 1
    assert found["accuracy"] is None
    assert 0 <= found["rouge_l"] <= 1
    assert sorted(found["sites"]) == ["bank", "clinic", "court", "workshop"]
    assert found["bytes"] > 0
    assert found["expert_growth"] == pytest.approx(1, abs=0.01)
    assert found["expert_growth"] != 1
    assert 0 < found["averaging"]["kept"] <= 1
    assert 0 <= found["averaging"]["negative"] <= found["averaging"]["opposed"] <= 1
    assert found["averaging"]["largest_weight"] is None
    assert Cell.of(json.loads(json.dumps(found))) == Cell.of(found)


@pytest.mark.slow
def test_on_validation_data_only_the_rounds_that_tuning_looks_at_are_measured(tiny, tmp_path, monkeypatch):
    """They are what they would be if all were."""
    rounds = ("strategy=fedavg", "rounds=2")
    curves = {}
    for last in (1, 2):
        monkeypatch.setattr(fc_moe, "LAST", last)
        curves[last] = run_cell(Cell("tiny", "lora", rounds, 0, "validation", "1"), tmp_path)["loss"]
    assert curves[1] == curves[2][1:]
    assert len(curves[2]) == 2


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_that_says_so(tiny, tmp_path):
    words = ("strategy=fedavg", "train.learning_rate=1e30", "train.max_grad_norm=1e30", "train.max_steps=3")
    found = run_cell(Cell("tiny", "lora", words, 0, "test", "1"), tmp_path)
    assert found["failed"].startswith("round 1: ")


@pytest.mark.slow
def test_a_run_that_does_not_fit_into_memory_is_no_row(tiny, tmp_path, monkeypatch):
    """It did not diverge, and may fit elsewhere."""
    words = ("strategy=fedavg", "train.micro_batch=auto")
    monkeypatch.setattr("client.memory.free_bytes", lambda *_, **__: 1)
    with pytest.raises(ValueError, match="training needs"):
        run_cell(Cell("tiny", "lora", words, 0, "test", "1"), tmp_path)


@pytest.fixture
def computed(monkeypatch, tmp_path):
    """Cells that the command computes, by a formula, with results below ``tmp_path``."""
    cells = []

    def run(cell, data, device):
        cells.append(cell)
        rate = float(dict(word.split("=") for word in cell.settings)["train.learning_rate"])
        return row(cell.seed, 1 / (1 + abs(math.log(rate / 4e-3))), workload=cell.workload, experts=cell.experts,
                   settings=list(cell.settings), split=cell.split, version=cell.version)  # fmt: skip

    monkeypatch.setattr(fc_moe, "run_cell", run)
    monkeypatch.setattr(fc_moe, "HERE", tmp_path)
    return cells


def test_a_restart_goes_on_from_the_cells_that_are_there(monkeypatch, tmp_path, computed):
    """The second command computes nothing; with one line less it computes that cell, and the file is the same."""
    words = ["fc_moe", "--strategies", "fedavg", "noise", "--seeds", "5", "6"]
    monkeypatch.setattr("sys.argv", words)
    fc_moe.main()
    assert len(computed) == 3 + 2 + 2
    assert {cell.seed for cell in computed if cell.split == "test"} == {5, 6}
    assert {cell.seed for cell in computed if cell.split == "validation"} == {100}
    path = tmp_path / "results" / "fc_moe_clinc_lora.jsonl"
    before = path.read_text()
    written = json.loads(path.with_suffix(".json").read_text())
    assert "FedAvg, step x 1.001" in written["markdown"]
    assert written["made_by"] == [{"made_by": MADE_BY, "runs": 3 + 2 + 2}]
    computed.clear()
    fc_moe.main()
    assert computed == []
    path.write_text(before.replace(WORKLOADS["clinc"].version, "other"))
    fc_moe.main()
    assert len(computed) == 3 + 2 + 2
    computed.clear()
    path.write_text(before[: before.rstrip().rindex("\n") + 1])
    fc_moe.main()
    assert len(computed) == 1
    assert path.read_text() == before


def test_one_command_makes_several_tables(monkeypatch, tmp_path, computed):
    words = ["--workload", "clinc", "mcq", "--experts", "full", "lora", "--strategies", "fedavg", "--seeds", "5"]
    monkeypatch.setattr("sys.argv", ["fc_moe", *words])
    fc_moe.main()
    tables = [f"fc_moe_{workload}_{experts}.json" for workload in ("clinc", "mcq") for experts in ("full", "lora")]
    assert sorted(path.name for path in (tmp_path / "results").glob("*.json")) == tables
    assert {(cell.workload, cell.experts) for cell in computed if cell.split == "test"} == {
        ("clinc", "full"), ("clinc", "lora"), ("mcq", "full"), ("mcq", "lora")
    }  # fmt: skip


def test_no_run_begins_after_the_time_is_up(monkeypatch, tmp_path):
    monkeypatch.setattr(fc_moe, "HERE", tmp_path)
    monkeypatch.setattr("sys.argv", ["fc_moe", "--budget-minutes", "0"])
    fc_moe.main()
    table = json.loads((tmp_path / "results" / "fc_moe_clinc_lora.json").read_text())["markdown"]
    assert cells_of(table, "FedAvg |")[1] == "missing"


def test_tuning_never_sees_test_data():
    study = study_of("clinc", "lora", [0], [100])
    assert {cell.split for cell in study.needed("fedavg")} == {"validation"}
    assert {cell.seed for cell in study.needed("fedavg")} == {100}


def test_finished_seeds_are_told_of_beside_those_that_are_asked_for():
    study = study_of("clinc", "lora", [0, 1], [])
    cell = study.needed("fedavg")[0]
    for seed in (0, 7):
        study.add(row(seed, 0.5) | vars(cell) | {"seed": seed})
    assert study.tested("fedavg").rows.keys() == {0, 7}
    assert [cell.seed for cell in study.needed("fedavg")] == [1]
    assert "FedAvg (2 of 3 seeds)" in report(study, "clinc", "lora")["markdown"]


def test_summary_has_the_rows_that_are_there_and_what_counts_first():
    tested = {
        "fedavg": Outcome((), {0: row(0, 0.5), 1: row(1, 0.6)}),
        "fedprox": Outcome((), {0: row(0, 0.5)}),
        "fc_moe": Outcome((), {}),
        "fc_moe_plus": Outcome((), {0: row(0, 0.75)}),
    }
    text = summary("Toy", tested)
    assert text.startswith("Toy, 2 seeds\n\n| method | test accuracy, % | minus FedAvg |")
    assert cells_of(text, "FC-MoE plus") == ["FC-MoE plus (1 of 2 seeds)", "75.0", "+25.0", "56.2 / 37.5 / 18.8", "1.0"]
    assert cells_of(text, "FedAvg")[3] == "41.2 ± 47.6 / 27.5 ± 31.8 / 13.8 ± 15.9"
    assert "FedProx" not in text
    assert "as printed" not in text
    assert summary("Toy", {"fc_moe": tested["fc_moe_plus"]}) == ""
