"""The page in a real browser: what the script redraws is what Python draws, by mouse and by keyboard."""

from __future__ import annotations

import json
from itertools import combinations

import pytest

from server.report.experts import blocks_of, experts_view, scales
from server.report.page import render
from server.report.runs import read_runs
from tests.server.report.conftest import LAYER
from tests.server.report.folders import rewritten, write_run

pytestmark = pytest.mark.slow


def drawn(runs, server_round, block):
    """What Python draws, in the order of the page's tables."""
    scale = scales(runs)
    views = [experts_view(run, index, scale, server_round, block) for index, run in enumerate(runs)]
    return [
        [[list(cell) for cell in row] for _, row in heat.rows]
        for view in views
        for heat in (*view.maps, view.pairs, *view.of_sites)
    ]


def test_script_redraws_what_python_drew_and_fails_nowhere(browse, runs):
    script = "return [cells(), failed, [...document.querySelectorAll('[data-told]')].map((run) => run.textContent)];"
    shown, failed, rounds = browse(script)
    assert failed == []
    assert rounds == ["", "round 2, its last"]
    assert shown == drawn(runs, 3, "model.layers.0.mlp")


def test_page_without_experts_fails_nowhere(browse, tmp_path):
    folder = write_run(tmp_path / "alone")
    rewritten(folder / "diagnostics/rounds.jsonl", lambda line: line | {"kinds": {}, "layers": {}})
    script = """
    const slider = document.getElementById("round");
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    return [failed, document.getElementById("round-shown").textContent.split(" ")[0]];
    """
    assert browse(script, page=render(read_runs([folder]))) == [[], "1"]


@pytest.mark.parametrize("server_round", [1, 2])
def test_slider_shows_another_round_in_every_table(browse, runs, server_round):
    script = f"""
    const slider = document.getElementById("round");
    slider.value = {server_round - 1};
    slider.dispatchEvent(new Event("input"));
    const rounds = [...document.querySelectorAll("[data-told]")].map((run) => run.textContent);
    return [cells(), document.getElementById("round-shown").textContent, slider.getAttribute("aria-valuetext"), rounds];
    """
    shown, told, spoken, rounds = browse(script)
    assert shown == drawn(runs, server_round, "model.layers.0.mlp")
    assert told.split()[0] == str(server_round)
    assert spoken == f"round {server_round}"
    assert rounds == ["", ""]


def test_keyboard_reaches_an_expert_and_its_pairs_appear(browse, runs):
    """From the first layer's head: down to the second layer, right to its expert 0, right to its expert 1."""
    script = """
    document.querySelector("table.cells tbody th").focus();
    ["ArrowDown", "ArrowRight", "ArrowRight"].forEach((key) => press(key));
    const chosen = [...document.querySelectorAll('table[data-sort="map"] [aria-selected="true"]')];
    const stops = document.querySelectorAll('table.cells [tabindex="0"]').length;
    const pairs = [...document.querySelectorAll('[data-sort="pairs"]')].map(
      (table) => table.rows[1].cells[2].textContent);
    return [chosen.map((cell) => [cell.parentElement.cells[0].title, cell.cellIndex - 1]), stops, pairs,
      document.querySelector("[data-where]").textContent, readout()];
    """
    chosen, stops, pairs, where, told = browse(script)
    assert chosen == [[LAYER, 1]] * 11  # in five maps of two runs, and one of FC-MoE's own factor
    assert stops == 11 + 2 + 5 + 3  # one a table
    assert where == "layer 1, expert 1"
    lines = [run.diagnostics[-1] for run in runs]
    assert pairs[0] == f"{lines[0]['layers'][LAYER]['pairs'][1][1]:.2f}".replace("-", "\u2212")  # sites 0 and 2
    assert pairs[1] == f"{lines[1]['layers'][LAYER]['pairs'][1][1]:.2f}".replace("-", "\u2212")
    assert f"{lines[0]['layers'][LAYER]['num_tokens'][1]} tokens" in told


def test_line_of_text_follows_the_round(browse, runs):
    script = """
    document.querySelector("table.cells tbody td").focus();
    const slider = document.getElementById("round");
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    return readout();
    """
    tokens = runs[0].diagnostics[0]["layers"]["model.layers.0.mlp"]["num_tokens"][0]
    assert browse(script).endswith(f", {tokens} tokens")


def test_pointing_previews_an_expert_and_leaving_returns(browse):
    script = """
    const cell = document.querySelector("table.cells").tBodies[0].rows[1].cells[3];
    const where = () => document.querySelector("[data-where]").textContent;
    point(cell);
    const pointed = where();
    cell.closest("table").dispatchEvent(new PointerEvent("pointerleave"));
    return [pointed, where()];
    """
    assert browse(script) == ["layer 1, expert 2", "layer 0, all experts"]


def test_a_chosen_expert_stays_chosen_whatever_is_pointed_at_later(browse):
    """A click puts the focus on a cell, as any that can have it: from then on that is what the pointer returns to."""
    script = """
    const rows = document.querySelector("table.cells").tBodies[0].rows;
    const where = () => document.querySelector("[data-where]").textContent;
    rows[1].cells[3].focus();
    const [chosen, focused] = [where(), document.activeElement === rows[1].cells[3]];
    point(rows[0].cells[1]);
    const pointed = where();
    rows[0].closest("table").dispatchEvent(new PointerEvent("pointerleave"));
    return [focused, chosen, pointed, where()];
    """
    chosen = "layer 1, expert 2"
    assert browse(script) == [True, chosen, "layer 0, expert 0", chosen]


@pytest.mark.parametrize(
    ("key", "more", "place"),
    [
        ("Home", {}, [1, 0]),
        ("End", {}, [1, 4]),
        ("Home", {"ctrlKey": True}, [0, 0]),
        ("End", {"ctrlKey": True}, [2, 1]),
    ],
)
def test_home_and_end_go_along_the_row_and_with_control_through_the_table(browse, key, more, place):
    """The second map row has four experts; the last one is the router, of one."""
    script = f"""
    const rows = document.querySelector("table.cells").tBodies[0].rows;
    rows[1].cells[2].focus();
    press("{key}", {json.dumps(more)});
    return [[...rows].indexOf(document.activeElement.parentElement), document.activeElement.cellIndex];
    """
    assert browse(script) == place


def test_line_of_text_names_who_opposes_whom_and_kinds_have_no_expert(browse, runs):
    script = f"""
    const row = document.querySelector('table.cells tbody th[title="{LAYER}"]').parentElement;
    point(row.cells[2]);
    const expert = readout();
    point(row.nextElementSibling.cells[1]);
    return [expert, readout(), document.querySelector("[data-where]").textContent];
    """
    expert, kind, where = browse(script)
    line = runs[0].diagnostics[-1]
    layer = line["layers"][LAYER]
    cosines = [row[1] for row in layer["cosine_to_others"]]
    assert f"lowest cosine to the others {told(min(cosines))} ({line['sites'][cosines.index(min(cosines))]})" in expert
    pairs = dict(zip(combinations(line["sites"], 2), layer["pairs"][1], strict=True))
    opposed = min(pairs, key=pairs.get)
    assert any(f"most opposed {one} and {other} {told(pairs[opposed])}" in expert for one, other in
               (opposed, opposed[::-1]))  # fmt: skip
    assert where == "router"
    assert kind.startswith("router: lowest cosine")
    assert "expert" not in kind
    assert "tokens" not in kind


def told(number):
    return str(number).replace("-", "\u2212")


def test_pointing_touches_what_changed_alone(browse):
    """Another expert of a layer: the old and the new cell of each map, pairs, a column of each table of sites; another
    layer: the numbers of its sites too. Charts and maps keep their colours and texts.
    """
    script = """
    const watched = new MutationObserver(() => {});
    watched.observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
    const first = document.querySelector('article table[data-sort="map"]').tBodies[0].rows[0];
    point(first.cells[1]);
    const touched = (cell) => {
      watched.takeRecords();
      point(cell);
      const records = watched.takeRecords().map((one) => {
        const table = one.target.closest("table")?.dataset.sort ?? one.target.closest("svg")?.tagName ?? "text";
        return `${table} ${one.attributeName ?? one.type}`;
      });
      return [...new Set(records)].sort();
    };
    return [touched(first.cells[2]), touched(first.nextElementSibling.cells[2])];
    """
    same, other = browse(script)
    assert "map class" not in same + other
    assert {one for one in same if one.startswith("sites")} == {"sites aria-selected"}
    assert {"sites class", "sites childList"} <= set(other)
    assert {one for one in same + other if one.startswith("svg")} <= {"svg class"}  # the lines of the chosen expert


def test_site_tables_take_the_width_of_the_chosen_layer(browse, runs):
    script = f"""
    const head = [...document.querySelectorAll("table.cells tbody th")].find((cell) => cell.title === "{LAYER}");
    head.focus();
    return [...document.querySelectorAll('[data-sort="sites"]')].map((table) => table.rows[0].cells.length - 1);
    """
    assert set(browse(script)) == {4}
    assert len(blocks_of(runs[0].diagnostics[0])[LAYER]["norm"]) == 4


def test_click_on_a_chart_chooses_its_round(browse):
    script = """
    const svg = document.querySelector('[data-chart="global"] svg');
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new MouseEvent("click", { clientX: box.left + 1, clientY: box.top, bubbles: true }));
    return ["#round-shown b", "tspan[data-line]"].map((where) => document.querySelector(where).textContent);
    """
    assert browse(script) == ["1", "1.5000"]


def test_page_of_a_run_without_diagnostics_fails_nowhere(browse, tmp_path):
    folder = write_run(tmp_path / "old")
    (folder / "diagnostics/rounds.jsonl").unlink()
    assert browse("return failed;", page=render(read_runs([folder]))) == []


@pytest.mark.parametrize("width", [500, 1400])
def test_page_of_runs_with_objectives_follows_the_slider_and_fits(browse, tmp_path, width):
    folders = [write_run(tmp_path / f"run-{share}", share=share) for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    script = """
    const slider = document.getElementById("round");
    const shown = () => [...document.querySelectorAll('[data-chart="kl"] tspan')].map((value) => value.textContent);
    const last = shown();
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    return [failed, last, shown(), innerWidth, document.documentElement.scrollWidth];
    """
    page = render(read_runs(folders))
    failed, last, first, inner, needed = browse(script, f"--window-size={width},900", page=page)
    assert failed == []
    assert (set(last), set(first)) == ({"0.3000"}, {"0.1000"})
    assert needed <= inner
