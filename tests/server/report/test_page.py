"""The page as text: complete, self-contained, and nothing that a run says becomes markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.launch import cli
from server.report.experts import experts_view, load, scales, short_name
from server.report.page import contents, render, write_report
from server.report.runs import read_runs
from strategies.fedavg import FedAvg
from tests.server.report.folders import NASTY, SITES, write_run


class Reader(HTMLParser):
    """Elements and text of a page; raises where tags do not close."""

    VOID = frozenset({"meta", "input", "img", "br", "link", "line", "circle", "path"})

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text.append(text)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return read_runs([write_run(folder / "fc_moe"), write_run(folder / "fedavg", FedAvg(), rounds=2)])


@pytest.fixture(scope="module")
def page(runs):
    return render(runs)


def test_page_is_well_formed_and_names_everything(page):
    read = Reader(page)
    text = " ".join(read.text)
    for words in ("Convergence", "Who pulls against whom", "Length kept", "Bytes by kind", "Aggregation gap", "fedavg"):
        assert words in text
    assert len(read.named("article")) == 2
    headings = [tag for tag, _ in read.elements if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == "h1"
    assert all(int(after[1]) - int(before[1]) <= 1 for before, after in pairwise(headings))


def test_page_asks_for_nothing_from_anywhere(page):
    """No address but the namespace of none: styles, scripts and data are in the page."""
    read = Reader(page)
    assert not [attributes for _, attributes in read.elements if {"src", "href", "srcset", "data"} & attributes.keys()]
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest", page)


def test_site_that_is_called_like_markup_stays_text(page):
    assert NASTY not in page
    assert "<b>not bold</b>" not in page
    read = Reader(page)
    assert read.named("img") == []
    assert [attributes.get("type") for attributes in read.named("script")] == ["application/json", None]
    assert NASTY in " ".join(read.text)
    data = json.loads(re.search(r'id="page">(.*?)</script>', page, re.DOTALL).group(1))
    assert NASTY in data["runs"][0]["sites"]


def test_every_chart_has_its_numbers_as_a_table(page, runs):
    read = Reader(page)
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in read.named("svg"))
    text = " ".join(read.text)
    for site in SITES:
        for loss in runs[0].of_site(site, "loss").values():
            assert f"{loss:.4f}" in text


def test_cells_show_the_last_round_of_the_first_layer(runs):
    line = runs[0].diagnostics[-1]
    view = contents(runs)["views"][0]
    layer = line["layers"]["model.layers.0.mlp"]
    shown = {heat.name: {label: [cell.text for cell in row] for label, row in heat.rows} for heat in view.maps}
    assert shown["kept"]["model.layers.0.mlp"] == [f"{value:.2f}" for value in layer["kept"]]
    assert len(shown["kept"]["router"]) == 1
    pairs = {label: [cell.text for cell in row] for label, row in view.pairs.rows}
    place = runs[0].sites.index
    assert pairs["bank"][place("bank")] == "·"
    expected = f"{layer['block_pairs'][0]:.2f}".replace("-", "\u2212")
    assert pairs["bank"][place("clinic")] == pairs["clinic"][place("bank")] == expected


def test_runs_share_their_scales_and_the_rules_weight_stands_where_there_is_one(runs):
    scale = scales(runs)
    every = [
        value
        for run in runs
        for line in run.diagnostics
        for layer in line["layers"].values()
        for value in layer["scale"]
    ]
    assert scale["scale"].low <= min(every) <= max(every) <= scale["scale"].high
    assert [heat.name for heat in experts_view(runs[0], 0, scale, 2, "router").of_sites] == ["load", "cosine", "weight"]
    assert [heat.name for heat in experts_view(runs[1], 1, scale, 2, "router").of_sites] == ["load", "cosine"]


def test_round_that_a_run_did_not_reach_is_left_empty(runs):
    view = experts_view(runs[1], 1, scales(runs), 3, "model.layers.0.mlp")
    assert {cell.text for heat in view.maps for _, row in heat.rows for cell in row} == {"·"}


def test_load_is_a_share():
    assert load([1, 3]) == [0.25, 0.75]
    assert load([0, 0]) == [0.0, 0.0]
    assert load([1, None]) == [None, None]


@pytest.mark.parametrize(
    ("block", "name"),
    [("model.layers.12.mlp", "layer 12"), ("attention", "attention"), ("a.0.b.1.mlp", "a.0.b.1.mlp")],
)
def test_blocks_have_short_names(block, name):
    assert short_name(block) == name


@pytest.mark.parametrize("change", ["no diagnostics", "no summary", "no round", "no config"])
def test_incomplete_runs_still_give_a_page(tmp_path, change):
    folder = write_run(tmp_path / "run", rounds=0 if change == "no round" else 2)
    for name in {
        "no diagnostics": ["diagnostics/rounds.jsonl"],
        "no summary": ["summary.json"],
        "no config": ["config.yaml"],
    }.get(change, []):
        (folder / name).unlink()
    read = Reader(render(read_runs([folder])))
    assert ("Expert norms" in read.text) == (change in {"no summary", "no config"})
    assert len([attributes for attributes in read.named("p") if attributes.get("role") == "note"]) == (
        change != "no config"
    )


def test_of_more_runs_than_colours_all_are_in_the_overview_and_the_first_have_charts_and_maps(tmp_path):
    names = [f"run-{number}-of-9" for number in range(9)]
    page = render(read_runs([write_run(tmp_path / name, rounds=1) for name in names]))
    read = Reader(page)
    text = " ".join(read.text)
    assert "9 runs \u2013 Bouquet" in text
    assert "the table above has all of them, charts and maps show the first 8" in text
    assert re.findall(r'<tr><th scope="row">([^<]*)</th><td>fc_moe</td>', page) == names
    assert [attributes["aria-label"] for attributes in read.named("article")] == names[:8]
    assert "and 1 more" in text
    assert "Objectives" not in text


def test_commands_write_the_page_where_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    runner = CliRunner()
    alone = runner.invoke(cli, ["report", str(one)])
    assert alone.output.strip() == str(one / "report.html")
    assert runner.invoke(cli, ["report", str(one), str(other)]).exit_code == 0
    assert runner.invoke(cli, ["report", str(one), "--output", "x/y.html"]).exit_code == 0
    assert (one / "report.html").read_text() == (tmp_path / "x" / "y.html").read_text()
    assert "<title>a, b" in (tmp_path / "report.html").read_text()


def test_report_of_no_run_is_an_error_that_names_the_folder(tmp_path):
    assert f"{tmp_path}: no run in it" in str(CliRunner().invoke(cli, ["report", str(tmp_path)]).exception)


@pytest.mark.parametrize(
    ("words", "place"), [(["sweep"], "sweep/compare.html"), (["sweep/a", "sweep/b"], "compare.html"),
                         (["sweep", "--html", "x/y.html"], "x/y.html")],
)  # fmt: skip
def test_compare_writes_the_page_and_says_where_below_its_table(tmp_path, monkeypatch, words, place):
    """A folder of runs keeps it; several leave it here; what is named wins."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(Path("sweep", name), rounds=1, sites=["bank", "clinic"])
    (tmp_path / "sweep/b/summary.json").unlink()  # has not ended: in the table, and on the page
    table, _, told = compared(words).rpartition("\n")
    assert "held-out loss" in table
    assert "no summary" in table
    assert told == f"page: {place}"
    assert "<title>a, b " in Path(place).read_text()
    assert not list(Path().rglob("*report.html"))


def compared(words):
    result = CliRunner().invoke(cli, ["compare", *words])
    assert result.exit_code == 0, result.exception
    return result.output.strip()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_page_replaces_an_earlier_page_and_nothing_else(tmp_path, command):
    folder, page = write_run(tmp_path / "a", rounds=1), tmp_path / "a" / f"{command}.html"
    page.write_text(render(read_runs([write_run(tmp_path / "other", rounds=0)])))
    assert CliRunner().invoke(cli, [command, str(folder)]).exit_code == 0
    assert "<title>a " in page.read_text()
    page.write_text("<title>My notes</title>")
    with pytest.raises(ValueError, match=rf"{command}.html is there already, and no page of Bouquet's"):
        CliRunner().invoke(cli, [command, str(folder)], catch_exceptions=False)
    assert page.read_text() == "<title>My notes</title>"


def test_page_that_cannot_be_written_is_an_error_that_says_where(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"cannot write .*file/report.html: .*; name another file"):
        write_report([write_run(tmp_path / "a", rounds=1)], tmp_path / "file" / "report.html")
