"""The part of a report that is about experts: maps of layer x expert, and of who pulls against whom.

Drawn for one state, (round, block, expert); the page's script redraws it for others from the same diagnostics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from server.report.charts import PANEL, Chart, bounds_of, line_chart, nice_ticks
from server.report.heat import Heat, Scale, Value, around, cells, cosines, flat, from_zero, near
from server.report.runs import Run

MAPS = {
    "lowest_to_others": (
        "Cosine to the other sites, lowest of any",
        "Of the site that goes most against the sum of the other sites' updates: below 0 it undoes what they do.",
    ),
    "lowest_cosine": (
        "Cosine to the consensus, lowest of any site",
        "To the mean update of the sites that used the expert. A site's own share is in it: of K orthogonal updates of "
        "one length each has 1/√K, so 0 is already opposition.",
    ),
    "kept": (
        "Length kept by averaging",
        "‖mean update‖ / mean ‖update‖: 1 if all sites pull the same way; K sites with nothing in common leave 1/√K.",
    ),
    "scale": (
        "Scale of the step taken",
        "How far the next global adapter goes along the mean update: 1 is the whole of it. The mean counts sites "
        "alike, so a rule that counts examples, as FedAvg does, may be off 1. Values far out have the last colour.",
    ),
    "rule_scale": (
        "Scale factor of the rule",
        "How many times as long as its mean update the strategy itself made the step: under FC-MoE 1 + s, what its "
        "projection does to the weighted mean; under FC-MoE plus before momentum and flattening.",
    ),
    "num_tokens": ("Tokens", "Routed to the expert in local training, by all sites together."),
}
"""Diagnostic -> title and how to read it; drawn as layer x expert. Of the rule where the run has it, others where a run
of the page has it."""

OF_SITES = {
    "load": ("Load", "Share of the site's tokens in this layer that went to each expert."),
    "cosine_to_others": (
        "Cosine to the other sites",
        "Of each site's update of each expert, to the sum of the others.",
    ),
    "cosine": (
        "Cosine to the consensus, of each site",
        "Of each site's update of each expert; the site's own share is in the consensus.",
    ),
    "weight": ("Weight in the rule", "The say that the strategy gave each site in each expert."),
    "conflict": (
        "Conflict in the rule",
        "Share of the expert's parts in which the strategy found the site in conflict with the others.",
    ),
}
"""Diagnostic -> title and how to read it; drawn as site x expert. Of the rule where the run has it, others where a run
of the page has it."""

OF_RULE = {"weight": "weight", "conflict": "conflict", "rule_scale": "scale"}
"""Those that the strategy itself found -> what it calls them."""

PAIRS = ("Who pulls against whom", "Cosine between the updates of two sites: below 0 they undo each other.")


@dataclass(frozen=True)
class ExpertsView:
    """One run's part."""

    run: Run
    index: int
    told: str
    """Which round it shows where that is not the chosen one."""
    maps: list[Heat]
    pairs: Heat | None
    """None where sites sent nothing to compare."""
    of_sites: list[Heat]
    norms: list[Chart]


def lines_of(runs: Sequence[Run]) -> Iterable[Mapping[str, Any]]:
    """All rounds' diagnostics of all runs."""
    return (line for run in runs for line in run.diagnostics)


def blocks_of(line: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Layers and kinds together."""
    return {**line["layers"], **line["kinds"]}


def scales(runs: Sequence[Run]) -> dict[str, Scale]:
    """One scale for each diagnostic that any run has a number of, the same for all runs and rounds."""
    blocks = [block for line in lines_of(runs) for block in blocks_of(line).values()]
    names = (*MAPS, *OF_SITES, "pairs", "block_pairs")
    every = {name: [number for block in blocks for number in flat(values_of(name, block))] for name in names}
    every["pairs"] += every.pop("block_pairs")
    to_consensus, to_others = (
        cosines(every[lowest] + every[each])
        for lowest, each in (("lowest_cosine", "cosine"), ("lowest_to_others", "cosine_to_others"))
    )
    found = {
        "lowest_to_others": to_others,
        "cosine_to_others": to_others,
        "lowest_cosine": to_consensus,
        "cosine": to_consensus,
        "kept": Scale("s", 0.0, 1.0, "fixed"),
        "weight": from_zero(every["weight"], "share", 0.05),
        "conflict": Scale("s", 0.0, 1.0, "fixed"),
        "scale": around(1.0, near(1.0, every["scale"]), 0.1),
        "rule_scale": around(1.0, near(1.0, every["rule_scale"]), 0.1),
        "num_tokens": from_zero(every["num_tokens"], "count", 1.0),
        "load": from_zero(every["load"], "percent", 0.05),
        "pairs": cosines(every["pairs"]),
    }
    return {name: scale for name, scale in found.items() if every[name]}


def load(tokens: Sequence[Value]) -> list[Value]:
    """Share of a site's tokens that went to each expert; None for a site that did not count them."""
    if any(count is None for count in tokens):
        return [None] * len(tokens)
    total = sum(count for count in tokens if count is not None)
    return [(count or 0.0) / total if total else 0.0 for count in tokens]


def experts_view(run: Run, index: int, scale: Mapping[str, Scale], server_round: int | None, block: str) -> ExpertsView:
    """A run's part for the whole of ``block`` in a round; where it has none of that round, in its last one before."""
    nothing: Mapping[str, Any] = {"round": None, "sites": [], "layers": {}, "kinds": {}}
    past = [line for line in run.diagnostics if line["round"] <= (server_round or 0)]
    line = past[-1] if past else nothing
    blocks = [found for each in lines_of([run]) for found in blocks_of(each).values()]
    own = {name for name in OF_RULE if any(values_of(name, found) for found in blocks)}
    drawn = [name for name in scale if name in own or name not in OF_RULE]
    return ExpertsView(
        run,
        index,
        told=told_round(run, line["round"], server_round),
        maps=[_map(name, run, line, scale[name]) for name in MAPS if name in drawn],
        pairs=_pairs(run, line, block, scale["pairs"]) if "pairs" in scale else None,
        of_sites=[_of_sites(name, run, line, block, scale[name]) for name in OF_SITES if name in drawn],
        norms=_norms(run, index),
    )


def told_round(run: Run, shown: int | None, chosen: int | None) -> str:
    """Which round a run shows, where that is not the chosen one."""
    if shown == chosen:
        return ""
    if shown is None:
        return "no round yet"
    return f"round {shown}, its last" if shown == run.diagnostics[-1]["round"] else f"round {shown}"


def _map(name: str, run: Run, line: Mapping[str, Any], scale: Scale) -> Heat:
    """Layer x expert."""
    widths = {block: _width(block, run) for block in run.blocks()}
    most = max(widths.values(), default=0)
    found = {block: values_of(name, values) for block, values in blocks_of(line).items()}
    rows = [(block, cells(found.get(block) or [None] * width, scale, most)) for block, width in widths.items()]
    return Heat(name, *MAPS[name], scale, "layer", rows, _numbered(most))


def _pairs(run: Run, line: Mapping[str, Any], block: str, scale: Scale) -> Heat:
    """Site x site, for the whole block."""
    cosines = blocks_of(line).get(block, {}).get("block_pairs", [])
    known = dict(zip(combinations(line["sites"], 2), cosines, strict=False))
    known |= {(right, left): value for (left, right), value in known.items()}
    count = len(run.sites)
    rows = [(left, cells([known.get((left, right)) for right in run.sites], scale, count)) for left in run.sites]
    return Heat("pairs", *PAIRS, scale, "site", rows, _numbered(count, first=1))


def _of_sites(name: str, run: Run, line: Mapping[str, Any], block: str, scale: Scale) -> Heat:
    """Site x expert."""
    width = _width(block, run)
    known = dict(zip(line["sites"], values_of(name, blocks_of(line).get(block, {})), strict=False))
    rows = [(site, cells(known.get(site) or [None] * width, scale, width)) for site in run.sites]
    return Heat(name, *OF_SITES[name], scale, "site", rows, _numbered(width))


def values_of(name: str, block: Mapping[str, Any]) -> list[Any]:
    """A diagnostic of a block, [expert] or [site][expert] or of pairs; empty if there is none."""
    if name == "load":
        return [load(row) for row in block.get("tokens", [])]
    source = block.get("rule", {}) if name in OF_RULE else block
    values: list[Any] = source.get(OF_RULE.get(name, name), [])
    return values


def short_name(block: str) -> str:
    """``layer 3`` for ``model.layers.3.mlp``; the name itself where it has no or several numbers."""
    numbers = [part for part in block.split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else block


def kinds_of(runs: Sequence[Run]) -> set[str]:
    """Names of blocks that are no layers and have no experts."""
    return {name for line in lines_of(runs) for name in line["kinds"]}


def where_of(block: str, runs: Sequence[Run]) -> str:
    """A block as a whole, for people."""
    return short_name(block) if block in kinds_of(runs) else f"{short_name(block)}, all experts"


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
                if norm is not None:
                    values[line["round"]] = norm
    ticks = nice_ticks(*bounds_of([{0: 0.0}, *(values for rows in series.values() for values in rows)]), 3)
    charts = [
        line_chart(
            f"norm-{index}-{number}", name, [(str(e), "expert", values) for e, values in enumerate(rows)], PANEL, ticks
        )
        for number, (name, rows) in enumerate(series.items())
    ]
    return [chart for chart in charts if chart]
