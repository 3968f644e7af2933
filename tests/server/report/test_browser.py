"""The page in a real browser: what the script redraws is what Python draws, by mouse and by keyboard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from server.report.experts import blocks_of, experts_view, scales
from server.report.page import render
from server.report.runs import read_runs
from strategies.fedavg import FedAvg
from tests.server.report.folders import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]

ERRORS = "<head><script>window.failed = []; addEventListener('error', (event) => failed.push(event.message));</script>"
CELLS = """
const cells = () => [...document.querySelectorAll("table.cells")].map((table) => [...table.tBodies[0].rows].map(
  (row) => [...row.cells].slice(1).map((cell) => [cell.className, cell.textContent])));
"""
LAYER = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    layers = {"model.layers.0.mlp": 20, LAYER: 4}
    return read_runs([
        write_run(folder / "fc_moe", layers=layers), write_run(folder / "fedavg", FedAvg(), rounds=2, layers=layers),
    ])  # fmt: skip


@pytest.fixture
def browse(runs, tmp_path):
    """Runs the body of a function in the opened page; what it returned."""

    def result_of(script, *options, page=None):
        probe = f"<script>document.body.dataset.result = JSON.stringify((() => {{{CELLS}{script}}})());</script></body>"
        text = (page or render(runs)).replace("<head>", ERRORS, 1)
        head, _, tail = text.rpartition("</body>")
        (tmp_path / "page.html").write_text(head + probe + tail)
        words = [BROWSER, "--headless", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", *options]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        address = (tmp_path / "page.html").as_uri()
        run = subprocess.run([*words, "--dump-dom", address], capture_output=True, text=True, timeout=60, check=True)
        return json.loads(body_of(run.stdout)["data-result"])

    return result_of


def body_of(dom):
    found = {}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "body":
                found.update(attributes)

    Reader().feed(dom)
    return found


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
    shown, failed = browse("return [cells(), failed];")
    assert failed == []
    assert shown == drawn(runs, 3, "model.layers.0.mlp")


@pytest.mark.parametrize("server_round", [1, 2])
def test_slider_shows_another_round_in_every_table(browse, runs, server_round):
    script = f"""
    const slider = document.getElementById("round");
    slider.value = {server_round - 1};
    slider.dispatchEvent(new Event("input"));
    return [cells(), document.getElementById("round-shown").textContent, slider.getAttribute("aria-valuetext")];
    """
    shown, told, spoken = browse(script)
    assert shown == drawn(runs, server_round, "model.layers.0.mlp")
    assert told.split()[0] == str(server_round)
    assert spoken == f"round {server_round}"


def test_keyboard_reaches_an_expert_and_its_pairs_appear(browse, runs):
    """From the first layer's head: down to the second layer, right to its expert 0, right to its expert 1."""
    script = """
    const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
    document.querySelector("table.cells tbody th").focus();
    ["ArrowDown", "ArrowRight", "ArrowRight"].forEach(press);
    const chosen = [...document.querySelectorAll('table[data-sort="map"] [aria-selected="true"]')];
    const stops = document.querySelectorAll('table.cells [tabindex="0"]').length;
    const pairs = [...document.querySelectorAll('[data-sort="pairs"]')].map(
      (table) => table.rows[1].cells[2].textContent);
    return [chosen.map((cell) => [cell.parentElement.cells[0].title, cell.cellIndex - 1]), stops, pairs,
      document.querySelector("[data-where]").textContent, document.getElementById("readout").textContent];
    """
    chosen, stops, pairs, where, readout = browse(script)
    assert chosen == [[LAYER, 1]] * 8  # in four maps of two runs
    assert stops == 8 + 2 + 3 + 2  # one a table
    assert where == "layer 1, expert 1"
    lines = [run.diagnostics[-1] for run in runs]
    assert pairs[0] == f"{lines[0]['layers'][LAYER]['pairs'][1][1]:.2f}".replace("-", "\u2212")  # sites 0 and 2
    assert pairs[1] == "·"  # the second run did not reach this round
    assert f"{lines[0]['layers'][LAYER]['num_tokens'][1]} tokens" in readout


def test_line_of_text_follows_the_round(browse, runs):
    script = """
    document.querySelector("table.cells tbody td").focus();
    const slider = document.getElementById("round");
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    return document.getElementById("readout").textContent;
    """
    tokens = runs[0].diagnostics[0]["layers"]["model.layers.0.mlp"]["num_tokens"][0]
    assert browse(script).endswith(f", {tokens} tokens")


def test_pointing_previews_an_expert_and_leaving_returns(browse):
    script = """
    const cell = document.querySelector("table.cells").tBodies[0].rows[1].cells[3];
    const where = () => document.querySelector("[data-where]").textContent;
    cell.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
    const pointed = where();
    cell.closest("table").dispatchEvent(new PointerEvent("pointerleave"));
    return [pointed, where()];
    """
    assert browse(script) == ["layer 1, expert 2", "layer 0, all experts"]


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


@pytest.mark.parametrize("width", [500, 760, 1400])
def test_page_fits_its_window_and_loads_nothing(browse, width):
    loaded = "performance.getEntriesByType('resource').length"
    script = f"return [innerWidth, document.documentElement.scrollWidth, {loaded}];"
    inner, needed, loaded = browse(script, f"--window-size={width},900")
    assert needed <= inner
    assert loaded == 0


@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)])
def test_page_has_the_theme_of_its_reader(browse, scheme, is_dark):
    """What is drawn, not only what is written: paper and ink, and the colours that charts and cells are drawn in."""
    script = """
    const light = (colour) => colour.match(/\\d+/g).slice(0, 3).reduce((sum, value) => sum + +value, 0) / 765;
    const style = (where) => getComputedStyle(document.querySelector(where));
    return [matchMedia("(prefers-color-scheme: dark)").matches, light(style("body").backgroundColor),
      light(style("body").color), light(style(".line.run-0").stroke)];
    """
    found, paper, ink, line = browse(script, f"--blink-settings=preferredColorScheme={scheme}")
    assert found is is_dark
    assert (paper < 0.2, ink > 0.8) == (is_dark, is_dark)
    assert (line > 0.5) is is_dark


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
