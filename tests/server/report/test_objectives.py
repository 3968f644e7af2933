"""Runs with several objectives on the page, and in the table of ``compare``."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from server.compare_objectives import objective_tables
from server.report.objectives import fronts_view, objectives_view
from server.report.page import MAX_RUNS, render
from server.report.runs import read_runs
from tests.server.report.folders import NASTY, SITES, write_run
from tests.server.report.reading import Reader


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    shares = [(0.1, 1), (0.5, 1), (0.9, 1), (0.5, 0.5)]
    return [write_run(folder / f"p{share}-b{beta}", share=share, beta=beta) for share, beta in shares]


@pytest.fixture(scope="module")
def runs(folders):
    return read_runs(folders)


def test_every_objective_and_measure_has_a_chart_and_every_site_a_panel(runs):
    view = objectives_view(runs)
    assert [chart.title for chart in view.rewards] == ["brevity", "format"]
    assert [chart.name for chart in view.measures] == ["kl", "disagreement", "drift"]
    assert [[panel.title for panel in run.panels] for run in view.weights] == [sorted(SITES)] * len(runs)
    first = view.weights[0].panels[sorted(SITES).index("clinic")]
    assert {line.label: line.values for line in first.lines} == {"brevity": [0.1] * 3, "format": [0.9] * 3}


def test_disagreement_is_larger_where_beta_is_small(runs):
    """Weights 0.1 / beta apart on either side, in both objectives: 2 * 2 / 3 * (0.1 / beta)^2."""
    ends = objectives_view(runs).ends
    assert [end.disagreement for end in ends] == pytest.approx([4 / 300] * 3 + [4 / 75])


def test_front_is_drawn_through_its_runs(runs):
    view = objectives_view(runs)
    (scatter,) = view.scatters
    assert [len(front.runs) for front in view.fronts] == [3, 1]
    assert [len(re.findall("[ML]", path)) for path in scatter.paths] == [3, 1]
    heights = {point.label: point.y for point in scatter.points}
    assert heights["p0.1-b1"] < heights["p0.5-b1"] < heights["p0.9-b1"]  # pixels grow downwards
    assert np.ptp([point.x for point in scatter.points]) > 100


def test_page_shows_it_and_stays_whole(runs):
    page = render(runs)
    read = Reader(page)
    text = " ".join(read.text)
    for words in ("Objectives", "Reward: brevity", "Disagreement", "Weights λ of every site", "hypervolume"):
        assert words in text
    assert NASTY not in page
    view = objectives_view(runs)
    for front in view.fronts:
        assert front.hypervolume in text
    for end in view.ends:
        assert all(f"{reward:.4f}" in text for reward in end.rewards)


def test_more_runs_than_colours_have_those_of_their_fronts(tmp_path):
    """Five preferences of two methods: what the tables say is all there, and no colour that the page does not have."""
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        for beta in (0.5, 1):
            write_run(tmp_path / f"p{share}-b{beta}", share=share, beta=beta, rounds=1)
    runs = read_runs([tmp_path])
    assert len(runs) == 10 > MAX_RUNS
    view = fronts_view(runs, MAX_RUNS)
    assert {end.label[-2:]: end.style for end in view.ends} == {".5": "run-0", "b1": "run-1"}
    assert [len(re.findall("[ML]", path)) for path in view.scatters[0].paths] == [5, 5]
    read = Reader(render(runs))
    text = " ".join(read.text)
    for end in view.ends:
        assert end.label in text
        assert all(f"{reward:.4f}" in text for reward in end.rewards)
    classes = " ".join(attributes.get("class") or "" for _, attributes in read.elements)
    assert set(re.findall(r"run-[0-9]+", classes)) == {f"run-{index}" for index in range(MAX_RUNS)}
    assert "All runs are here; colours are those of the fronts." in text


def test_fronts_are_shown_where_no_run_with_a_colour_has_objectives(tmp_path):
    folders = [write_run(tmp_path / f"plain-{number}", rounds=1) for number in range(MAX_RUNS)]
    page = render(read_runs([*folders, write_run(tmp_path / "aligned", share=0.5, rounds=1)]))
    assert "Where runs end" in page
    assert "Weights λ" not in page


def test_page_of_runs_without_objectives_has_no_such_part(tmp_path):
    page = render(read_runs([write_run(tmp_path / "plain")]))
    assert 'id="h-objectives"' not in page


def test_a_plain_run_beside_one_with_objectives_keeps_its_place(tmp_path, folders):
    runs = read_runs([write_run(tmp_path / "plain"), folders[0]])
    view = objectives_view(runs)
    assert [end.style for end in view.ends] == ["run-1"]
    render(runs)


def test_compare_adds_a_table(folders, tmp_path):
    console = Console(file=io.StringIO(), width=160)
    console.print(*objective_tables(folders))
    lines = console.file.getvalue().splitlines()
    row = next(line for line in lines if "p0.1-b1" in line)
    assert "0.1 : 0.9" in row
    assert objective_tables([write_run(tmp_path / "plain")]) == []


def test_compare_tells_runs_of_one_name_apart(tmp_path):
    console = Console(file=io.StringIO(), width=160)
    console.print(
        *objective_tables([write_run(tmp_path / day / "firm", share=0.5, rounds=1) for day in ("mon", "tue")])
    )
    assert "mon/firm" in console.file.getvalue()
    assert "tue/firm" in console.file.getvalue()
