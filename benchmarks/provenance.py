"""By what code, which libraries and what processor a result was made."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("flwr", "numpy", "peft", "torch", "transformers")


def made_by(folder: Path) -> dict[str, Any]:
    """Commit of the checkout that a folder lies in, versions of the libraries that there are, and the processor.

    A ``+`` after the commit: code has changed since. None: there is no checkout. The processor is told by the vector
    instructions that numpy found: others round differently.
    """
    versions = {name: version(name) for name in LIBRARIES if find_spec(name)}
    return {"commit": _commit(folder), "cpu": _vector_instructions(), "versions": versions}


def _vector_instructions() -> str:
    """By numpy's names: of x86 ``X86_V3`` is AVX2, ``X86_V4`` AVX-512."""
    found = np.show_config(mode="dicts")["SIMD Extensions"]
    return " ".join([*found.get("baseline", []), *found.get("found", [])])


def makers(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each ``made_by`` among the rows once, with the number of its ``runs``; older rows have none and do not count."""
    found: list[dict[str, Any]] = []
    for maker in (row["made_by"] for row in rows if "made_by" in row):
        known = next((one for one in found if one["made_by"] == maker), None)
        if known is None:
            found.append({"made_by": maker, "runs": 1})
        else:
            known["runs"] += 1
    return found


def _commit(folder: Path) -> str | None:
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--", ":/*.py", ":/*.yaml")
    return head + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str | None:
    """What it prints; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603, S607
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


MADE_BY = made_by(Path(__file__).parent)
"""Of what this process computes: found as it begins, before the code on the disk may change."""
