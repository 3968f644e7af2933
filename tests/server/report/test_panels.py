"""Panels of sites: common span, the worst first, when and why a site was left out."""

from __future__ import annotations

import json

import pytest

from server.report.panels import MAX_PANELS, notes_of, site_panels
from server.report.runs import read_runs
from tests.server.report.folders import rewritten, write_run
from tests.server.report.reading import page_of


def test_panels_span_the_same_each_around_its_own_losses(tmp_path):
    """bank falls from 1.5 to 0.75, clinic from 2.5 to 1.75: steps of 0.2 or 0.5, and never one axis."""
    panels = site_panels(read_runs([write_run(tmp_path / "run", sites=["bank", "clinic"])]))
    axes = [chart.y for chart in panels.charts]
    assert axes[0].high - axes[0].low == pytest.approx(axes[1].high - axes[1].low)
    assert axes[0].low < axes[1].low
    for axis, (low, high) in zip(axes, ((0.75, 1.5), (1.75, 2.5)), strict=True):
        assert axis.low <= low < high <= axis.high


def test_many_sites_have_the_worst_ones_first_and_the_rest_folded(tmp_path):
    """Losses grow with the place among the sites."""
    sites = [f"site-{number}" for number in range(MAX_PANELS + 3)]
    runs = read_runs([write_run(tmp_path / "run", sites=sites, rounds=2)])
    panels = site_panels(runs)
    assert [panel.site for panel in panels.first] == sites[:2:-1]
    assert [panel.site for panel in panels.rest] == sites[:3]
    assert len(panels.charts) == len(sites)
    assert "<summary>3 more sites</summary>" in page_of(runs)
    few = site_panels(read_runs([write_run(tmp_path / "few", sites=sites[:MAX_PANELS], rounds=1)]))
    assert ([panel.site for panel in few.first], few.rest) == (sites[:MAX_PANELS], [])


def without_clinic(row):
    """It never answers: no loss, no bytes."""
    if row.get("site") != "clinic":
        return row
    return {"type": "site", "round": row["round"], "site": "clinic", "dropped": "out of memory"}


def test_site_that_was_dropped_in_every_round_has_a_panel_that_says_so(tmp_path):
    folder = write_run(tmp_path / "run", rounds=4, sites=["bank", "clinic"])
    rewritten(folder / "metrics.jsonl", without_clinic)
    runs = read_runs([folder])
    bank, clinic = site_panels(runs).first
    assert (bank.site, bank.notes) == ("bank", ["dropped in round 2: late"])
    assert (clinic.site, clinic.chart, clinic.notes) == ("clinic", None, ["dropped in rounds 1\u20134: out of memory"])
    page = page_of(runs)
    assert "its loss was never measured" in page
    assert ">dropped</th>" in page
    assert "<td>2</td><td>5</td>" in " ".join(page.split())


def test_nothing_was_dropped_so_the_overview_has_no_such_column(tmp_path):
    page = page_of(read_runs([write_run(tmp_path / "run", sites=["clinic"])]))
    assert ">dropped</th>" not in page


def test_notes_are_grouped_by_word_and_reason(tmp_path):
    reasons = {1: "late", 2: "late", 4: "away", 5: "late"}

    def changed(row):
        if row.get("site") != "clinic":
            return row
        told = {"dropped": reasons[row["round"]]} if row["round"] in reasons else {"rejected": True}
        return row | told

    folder = write_run(tmp_path / "run", rounds=5, sites=["clinic"])
    rewritten(folder / "metrics.jsonl", changed)
    (run,) = read_runs([folder])
    told = ["dropped in rounds 1, 2, 5: late", "rejected in round 3", "dropped in round 4: away"]
    assert notes_of([run], "clinic") == told
    assert notes_of([run, run], "clinic") == [f"run: {note}" for note in [*told, *told]]


def test_sites_stand_in_their_natural_order(tmp_path):
    sites = ["hospital-10", "hospital-2", "hospital-1"]
    runs = read_runs([write_run(tmp_path / "run", sites=sites, rounds=1)])
    assert runs[0].sites == sites[::-1]
    assert [panel.site for panel in site_panels(runs).first] == sites[::-1]
    assert json.dumps(sites[::-1], separators=(",", ":")) in page_of(runs)
