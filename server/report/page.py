"""One self-contained HTML page from runs: what stands where. How it looks is in ``page/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from server.report.charts import LARGE, Chart, line_chart, shortened
from server.report.differences import differences, incomparable
from server.report.experts import experts_view, kinds_of, lines_of, scales, short_name, where_of
from server.report.matrix import matrix_views
from server.report.objectives import fronts_view, objectives_view
from server.report.overview import overview, traffic
from server.report.panels import site_panels
from server.report.runs import MAX_RUNS, Run, read_runs
from server.view import number, size

SIGNATURE = " Bouquet</title>"
"""In the head of every page."""
_HEAD_BYTES = 1 << 16
LABEL = 24
"""Most characters of a run's name beside its line."""


def write_report(folders: Sequence[Path], target: Path) -> None:
    """Write the page of the runs in ``folders`` to the file ``target``.

    Raises:
        ValueError: If a folder holds no run, a file of one is damaged, or ``target`` is another file than such a page.
        RuntimeError: If it cannot be written there.
    """
    if target.is_file() and not _is_page(target):
        raise ValueError(f"{target} is there already, and no page of Bouquet's: move it, or name another file")
    page = render(read_runs(folders))
    place = target.resolve()
    temporary = place.with_name(f".{place.name}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(place)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
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
    environment.filters |= {"number": number, "size": size, "short": short_name, "shortened": shortened}
    page = contents(runs[:MAX_RUNS])
    page |= {"overview": overview(runs), "incomparable": incomparable([run.settings for run in runs])}
    if len(runs) > MAX_RUNS:
        page |= {"ends": fronts_view(runs, MAX_RUNS)}
    return environment.get_template("report.html").render(page)


def contents(runs: Sequence[Run]) -> dict[str, Any]:
    """What the template shows of runs that have a colour each."""
    rounds = sorted({line["round"] for line in lines_of(runs)})
    blocks = list(dict.fromkeys(name for run in runs for name in run.blocks()))
    scale = scales(runs)
    last, block = (rounds[-1] if rounds else None), (blocks[0] if blocks else "")
    views = [experts_view(run, index, scale, last, block) for index, run in enumerate(runs)]
    convergence = _over_rounds("global", "Global model", runs, "global_loss", single="all held-out data")
    panels = site_panels(runs)
    gap = _over_rounds("gap", "Aggregation gap", runs, "aggregation_gap", single="gap")
    objectives = objectives_view(runs)
    charts = [
        *(objectives.charts if objectives else ()),
        convergence,
        gap,
        *panels.charts,
        *(chart for view in views for chart in view.norms),
    ]
    return {
        "runs": runs,
        "convergence": convergence,
        "panels": panels,
        "losses": [chart for chart in (convergence, *panels.charts) if chart],
        "objectives": objectives,
        "ends": objectives,
        "gap": gap,
        "views": [view for view in views if view.run.blocks()],
        "matrices": matrix_views(runs),
        "traffic": [traffic(run) for run in runs],
        "differences": differences([run.settings for run in runs]),
        "rounds": rounds or sorted({row["round"] for run in runs for row in run.rounds}),
        "where": where_of(block, runs),
        "page": _for_script(runs, rounds, blocks, scale, [chart for chart in charts if chart]),
    }


def _for_script(
    runs: Sequence[Run], rounds: Sequence[int], blocks: Sequence[str], scale: Mapping[str, Any], charts: Sequence[Chart]
) -> dict[str, Any]:
    keys = ("round", "sites", "layers", "kinds")
    return {
        "rounds": rounds or sorted({row["round"] for run in runs for row in run.rounds}),
        "blocks": blocks,
        "kinds": sorted(kinds_of(runs)),
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
    room = LARGE.right + (0 if len(runs) == 1 else 7 * min(LABEL, max(map(len, labels))))
    return line_chart(name, title, series, LARGE._replace(right=room))
