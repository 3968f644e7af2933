"""What may stand in another machine's reply: bounds on what it says of itself, so that no record grows by it."""

from __future__ import annotations

import math
from collections.abc import Mapping

MOST_METRICS = 200
"""Metrics of one reply; the methods here send some tens."""
LARGEST_METRIC = 1e18
"""No metric is larger: a sum over sites still is a number."""
LONGEST_NAME = 200
"""Characters of a site's, a process' or a metric's name."""

_OURS = frozenset({"type", "round", "site", "dropped", "rejected"})
"""What the server itself writes into a site's row."""


def checked_name(what: str, name: str) -> str:
    """The name, if it is short and can be printed in a line.

    Raises:
        ValueError: Naming ``what``, if not.
    """
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise ValueError(f"{what} must be at most {LONGEST_NAME} printable characters, got {name[:40]!r}")
    return name


def check_metrics(metrics: Mapping[str, float]) -> None:
    """Raise ``ValueError`` if there are too many, or one has no proper name, the name of ours, or no proper value."""
    if len(metrics) > MOST_METRICS:
        raise ValueError(f"{len(metrics)} metrics; at most {MOST_METRICS} are possible")
    for name, value in metrics.items():
        checked_name("a metric's name", name)
        if name in _OURS:
            raise ValueError(f"metric {name} has the name of a column of the server's own")
        if not math.isfinite(value) or abs(value) > LARGEST_METRIC:
            raise ValueError(f"metric {name} is {value}; it must be finite and at most {LARGEST_METRIC:g}")
