"""Tables of results in the page."""

from __future__ import annotations

import json

import pytest

from benchmarks.render import HERE, rendered, write_results

PAGE = "before\n<!-- speed -->\nold\n<!-- /speed -->\nafter\n"


def test_table_replaces_what_stood_between_its_markers():
    page = rendered(PAGE, "speed", ["a", "b"], [[1, "x"]])
    assert page == "before\n<!-- speed -->\n| a | b |\n| --- | --- |\n| 1 | x |\n<!-- /speed -->\nafter\n"
    assert rendered(page, "speed", ["a", "b"], [[1, "x"]]) == page


def test_page_without_the_markers_is_an_error_that_names_them():
    with pytest.raises(ValueError, match="<!-- size -->"):
        rendered(PAGE, "size", ["a"], [])


def test_page_shows_the_results_as_they_are():
    page = (HERE / "README.md").read_text()
    for path in (HERE / "results").glob("*.json"):
        results = json.loads(path.read_text())
        if isinstance(results, dict) and "table" in results:
            assert rendered(page, path.stem, results["table"]["columns"], results["table"]["rows"]) == page


def test_results_are_written_a_run_a_line_and_read_back_as_they_were(tmp_path):
    results = {"runs": [{"loss": 1.5, "sites": 2}, {"text": "a [b]\n| {c} |", "none": None}], "empty": [], "s": [1, 2]}
    write_results(tmp_path / "deep" / "file.json", results)
    text = (tmp_path / "deep" / "file.json").read_text()
    assert json.loads(text) == results
    assert '\n  {"loss": 1.5, "sites": 2},\n' in text
    assert '"s": [1, 2]' in text
