"""The sites' panels: held-out loss of each, and when and why a site was left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from server.report.charts import PANEL, Chart, Series, alike_ticks, bounds_of, line_chart
from server.report.runs import Run, natural

MAX_PANELS = 12
"""Of more sites those with the highest last loss stand open, the rest folded."""


@dataclass(frozen=True)
class SitePanel:
    """One site."""

    site: str
    chart: Chart | None
    """None if its loss was never measured."""
    notes: list[str]


@dataclass(frozen=True)
class SitePanels:
    """All sites that there is something to show of."""

    first: list[SitePanel]
    rest: list[SitePanel]
    """Folded."""

    @property
    def charts(self) -> list[Chart]:
        """Of all panels that have one."""
        return [panel.chart for panel in (*self.first, *self.rest) if panel.chart]


def site_panels(runs: Sequence[Run]) -> SitePanels:
    """One panel for each site: held-out loss of the model that the run gives the site.

    All span the same on the upright axis, each around its own losses, so that slopes can be compared.
    """
    sites = sorted({site for run in runs for site in run.sites}, key=natural)
    losses: dict[str, list[Series]] = {site: [run.of_site(site, "loss") for run in runs] for site in sites}
    measured = [site for site in sites if any(losses[site])]
    ranges = [bounds_of(losses[site]) for site in measured]
    ticks = dict(zip(measured, alike_ticks(ranges, 3) if ranges else [], strict=True))
    panels = []
    for index, site in enumerate(sites):
        series = [(run.label, f"run-{number}", losses[site][number]) for number, run in enumerate(runs)]
        chart = line_chart(f"site-{index}", site, series, PANEL, ticks.get(site))
        panels.append(SitePanel(site, chart, notes_of(runs, site)))
    shown = [panel for panel in panels if panel.chart or panel.notes]
    if len(shown) <= MAX_PANELS:
        return SitePanels(shown, [])
    worst = sorted(shown, key=lambda panel: -_last_loss(losses[panel.site]))[:MAX_PANELS]
    return SitePanels(worst, [panel for panel in shown if panel not in worst])


def _last_loss(of_runs: Sequence[Series]) -> float:
    """The highest of any run; a site without any needs looking at most."""
    return max((values[max(values)] for values in of_runs if values), default=float("inf"))


def notes_of(runs: Sequence[Run], site: str) -> list[str]:
    """When and why a site was left out: a line for each run and reason."""
    notes = []
    for run in runs:
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        for (word, reason), rounds in left_out(run, site).items():
            told = f"{word} in round{'s' * (len(rounds) > 1)} {_spans(rounds)}"
            notes.append(f"{prefix}{told}{f': {reason}' if reason else ''}")
    return notes


def left_out(run: Run, site: str) -> Mapping[tuple[str, str], list[int]]:
    """(``dropped`` or ``rejected``, reason) -> rounds."""
    found: dict[tuple[str, str], list[int]] = {}
    for row in run.rows:
        if row.get("type") == "site" and row["site"] == site:
            for word in ("dropped", "rejected"):
                if reason := row.get(word):
                    found.setdefault((word, reason if isinstance(reason, str) else ""), []).append(row["round"])
    return found


def _spans(rounds: Iterable[int]) -> str:
    """``2, 3, 5-9``, with a dash: three and more that follow each other are a span."""
    spans: list[list[int]] = []
    for number in sorted(rounds):
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    told = [f"{span[0]}\u2013{span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans]
    return ", ".join(told)
