"""Tables of results in the page."""

from __future__ import annotations

import json

import pytest

from benchmarks.render import HERE, rendered, with_results, write_results

PAGE = "before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n"


def test_table_replaces_what_stood_between_its_markers():
    page = rendered(PAGE, "speed", ["a", "b"], [[1, "x"]])
    assert page == "before\n<!-- speed -->\n| a | b |\n| --- | --- |\n| 1 | x |\n<!-- /speed -->\nafter\n"
    assert rendered(page, "speed", ["a", "b"], [[1, "x"]]) == page


def test_page_without_the_markers_is_an_error_that_names_them():
    with pytest.raises(ValueError, match="<!-- size -->"):
        rendered(PAGE, "size", ["a"], [])


def test_pages_show_the_results_as_they_are():
    page, short = ((folder / "README.md").read_text() for folder in (HERE, HERE.parent))
    assert with_results(page, short, HERE / "results") == (page, short)


def test_summary_goes_to_the_short_page_if_it_has_the_markers(tmp_path):
    write_results(tmp_path / "speed.json", {"markdown": "long\n", "summary": "short"})
    page, short = with_results(PAGE, PAGE, tmp_path)
    assert (page, short) == (PAGE.replace("old", "long"), PAGE.replace("old", "short"))
    assert with_results(PAGE, "nothing", tmp_path) == (page, "nothing")


def test_what_was_not_run_is_told(tmp_path):
    page, short = with_results(PAGE, "nothing", tmp_path)
    assert page == PAGE.replace("old", "speed: not run")
    assert with_results(page, short, tmp_path) == (page, short)


def test_results_are_written_a_run_a_line_and_read_back_as_they_were(tmp_path):
    results = {"runs": [{"loss": 1.5, "sites": 2}, {"text": "a [b]\n| {c} |", "none": None}], "empty": [], "s": [1, 2]}
    write_results(tmp_path / "deep" / "file.json", results)
    text = (tmp_path / "deep" / "file.json").read_text()
    assert json.loads(text) == results
    assert '\n  {"loss": 1.5, "sites": 2},\n' in text
    assert '"s": [1, 2]' in text
