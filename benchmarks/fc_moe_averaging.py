"""What aggregation did to the experts of a run, in a few numbers: is there conflict, and who has the say?

The same measures for every rule (``strategies.diagnostics``), besides two that the rule itself reports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate
from strategies.diagnostics import round_diagnostics

MEASURES = {
    "kept": "length kept by averaging",
    "negative": "share of updates against their mean",
    "opposed": "share of updates against the others' mean",
    "pairs": "cosine of two sites",
    "step": "step along the mean",
    "factor": "factor of the rule",
    "largest_weight": "largest weight of a site",
    "largest_share": "largest share of examples",
}
"""Name in a row -> what it is called in a table.

``kept``: ||mean update|| / mean ||update|| of an expert, over the sites that used it. ``negative``: share of (site,
expert) whose update has a negative cosine to that mean; ``opposed``: to the mean of the other sites. ``pairs``: cosine
of two sites' updates of an expert. ``step``: <step taken, mean> / ||mean||^2. From the rule, where it reports them:
``factor``, its own ``scale`` (for ``fc_moe`` the 1 + s that its projection comes to), and ``largest_weight``, of a site
in an expert. Beside that ``largest_share``: what the largest weight would be if sites were weighted by examples.
"""

Found = dict[str, list[float]]
"""Measure -> its values over sites, experts or pairs; empty where there is nothing to measure."""


def of_round(
    received: Arrays, updates: Sequence[ClientUpdate], aggregation: Aggregation, personal: Mapping[str, Arrays]
) -> Found:
    """All values of a round; the arguments are those of ``round_diagnostics``."""
    layers = round_diagnostics(received, updates, aggregation, personal)["layers"].values()
    rules = [layer["rule"] for layer in layers if "rule" in layer]
    examples = np.array([update.num_examples for update in updates], np.float64)
    return {
        "kept": _numbers(layers, "kept"),
        "negative": [float(cosine < 0) for cosine in _numbers(layers, "cosine")],
        "opposed": [float(cosine < 0) for cosine in _numbers(layers, "cosine_to_others")],
        "pairs": _numbers(layers, "pairs"),
        "step": _numbers(layers, "scale"),
        "factor": _numbers(rules, "scale"),
        "largest_weight": [weight for rule in rules for weight in _largest(rule.get("weight", []))],
        "largest_share": [float(examples.max() / examples.sum())] if layers else [],
    }


def mean_of(rounds: Sequence[Found]) -> dict[str, float | None]:
    """Measure -> mean over all rounds and experts; None where no round had any."""
    values = {name: [value for found in rounds for value in found[name]] for name in MEASURES}
    return {name: round(float(np.mean(of_all)), 5) if of_all else None for name, of_all in values.items()}


def _numbers(tables: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """What there is under that name in the tables, in one row; None is nothing."""
    nested = [np.array(table[name], np.float64).ravel() for table in tables if name in table]
    return [float(value) for values in nested for value in values if np.isfinite(value)]


def _largest(weights_CE: Sequence[Sequence[float | None]]) -> list[float]:
    """Of each expert that any site has a weight in (C sites, E experts)."""
    known_CE = np.nan_to_num(np.array(weights_CE, np.float64))
    return [float(weight) for weight in known_CE.max(axis=0, initial=0.0) if weight > 0] if known_CE.size else []
