"""What a site may be called, and how little it may hold."""

from __future__ import annotations

import re
from collections.abc import Iterable

MIN_ROWS = 2
"""Rows a site needs: one to train on and one held out."""

_MAX_NAME_LENGTH = 100


def check_site_name(name: str, source: str) -> None:
    """Raise ``ValueError``, naming ``source``, if a name is not one that ``site_names_from`` leaves as it is."""
    if len(name) > _MAX_NAME_LENGTH or not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?", name):
        raise ValueError(
            f"{source} must be 1 to {_MAX_NAME_LENGTH} letters (a-z), digits, '.', '_' and '-', with none of '.-' at "
            f"either end, got {name!r}"
        )


def site_names_from(values: Iterable[str], source: str) -> dict[str, str]:
    """Value -> site name that is safe as a file name: letters, digits, ``.``, ``_``, ``-``; others become ``-``.

    Raises:
        ValueError: Naming ``source``, if nothing is left of a value, if it is too long, or if two
            values give the same name on a file system that ignores case.
    """
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for value in values:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-.")
        if not name or len(name) > _MAX_NAME_LENGTH:
            raise ValueError(
                f"{source}: {value[:60]!r} cannot name a site: 1 to {_MAX_NAME_LENGTH} letters or digits are needed"
            )
        if name.casefold() in taken:
            raise ValueError(f"{source}: {taken[name.casefold()]!r} and {value!r} would both name the site {name!r}")
        names[value] = name
        taken[name.casefold()] = value
    return names
