"""The page in a real browser: what fits where, and what can be seen."""

from __future__ import annotations

import json

import pytest

from server.report.page import render
from server.report.runs import read_runs
from tests.server.report.folders import rewritten, write_run

pytestmark = pytest.mark.slow


def test_cursor_that_has_no_place_in_a_chart_is_not_drawn(browse, tmp_path):
    """The gap begins with round 1; losses are shown from round 2 on."""
    script = """
    const slider = document.getElementById("round");
    slider.value = 0;
    slider.dispatchEvent(new Event("input"));
    return [...document.querySelectorAll(".cursor")].map((one) => getComputedStyle(one).display);
    """
    folder = write_run(tmp_path / "run", sites=["clinic"])
    rewritten(folder / "metrics.jsonl", lambda row: row | ({"loss": None} if row["round"] == 1 else {}))
    shown = browse(script, page=render(read_runs([folder])))
    assert set(shown) == {"inline", "none"}


@pytest.mark.parametrize("width", [500, 1400])
def test_focused_cell_is_not_hidden_under_the_bar(browse, tmp_path, width):
    folder = write_run(tmp_path / "run", sites=[f"site-{number}" for number in range(20)], rounds=1)
    script = """
    const rows = document.querySelector('[data-sort="sites"]').tBodies[0].rows;
    const bar = document.querySelector(".controls");
    scrollTo(0, document.body.scrollHeight);
    scrollTo(0, scrollY + rows[6].getBoundingClientRect().top - bar.getBoundingClientRect().bottom);
    rows[6].cells[1].focus();
    ["ArrowUp", "ArrowUp", "ArrowUp"].forEach((key) => press(key));
    return [document.activeElement.getBoundingClientRect().top, bar.getBoundingClientRect().bottom];
    """
    top, bottom = browse(script, f"--window-size={width},700", page=render(read_runs([folder])))
    assert top >= bottom


@pytest.mark.parametrize("count", [16, 17, 60])
def test_pairs_of_many_sites_need_no_scrolling_and_have_sides_of_one_length(browse, tmp_path, count):
    folder = write_run(tmp_path / "run", sites=[f"site-{number:02}" for number in range(count)], rounds=1)
    script = """
    const table = document.querySelector('[data-sort="pairs"]');
    const scroll = table.closest(".scroll");
    const cell = table.tBodies[0].rows[0].cells[1].getBoundingClientRect();
    const head = getComputedStyle(table.tBodies[0].rows[0].cells[0]);
    return [scroll.scrollWidth, scroll.clientWidth, cell.width, cell.height, head.position];
    """
    needed, inner, width, height, position = browse(script, "--window-size=1400,900", page=render(read_runs([folder])))
    assert needed <= inner
    assert position == "sticky"
    if count > 16:
        assert width == pytest.approx(height, abs=0.6)
        assert width == pytest.approx(max(8, min(24, 480 / count)), abs=0.6)


def test_charts_on_a_phone_stand_one_a_row_and_can_be_read(browse, runs):
    """In a frame as wide as a small phone: a browser's window is not."""
    text = json.dumps(render(runs)).replace("</", r"<\/")
    script = f"""
    const frame = document.body.appendChild(document.createElement("iframe"));
    Object.assign(frame, {{ width: 360, height: 800 }});
    frame.contentDocument.write({text});
    frame.contentDocument.close();
    const size = (svg) => parseFloat(frame.contentWindow.getComputedStyle(svg.querySelector("text")).fontSize);
    const charts = [...frame.contentDocument.querySelectorAll("figure[data-chart] svg")];
    const panels = [...frame.contentDocument.querySelectorAll(".panel")].map((one) => one.getBoundingClientRect().left);
    return [
      charts.map((svg) => size(svg) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width),
      [...new Set(panels)].length, frame.contentDocument.documentElement.scrollWidth];
    """
    sizes, columns, needed = browse(script, page="<html><head></head><body></body></html>")
    assert len(sizes) > 5
    assert min(sizes) >= 9
    assert columns == 1
    assert needed <= 360


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


def test_runs_of_one_round_have_dots_for_lines(browse, tmp_path):
    """Those of experts too: of a path of no length the caps are drawn alone, as wide as the line."""
    script = """
    const paths = [...document.querySelectorAll(".panel path.line")];
    return paths.map((one) => [one.getTotalLength(), one.classList[1], getComputedStyle(one).strokeWidth,
      getComputedStyle(one).strokeLinecap]);
    """
    found = browse(script, page=render(read_runs([write_run(tmp_path / "run", rounds=1)])))
    assert {style for _, style, _, _ in found} == {"run-0", "expert"}
    assert {(length, width, cap) for length, _, width, cap in found} == {(0, "4px", "round")}
