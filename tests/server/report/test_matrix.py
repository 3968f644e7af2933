"""The evaluation matrix on the page: each test in its cell, a scale for all runs, nothing where there is none."""

from __future__ import annotations

import json

import pytest

from client.evaluation.measured import Measured, RelativeCost, Score, Scored
from server.evaluation import put_together
from server.record import evaluation_json
from server.report.matrix import matrix_views
from server.report.page import render
from server.report.runs import read_runs
from tests.server.report.folders import NASTY, write_run
from tests.server.report.reading import Reader

TOKENS = {"bank": {"model.layers.0.mlp": [3.0, 1.0]}}


def evaluated(folder, shift=0.0):
    """A run of two sites with a personal model each; returns its folder."""

    def scored(model, on, loss, rouge=None):
        return Scored(model=model, on=on, score=Score(loss=loss + shift, num_tokens=1, num_examples=1, rouge_l=rouge))

    cost = RelativeCost(flops=1.25, seconds=1.5)
    measured = {
        "bank": Measured(
            scores=(
                scored("global", "bank", 2.0, 0.5),
                scored("personal", "bank", 1.0, 0.75),
                scored("personal", NASTY, 4.0),
            ),
            cost=cost,
        ),
        NASTY: Measured(scores=(scored("global", NASTY, 3.0), scored("personal", NASTY, 1.5)), cost=cost),
    }  # fmt: skip
    whole = put_together(measured, [scored("base", "*general*", 2.5)])
    whole["routing"] = {
        "model.layers.0.mlp": {"entropy": 0.8, "largest_share": 0.75, "load": [0.25, 0.75], "sites": {}}
    }
    (folder / "evaluation.json").write_text(evaluation_json(whole))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    folders = [write_run(folder / name, rounds=1) for name in ("flex", "plain", "fedavg")]
    evaluated(folders[0])
    evaluated(folders[2], shift=1.0)
    return read_runs(folders)


def test_each_test_stands_in_its_cell(runs):
    flex, fedavg = matrix_views(runs)
    assert (flex.index, fedavg.index) == (0, 2)
    loss, rouge, load = flex.heats
    assert [(label, [cell.text for cell in row]) for label, row in load.rows] == [
        ("model.layers.0.mlp", ["25%", "75%"])
    ]
    assert loss.columns == [NASTY, "bank", "*general*"]
    shown = {label: [cell.text for cell in row] for label, row in loss.rows}
    assert shown == {
        "base": ["·", "·", "2.500"], "global": ["3.000", "2.000", "·"],
        f"of {NASTY}": ["1.500", "·", "·"], "of bank": ["4.000", "1.000", "·"],
    }  # fmt: skip
    assert {label: [cell.text for cell in row] for label, row in rouge.rows} == {
        "global": ["0.500"],
        "of bank": ["0.750"],
    }


def test_runs_share_their_scales(runs):
    flex, fedavg = matrix_views(runs)
    assert flex.heats[0].scale == fedavg.heats[0].scale
    assert (flex.heats[0].scale.low, flex.heats[0].scale.high) == (1.0, 5.0)


def test_page_has_the_matrix_its_summary_and_what_a_personal_model_costs(runs):
    page = render(runs)
    read = Reader(page)
    text = " ".join(" ".join(read.text).split())
    assert NASTY not in page
    assert "Evaluation matrix" in text
    assert "A personal model takes 1.25 times one adapter's operations and 1.50 times its time." in text
    assert "entropy 0.80 of that of equal use" in text
    # Personal models on their own data: 1.5 and 1 in mean 1.25, worst 1.5, std 0.25, spread 0.5.
    assert "personal held-out loss 1.250 1.500" in text
    assert "0.250 0.500" in text
    fixed = [attributes for attributes in read.named("table") if "fixed" in attributes.get("class", "")]
    assert len(fixed) == 6
    assert not [attributes for attributes in fixed if "data-sort" in attributes]


def test_page_of_runs_without_a_matrix_has_no_such_part(runs):
    assert "Evaluation matrix" not in render([runs[1]])


def test_damaged_matrix_is_an_error_that_names_the_file(tmp_path):
    folder = write_run(tmp_path / "run", rounds=1)
    (folder / "evaluation.json").write_text(json.dumps({})[:-1])
    with pytest.raises(ValueError, match="evaluation.json is damaged"):
        read_runs([folder])
