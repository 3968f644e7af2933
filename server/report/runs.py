"""What a report knows of one run: its folder, read and put in order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from server.alignment import settings_of
from server.report.files import (
    DIAGNOSTICS,
    METRICS,
    config_of,
    cut_off,
    diagnostics_of,
    evaluation_of,
    rows_of,
    summary_of,
)

MAX_RUNS = 8
"""Runs of a page that are shown whole: colours that can be told apart, by colour-blind people too."""
MAX_DIAGNOSTICS_BYTES = 16 << 20
"""Diagnostics of all of them on a page, in equal shares; beyond, evenly spaced rounds are left out."""

_MAPS = "maps of experts and of who pulls against whom"


@dataclass(frozen=True)
class Run:
    """One run, as far as it went."""

    label: str
    summary: Mapping[str, Any] | None
    """None if the run has not ended."""
    config_yaml: str
    rows: Sequence[Mapping[str, Any]]
    """Lines of ``metrics.jsonl``."""
    diagnostics: Sequence[Mapping[str, Any]]
    """Lines of ``diagnostics/rounds.jsonl``, one a round."""
    missing: Sequence[str]
    """What the page cannot show of this run, and why."""
    evaluation: Mapping[str, Any] | None = None
    """``evaluation.json``; None if the run has no evaluation matrix."""

    @cached_property
    def rounds(self) -> list[Mapping[str, Any]]:
        """A row for each round, in order."""
        return [row for row in self.rows if row.get("type") == "round"]

    @cached_property
    def sites(self) -> list[str]:
        """Names of all sites that took part, in their natural order."""
        return sorted({row["site"] for row in self.rows if row.get("type") == "site"}, key=natural)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """``config.yaml``, read; empty if there is none."""
        return settings_of(self.config_yaml)

    def of_site(self, site: str, key: str) -> dict[int, float]:
        """Round -> the site's number, where there is one."""
        return _numbers(key, (row for row in self.rows if row.get("type") == "site" and row["site"] == site))

    def of_round(self, key: str) -> dict[int, float]:
        """Round -> the round's number, where there is one."""
        return _numbers(key, self.rounds)

    def blocks(self) -> list[str]:
        """Names of MoE layers, then of other kinds of arrays, that diagnostics speak of."""
        layers = {name for line in self.diagnostics for name in line["layers"]}
        kinds = {name for line in self.diagnostics for name in line["kinds"]}
        return [*sorted(layers, key=natural), *sorted(kinds)]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Key of an order in which layer 2, or hospital-2, comes before number 10."""
    parts = re.findall("[0-9]+|[^0-9]+", name)
    return [(False, int(part), "") if part[0] in "0123456789" else (True, 0, part) for part in parts]


def _numbers(key: str, rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    return {row["round"]: row[key] for row in rows if row.get(key) is not None}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders; a folder of run folders stands for all of them.

    Raises:
        ValueError: If a folder holds no run, or a file of one is damaged.
    """
    paths = run_folders(folders)
    share = MAX_DIAGNOSTICS_BYTES // min(MAX_RUNS, len(paths))
    return [_read(path, label, share) for path, label in zip(paths, labels_of(paths), strict=True)]


def run_folders(folders: Sequence[Path]) -> list[Path]:
    """These folders, each once; in place of a folder of run folders those in it, by name.

    Raises:
        ValueError: If a folder holds no run.
    """
    return list(dict.fromkeys(path.resolve() for folder in folders for path in _runs_in(folder)))


def _runs_in(folder: Path) -> list[Path]:
    if _is_run(folder):
        return [folder]
    found = sorted(filter(_is_run, folder.glob("*/")))
    if not found:
        reason = "no run in it (no metrics.jsonl, no summary.json)" if folder.is_dir() else "not a folder"
        raise ValueError(
            f"{folder}: {reason}; give the folder that `bouquet run` printed, or one that holds such folders"
        )
    return found


def _is_run(folder: Path) -> bool:
    """Whether a run wrote it: one that was refused has a summary alone."""
    return any((folder / name).exists() for name in ("metrics.jsonl", "summary.json"))


def labels_of(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, of whole names, that tell them apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _read(path: Path, label: str, max_bytes: int) -> Run:
    (rows, is_cut), (lines, is_cut_too) = rows_of(path), diagnostics_of(path)
    summary, kept = summary_of(path), thinned(lines, max_bytes)
    missing = [cut_off(name) for name, is_so in ((METRICS, is_cut), (DIAGNOSTICS, is_cut_too)) if is_so]
    missing += _missing(rows, summary, lines, kept)
    return Run(label, summary, config_of(path), rows, kept, missing, evaluation_of(path))


def thinned(lines: Sequence[Mapping[str, Any]], max_bytes: int) -> list[Mapping[str, Any]]:
    """Evenly spaced lines, the last one among them, that are about ``max_bytes`` of JSON together; at least one."""
    total = sum(len(json.dumps(line)) for line in lines)
    step = max(1, -(-total // max_bytes))
    return list(lines[::-1][::step][::-1])


def _missing(
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any] | None,
    lines: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
) -> Iterable[str]:
    rounds = [row for row in rows if row.get("type") == "round" and row["round"] > 0]
    if summary is None:
        yield "no summary.json: the run has not ended, or was cut off; everything below is what it had written"
    elif summary["status"] != "completed":
        yield f"the run failed: {summary['error']}"
    if not rounds:
        yield "no round was completed: there is nothing to draw"
    elif not lines:
        yield f"no diagnostics/rounds.jsonl: the run is of an earlier version of Bouquet, so there are no {_MAPS}"
    elif len(kept) < len(lines):
        yield f"diagnostics of {len(lines)} rounds are too large for one page: {_MAPS} show {len(kept)} of them"
    elif len(lines) < len(rounds):
        yield f"diagnostics of {len(rounds) - len(lines)} rounds were too large for the log: they are at the server"
    if rounds and not any("bytes_by_kind" in row for row in rounds):
        yield "bytes were not yet counted by kind: only their sum is shown"
    if lines and not any(line["layers"] or line["kinds"] for line in lines):
        yield f"sites send nothing that could be compared: there are no {_MAPS}"
    layers = [layer for line in lines for layer in line["layers"].values()]
    if layers and not any("length" in layer for layer in layers):
        yield "experts are not sent: of them there are tokens alone"
    elif layers and not any("pairs" in layer for layer in layers):
        yield "the model has too many experts to keep cosines of sites for each: they are kept for whole layers"
