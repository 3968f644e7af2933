"""The page as text: complete, self-contained, and nothing that a run says becomes markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from benchmarks.aggregation import STRATEGIES
from benchmarks.made_up_round import extras_of
from server.report.experts import MAPS, experts_view, load, scales, short_name
from server.report.overview import traffic
from server.report.page import contents, render
from server.report.runs import read_runs
from strategies.fedavg import FedAvg
from tests.server.report.folders import LAYERS, NASTY, SITES, rewritten, write_run
from tests.server.report.reading import Reader, page_of


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
    assert [heat.name for heat in experts_view(runs[0], 0, scale, 2, "router").of_sites] == [
        "load", "cosine_to_others", "cosine", "weight", "conflict",
    ]  # fmt: skip
    assert [heat.name for heat in experts_view(runs[1], 1, scale, 2, "router").of_sites] == [
        "load", "cosine_to_others", "cosine",
    ]  # fmt: skip


def test_factor_of_the_rule_has_a_map_where_there_is_one(runs):
    layer = runs[0].diagnostics[-1]["layers"]["model.layers.0.mlp"]
    of_rule, without = (experts_view(run, 0, scales(runs), 3, "router").maps for run in runs)
    assert [heat.name for heat in of_rule if heat not in without and heat.name == "rule_scale"] == ["rule_scale"]
    assert "rule_scale" not in {heat.name for heat in without}
    shown = dict(next(heat.rows for heat in of_rule if heat.name == "rule_scale"))
    assert [cell.text for cell in shown["model.layers.0.mlp"]] == [f"{value:.2f}" for value in layer["rule"]["scale"]]
    assert min(layer["rule"]["scale"]) >= 1.0  # 1 + s


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategys_rounds_make_a_page_with_all_that_experts_have(tmp_path, name):
    """Its own state from round to round, and what its sites send beside their adapters."""
    folder = write_run(tmp_path / "run", STRATEGIES[name], extras_of=partial(extras_of, name))
    (run,) = read_runs([folder])
    view = experts_view(run, 0, scales([run]), 3, "model.layers.0.mlp")
    assert [heat.name for heat in view.maps if heat.name != "rule_scale"] == [
        each for each in MAPS if each != "rule_scale"
    ]
    for heat in [*view.maps, view.pairs, *view.of_sites]:
        rows = [row for label, row in heat.rows if label in {*LAYERS, *SITES}]
        assert {cell.text for row in rows for cell in row} - {"·"}, heat.name
    assert len(view.norms) == len([*LAYERS, "router"])
    page = Reader(render([run]))
    for heading in ("Convergence", "Who pulls against whom", "Expert norms", "Bytes by kind", "Aggregation gap"):
        assert heading in page.text


def test_where_sites_send_no_adapter_there_are_tokens_and_no_empty_tables(tmp_path):
    folder = write_run(tmp_path / "run")
    counts = ("tokens", "num_tokens")

    def without_adapter(line):
        layers = {name: {key: layer[key] for key in counts} for name, layer in line["layers"].items()}
        return line | {"kinds": {}, "layers": layers}

    rewritten(folder / "diagnostics/rounds.jsonl", without_adapter)
    runs = read_runs([folder])
    view = experts_view(runs[0], 0, scales(runs), 3, "model.layers.0.mlp")
    assert [heat.name for heat in (*view.maps, *view.of_sites)] == ["num_tokens", "load"]
    assert view.pairs is None
    text = Reader(render(runs)).text
    assert "Experts" in text
    assert "Expert norms" not in text
    assert "Who pulls against whom" not in text


def test_where_sites_send_nothing_at_all_there_is_no_part_on_experts(tmp_path):
    alone, other = write_run(tmp_path / "alone"), write_run(tmp_path / "other")
    rewritten(alone / "diagnostics/rounds.jsonl", lambda line: line | {"kinds": {}, "layers": {}})
    page = render(read_runs([alone]))
    assert {"Experts", "Expert norms"} & set(Reader(page).text) == set()
    assert "sites send nothing that could be compared" in page
    assert len(Reader(render(read_runs([alone, other]))).named("article")) == 1


def drawn(view):
    return [(heat.name, heat.rows) for heat in (*view.maps, view.pairs, *view.of_sites)]


def test_run_shows_its_last_line_where_it_did_not_reach_the_chosen_round_and_says_so(runs):
    scale = scales(runs)
    views = [experts_view(runs[1], 1, scale, number, "model.layers.0.mlp") for number in (0, 1, 2, 3)]
    assert [view.told for view in views] == ["no round yet", "", "", "round 2, its last"]
    assert drawn(views[3]) == drawn(views[2]) != drawn(views[1])
    assert {cell.text for heat in views[0].maps for _, row in heat.rows for cell in row} == {"·"}
    assert "round 2, its last" in render(runs)


def test_run_that_left_rounds_out_says_which_one_it_shows(runs):
    thinned = replace(runs[0], diagnostics=[runs[0].diagnostics[0], runs[0].diagnostics[2]])
    assert experts_view(thinned, 0, scales([thinned]), 2, "router").told == "round 1"


def test_runs_written_before_opposition_was_kept_have_no_map_of_it(tmp_path):
    """With both kinds on a page the new one is drawn, the old one without numbers."""
    old, new = write_run(tmp_path / "old", rounds=1), write_run(tmp_path / "new", rounds=1)
    path = old / "diagnostics/rounds.jsonl"
    line = json.loads(path.read_text())
    for block in [*line["layers"].values(), *line["kinds"].values()]:
        del block["lowest_to_others"], block["cosine_to_others"]
    path.write_text(json.dumps(line) + "\n")
    assert "Cosine to the other sites" not in render(read_runs([old]))
    runs = read_runs([old, new])
    first, second = [experts_view(run, 0, scales(runs), 1, "router").maps[0] for run in runs]
    assert first.title == second.title == "Cosine to the other sites, lowest of any"
    assert {cell.text for _, row in first.rows for cell in row} == {"·"}
    assert "·" not in {cell.text for _, row in second.rows for cell in row}


def test_opposition_is_drawn_as_it_was_kept(runs):
    layer = runs[0].diagnostics[-1]["layers"]["model.layers.0.mlp"]
    view = experts_view(runs[0], 0, scales(runs), 3, "model.layers.0.mlp")
    tables = {heat.name: [[cell.text for cell in row] for _, row in heat.rows] for heat in view.of_sites}
    shown = {name: [[None if text == "·" else float(text.replace("\u2212", "-")) for text in row] for row in rows]
             for name, rows in tables.items() if name in {"cosine_to_others", "conflict"}}  # fmt: skip
    order = [runs[0].diagnostics[-1]["sites"].index(site) for site in runs[0].sites]
    assert shown["cosine_to_others"] == [pytest.approx(layer["cosine_to_others"][i], abs=0.0051) for i in order]
    assert shown["conflict"] == [layer["rule"]["conflict"][i] for i in order]


def test_settings_that_differ_are_a_table_and_a_note_where_losses_are_not_of_one_thing(tmp_path):
    folders = [write_run(tmp_path / name, rounds=1) for name in ("a", "b")]
    assert "Settings that differ" not in page_of(read_runs(folders))
    for folder, count in zip(folders, (400, 800), strict=True):
        (folder / "config.yaml").write_text(f"seed: {count}\ndata:\n  num_examples: {count}\noutput: {folder}\n")
    page = " ".join(page_of(read_runs(folders)).split())
    assert "Losses may not be comparable: the runs differ in data.num_examples. See Settings below." in page
    for name in ("data.num_examples", "seed"):
        assert f'{name}</th><td title="400">400</td><td title="800">800</td>' in page
    assert '<th scope="row">output' not in page
    (folders[1] / "config.yaml").write_text("seed: 1\ndata:\n  num_examples: 400\n")
    page = page_of(read_runs(folders))
    assert "Settings that differ" in page
    assert "comparable" not in page


def test_note_on_comparability_is_about_all_runs_of_the_page(tmp_path):
    folders = [write_run(tmp_path / f"run-{number}", rounds=0) for number in range(9)]
    (folders[8] / "config.yaml").write_text("data:\n  num_examples: 3\n")
    (folders[0] / "config.yaml").write_text("data:\n  num_examples: 4\n")
    assert "Losses may not be comparable" in page_of(read_runs(folders))


def test_bytes_have_their_sum_and_what_was_not_counted_by_kind_stands_once(runs):
    one = traffic(runs[0])
    assert [kind for kind, _ in one.rows] == ["experts", "router", "counts, framing", "all"]
    for way in ("up", "down"):
        assert one.rows[-1][1][way] == sum(row[way] for _, row in one.rows[:-1])
    old = replace(runs[0], rows=[{k: row[k] for k in row if k != "bytes_by_kind"} for row in runs[0].rows])
    assert traffic(old).rows == [one.rows[-1]]


def test_names_of_runs_are_short_and_tell_their_ends(tmp_path):
    names = [f"fc_moe_with_a_very_long_name-{number}" for number in (119, 120)]
    page = page_of(read_runs([write_run(tmp_path / name, rounds=1) for name in names]))
    assert all(f"fc_moe_with_…ng_name-{number}</text>" in page for number in (119, 120))


def test_line_of_a_shorter_run_has_a_leader_and_every_run_its_swatch(page):
    figure = re.search(r'data-chart="global">(.*?)</figure>', page, re.DOTALL).group(1)
    assert figure.count('class="leader"') == 1
    values = re.findall(r'<span class="values">(.*?)</figcaption>', page)
    assert len(values) == len(SITES)
    assert all(re.findall(r'swatch (run-\d)"></i><b class="(run-\d)"', each) == [("run-0",) * 2, ("run-1",) * 2]
               for each in values)  # fmt: skip


def test_legends_tell_the_middle(runs, page):
    scale = scales(runs)["lowest_to_others"]
    assert f"<small>{scale.text(scale.low)}</small>" in page
    assert '<i class="d5">0.00</i>' in page
    assert '<i class="d5">1.00</i>' in page  # of the step's scale


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
