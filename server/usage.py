"""How experts were used in a run, and what the model in use costs a token: a few numbers out of its evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

USAGES = {
    "entropy": "routing entropy",
    "largest_share": "busiest expert's share",
    "flops": "operations",
    "seconds": "time",
}
"""Number -> what it is called.

Of held-out tokens at the sites: entropy over that of equal use, mean over sites and layers, and the largest share of
a layer's tokens that one expert got. Of a personal model: operations and time a token over those of one adapter, means
over the sites.
"""


def usage_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Those of ``USAGES`` that ``evaluation.json`` tells.

    A dense model routes nothing, and one adapter has no cost beside itself.
    """
    found: dict[str, float] = {}
    if layers := evaluation["routing"].values():
        found["entropy"] = statistics.fmean(layer["entropy"] for layer in layers)
        found["largest_share"] = max(layer["largest_share"] for layer in layers)
    if costs := evaluation["cost"].values():
        found |= {key: statistics.fmean(cost[key] for cost in costs) for key in ("flops", "seconds")}
    return found
