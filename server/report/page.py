"""One self-contained HTML page from runs: what stands where. How it looks is in ``page/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from server.report.charts import LARGE, PANEL, Chart, Series, bounds_of, line_chart
from server.report.experts import ExpertsView, experts_view, lines_of, scales, short_name
from server.report.matrix import matrix_views
from server.report.objectives import fronts_view, objectives_view
from server.report.runs import Run, read_runs
from server.view import number, size

MAX_RUNS = 8
"""Runs that are shown whole: colours that can be told apart, by colour-blind people too."""
SIGNATURE = " Bouquet</title>"
"""In the head of every page."""
_HEAD_BYTES = 1 << 16

KINDS = ("experts", "attention", "router", "other", "extras")
REST = "counts, framing"


@dataclass(frozen=True)
class SitePanel:
    """Held-out loss at one site."""

    site: str
    chart: Chart
    notes: list[str]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one run by kind, both ways."""

    run: Run
    rows: list[tuple[str, dict[str, int]]]
    """Kind, then bytes by way."""
    most: int


def write_report(folders: Sequence[Path], target: Path) -> None:
    """Write the page of the runs in ``folders`` to the file ``target``.

    Raises:
        ValueError: If a folder holds no run, a file of one is damaged, or ``target`` is another file than such a page.
        RuntimeError: If it cannot be written there.
    """
    if target.is_file() and not _is_page(target):
        raise ValueError(f"{target} is there already, and no page of Bouquet's: move it, or name another file")
    page = render(read_runs(folders))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RuntimeError(f"cannot write {target}: {error.strerror}; name another file") from error


def _is_page(path: Path) -> bool:
    """Whether it is an earlier page, which the next one may replace."""
    with path.open("rb") as file:
        return SIGNATURE.encode() in file.read(_HEAD_BYTES)


def render(runs: Sequence[Run]) -> str:
    """The page as HTML; of more than ``MAX_RUNS`` how all of them end, and charts and maps of the first."""
    environment = Environment(
        loader=PackageLoader("server.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"number": number, "size": size, "short": short_name}
    page = contents(runs[:MAX_RUNS])
    if len(runs) > MAX_RUNS:
        page |= {"overview": [_overview(run) for run in runs], "ends": fronts_view(runs, MAX_RUNS)}
    return environment.get_template("report.html").render(page)


def contents(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows of runs that have a colour each."""
    rounds = sorted({line["round"] for line in lines_of(runs)})
    blocks = list(dict.fromkeys(name for run in runs for name in run.blocks()))
    scale = scales(runs)
    last, block = (rounds[-1] if rounds else None), (blocks[0] if blocks else "")
    views = [experts_view(run, index, scale, last, block) for index, run in enumerate(runs)]
    convergence = _over_rounds("global", "Global model", runs, "global_loss", single="all held-out data")
    panels = _site_panels(runs)
    gap = _over_rounds("gap", "Aggregation gap", runs, "aggregation_gap", single="gap")
    objectives = objectives_view(runs)
    charts = [
        *(objectives.charts if objectives else ()),
        convergence,
        gap,
        *(panel.chart for panel in panels),
        *(chart for view in views for chart in view.norms),
    ]
    return {
        "runs": runs,
        "overview": [_overview(run) for run in runs],
        "convergence": convergence,
        "panels": panels,
        "objectives": objectives,
        "ends": objectives,
        "gap": gap,
        "views": [view for view in views if view.run.diagnostics],
        "matrices": matrix_views(runs),
        "traffic": [_traffic(run) for run in runs],
        "rounds": rounds or sorted({row["round"] for run in runs for row in run.rounds}),
        "block": block,
        "page": _for_script(runs, rounds, blocks, scale, [chart for chart in charts if chart]),
    }


def _for_script(
    runs: Sequence[Run], rounds: Sequence[int], blocks: Sequence[str], scale: Mapping[str, Any], charts: Sequence[Chart]
) -> dict[str, Any]:
    keys = ("round", "sites", "layers", "kinds")
    return {
        "rounds": rounds or sorted({row["round"] for run in runs for row in run.rounds}),
        "blocks": blocks,
        "scales": {name: one.json() for name, one in scale.items()},
        "runs": [
            {"sites": run.sites, "lines": [{key: line[key] for key in keys} for line in run.diagnostics]}
            for run in runs
        ],
        "charts": {
            chart.name: {
                "rounds": chart.rounds,
                "x": [chart.x.low, chart.x.high, chart.x.start, chart.x.end],
                "lines": [line.values for line in chart.lines],
            }
            for chart in charts
        },
    }


def _over_rounds(name: str, title: str, runs: Sequence[Run], key: str, single: str) -> Chart | None:
    """A chart of one number a round, a line for each run."""
    labels = [single] if len(runs) == 1 else [run.label for run in runs]
    series = [
        (label, f"run-{index}", run.of_round(key)) for index, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]
    room = LARGE.right + (0 if len(runs) == 1 else 7 * min(24, max(map(len, labels))))
    return line_chart(name, title, series, LARGE._replace(right=room))


def _site_panels(runs: Sequence[Run]) -> list[SitePanel]:
    """One panel for each site on a common axis: held-out loss of the model that the run gives the site."""
    sites = sorted({site for run in runs for site in run.sites})
    losses: dict[str, list[Series]] = {site: [run.of_site(site, "loss") for run in runs] for site in sites}
    bounds = bounds_of([values for of_site in losses.values() for values in of_site])
    panels = []
    for index, site in enumerate(sites):
        series = [
            (run.label, f"run-{number}", values)
            for number, (run, values) in enumerate(zip(runs, losses[site], strict=True))
        ]
        chart = line_chart(f"site-{index}", site, series, PANEL, bounds)
        if chart:
            panels.append(SitePanel(site, chart, _notes(runs, site)))
    return panels


def _notes(runs: Sequence[Run], site: str) -> list[str]:
    notes = []
    for run in runs:
        rows = [row for row in run.rows if row.get("type") == "site" and row["site"] == site]
        prefix = f"{run.label}: " if len(runs) > 1 else ""
        for word in ("dropped", "rejected"):
            rounds = [str(row["round"]) for row in rows if row.get(word)]
            if rounds:
                notes.append(f"{prefix}{word} in round{'s' * (len(rounds) > 1)} {', '.join(rounds)}")
    return notes


def _overview(run: Run) -> dict[str, Any]:
    """Numbers of the run's end, None where there are none yet."""
    summary = run.summary or {}
    losses: Mapping[str, float] = summary.get("site_loss") or {}
    worst = max(losses, key=losses.__getitem__) if losses else None
    num_sites = len(run.sites) or 1
    return {
        "label": run.label,
        "strategy": summary.get("strategy", "-"),
        "status": summary.get("status", "not ended"),
        "rounds": max((row["round"] for row in run.rounds), default=0),
        "sites": len(run.sites),
        "global_loss": summary.get("global_loss"),
        "mean_loss": sum(losses.values()) / len(losses) if losses else None,
        "worst": worst,
        "worst_loss": losses[worst] if worst else None,
        "up": sum(row["bytes_up"] for row in run.rounds) / num_sites,
        "down": sum(row["bytes_down"] for row in run.rounds) / num_sites,
        "seconds": summary.get("wall_seconds"),
    }


def _traffic(run: Run) -> Traffic:
    """Bytes of all rounds; what is no adapter, or was not counted by kind, is the rest."""
    ways = ("up", "down")
    total = {way: sum(row[f"bytes_{way}"] for row in run.rounds) for way in ways}
    counted = [row["bytes_by_kind"] for row in run.rounds if "bytes_by_kind" in row]
    rows = [(kind, {way: sum(one[way].get(kind, 0) for one in counted) for way in ways}) for kind in KINDS]
    rest = {way: total[way] - sum(row[way] for _, row in rows) for way in ways}
    rows = [row for row in rows if any(row[1].values())]
    rows.append((REST if counted else "all", rest))
    return Traffic(run, rows, max(1, *(value for _, row in rows for value in row.values())))


__all__ = ["ExpertsView", "render", "write_report"]
