"""The settings in which runs differ, and whether their losses can be compared all the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_MEASURED_BY = ("model.", "data.", "partition.", "eval.")
"""What a loss is of: sections of the settings."""
_ABSENT = "\u2013"
_MOST = 6

Settings = Mapping[str, Any]


def differences(settings: Sequence[Settings]) -> list[tuple[str, list[str]]]:
    """Each setting in which runs differ, with its value in every run, for people; ``output`` always differs."""
    flat = [_flat(one) for one in settings]
    names = sorted({name for one in flat for name in one} - {"output"})
    rows = [(name, [_told(one[name]) if name in one else _ABSENT for one in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def incomparable(settings: Sequence[Settings]) -> str | None:
    """Why the runs' losses are not of one thing; None if they are.

    A setting that a run does not name is none in which it differs: it may be of another version.
    """
    known = [one for one in settings if one]
    names = [
        name
        for name, values in differences(known)
        if name.startswith(_MEASURED_BY) and len(set(values) - {_ABSENT}) > 1
    ]
    if not names:
        return None
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"losses may not be comparable: the runs differ in {', '.join(names[:_MOST])}{more}"


def _flat(settings: Settings, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
