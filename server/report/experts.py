"""The part of a report that is about experts: maps of layer x expert, and of who pulls against whom.

Drawn for one state, (round, block, expert); the page's script redraws it for others from the same diagnostics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from server.report.charts import PANEL, Chart, bounds_of, line_chart
from server.report.heat import Heat, Scale, Value, around, cells, flat, from_zero, near
from server.report.runs import Run

MAPS = {
    "lowest_cosine": (
        "Cosine to the consensus",
        "Of the site that goes along least: 1 agrees with the mean update of the sites that used the expert, "
        "0 has nothing in common with it, below 0 opposes it.",
    ),
    "kept": (
        "Length kept by averaging",
        "‖mean update‖ / mean ‖update‖: 1 if all sites pull the same way; K sites with nothing in common leave 1/√K.",
    ),
    "scale": (
        "Scale of the step taken",
        "How far the next global adapter goes along the mean update: 1 is the whole of it. Values far out have the "
        "last colour.",
    ),
    "num_tokens": ("Tokens", "Routed to the expert in local training, by all sites together."),
}
"""Diagnostic -> title and how to read it; drawn as layer x expert."""

OF_SITES = {
    "load": ("Load", "Share of the site's tokens in this layer that went to each expert."),
    "cosine": ("Cosine to the consensus", "Of each site's update of each expert."),
    "weight": ("Weight in the rule", "The say that the strategy gave each site in each expert."),
}
"""Diagnostic -> title and how to read it; drawn as site x expert."""

PAIRS = ("Who pulls against whom", "Cosine between the updates of two sites: below 0 they undo each other.")


@dataclass(frozen=True)
class ExpertsView:
    """One run's part."""

    run: Run
    index: int
    maps: list[Heat]
    pairs: Heat
    of_sites: list[Heat]
    norms: list[Chart]


def lines_of(runs: Sequence[Run]) -> Iterable[Mapping[str, Any]]:
    """All rounds' diagnostics of all runs."""
    return (line for run in runs for line in run.diagnostics)


def blocks_of(line: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Layers and kinds together."""
    return {**line["layers"], **line["kinds"]}


def scales(runs: Sequence[Run]) -> dict[str, Scale]:
    """One scale for each diagnostic, the same for all runs and rounds."""
    blocks = [block for line in lines_of(runs) for block in blocks_of(line).values()]

    def every(name: str) -> list[float]:
        return [number for block in blocks for number in flat(block.get(name))]

    loads = [share for block in blocks for row in block.get("tokens", []) for share in load(row) if share is not None]
    weights = [number for block in blocks for number in flat(block.get("rule", {}).get("weight"))]
    return {
        "lowest_cosine": Scale("d", -1.0, 1.0, "fixed"),
        "cosine": Scale("d", -1.0, 1.0, "fixed"),
        "kept": Scale("s", 0.0, 1.0, "fixed"),
        "weight": from_zero(weights, "fixed", 0.05),
        "scale": around(1.0, near(1.0, every("scale")), 0.1),
        "num_tokens": from_zero(every("num_tokens"), "count", 1.0),
        "load": from_zero(loads, "percent", 0.05),
        "pairs": around(0.0, every("pairs") + every("block_pairs"), 0.25),
    }


def load(tokens: Sequence[Value]) -> list[Value]:
    """Share of a site's tokens that went to each expert; None for a site that did not count them."""
    if any(count is None for count in tokens):
        return [None] * len(tokens)
    total = sum(count for count in tokens if count is not None)
    return [(count or 0.0) / total if total else 0.0 for count in tokens]


def experts_view(run: Run, index: int, scale: Mapping[str, Scale], server_round: int | None, block: str) -> ExpertsView:
    """A run's part for the whole of ``block`` in a round; without numbers where the run has none of that round."""
    nothing: Mapping[str, Any] = {"sites": [], "layers": {}, "kinds": {}}
    line = next((line for line in run.diagnostics if line["round"] == server_round), nothing)
    has_rule = any("rule" in layer for each in run.diagnostics for layer in each["layers"].values())
    return ExpertsView(
        run,
        index,
        maps=[_map(name, run, line, scale[name]) for name in MAPS],
        pairs=_pairs(run, line, block, scale["pairs"]),
        of_sites=[_of_sites(name, run, line, block, scale[name]) for name in OF_SITES if name != "weight" or has_rule],
        norms=_norms(run, index),
    )


def _map(name: str, run: Run, line: Mapping[str, Any], scale: Scale) -> Heat:
    """Layer x expert."""
    widths = {block: _width(block, run) for block in run.blocks()}
    found = blocks_of(line)
    rows = [(block, cells(found.get(block, {}).get(name) or [None] * width, scale)) for block, width in widths.items()]
    return Heat(name, *MAPS[name], scale, "layer", rows, _numbered(max(widths.values(), default=0)))


def _pairs(run: Run, line: Mapping[str, Any], block: str, scale: Scale) -> Heat:
    """Site x site, for the whole block."""
    cosines = blocks_of(line).get(block, {}).get("block_pairs", [])
    known = dict(zip(combinations(line["sites"], 2), cosines, strict=False))
    known |= {(right, left): value for (left, right), value in known.items()}
    rows = [(left, cells([known.get((left, right)) for right in run.sites], scale)) for left in run.sites]
    return Heat("pairs", *PAIRS, scale, "site", rows, _numbered(len(run.sites), first=1))


def _of_sites(name: str, run: Run, line: Mapping[str, Any], block: str, scale: Scale) -> Heat:
    """Site x expert."""
    width = _width(block, run)
    known = dict(zip(line["sites"], site_values(name, blocks_of(line).get(block, {})), strict=False))
    rows = [(site, cells(known.get(site) or [None] * width, scale)) for site in run.sites]
    return Heat(name, *OF_SITES[name], scale, "site", rows, _numbered(width))


def site_values(name: str, block: Mapping[str, Any]) -> list[list[Value]]:
    """[site][expert] of a diagnostic of a block; empty if there is none."""
    if name == "load":
        return [load(row) for row in block.get("tokens", [])]
    source = block.get("rule", {}) if name == "weight" else block
    values: list[list[Value]] = source.get(name, [])
    return values


def short_name(block: str) -> str:
    """``layer 3`` for ``model.layers.3.mlp``; the name itself where it has no or several numbers."""
    numbers = [part for part in block.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else block


def _width(name: str, run: Run) -> int:
    """Experts of a block; 1 for a kind."""
    for line in run.diagnostics:
        block = blocks_of(line).get(name, {})
        for key in ("num_tokens", "norm"):
            if key in block:
                return len(block[key])
    return 0


def _numbered(count: int, first: int = 0) -> list[str]:
    return [str(number) for number in range(first, first + count)]


def _norms(run: Run, index: int) -> list[Chart]:
    """A panel for each block: ‖B A‖ of the global adapter's experts over the rounds, on one axis."""
    series: dict[str, list[dict[int, float]]] = {}
    for line in run.diagnostics:
        for name, block in blocks_of(line).items():
            norms = block.get("norm", [])
            rows = series.setdefault(name, [{} for _ in norms])
            for values, norm in zip(rows, norms, strict=False):
                values[line["round"]] = norm
    bounds = bounds_of([{0: 0.0}, *(values for rows in series.values() for values in rows)])
    charts = [
        line_chart(
            f"norm-{index}-{number}", name, [(str(e), "expert", values) for e, values in enumerate(rows)], PANEL, bounds
        )
        for number, (name, rows) in enumerate(series.items())
    ]
    return [chart for chart in charts if chart]
