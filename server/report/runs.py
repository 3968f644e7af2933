"""What a report knows of one run: its folder, read and put in order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from server.record import RunFolder

MAX_DIAGNOSTICS_BYTES = 16 << 20
"""A run's diagnostics on a page; beyond, evenly spaced rounds are left out."""

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
        """Names of all sites that took part, sorted."""
        return sorted({str(row["site"]) for row in self.rows if row.get("type") == "site"})

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
        return [*sorted(layers, key=_by_number), *sorted(kinds)]


def _by_number(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _numbers(key: str, rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    return {row["round"]: row[key] for row in rows if row.get(key) is not None}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders; a folder of run folders stands for all of them.

    Raises:
        ValueError: If a folder holds no run, or a file of one is damaged.
    """
    paths = run_folders(folders)
    return [_read(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


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


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths, of whole names, that tell them apart."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _read(path: Path, label: str) -> Run:
    folder = RunFolder(path)
    rows = folder.rows()
    damaged = next((row for row in rows if not isinstance(row.get("round"), int)), None)
    if damaged is not None:
        raise ValueError(f"{path}/metrics.jsonl is damaged: a line without a round: {json.dumps(damaged)[:80]}")
    try:
        summary = folder.summary()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}/summary.json is damaged: {error}") from error
    lines = folder.diagnostics()
    if any(not {"round", "sites", "layers", "kinds"} <= line.keys() for line in lines):
        raise ValueError(f"{path}/diagnostics/rounds.jsonl is damaged, or of another version of Bouquet")
    kept = thinned(lines, MAX_DIAGNOSTICS_BYTES)
    config = path / "config.yaml"
    missing = list(_missing(rows, summary, lines, kept))
    try:
        evaluation = folder.evaluation()
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}/evaluation.json is damaged: {error}") from error
    return Run(label, summary, config.read_text() if config.exists() else "", rows, kept, missing, evaluation)


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
    layers = [layer for line in lines for layer in line["layers"].values()]
    if layers and not any("length" in layer for layer in layers):
        yield "experts are not sent: of them there are tokens alone"
    elif layers and not any("pairs" in layer for layer in layers):
        yield "the model has too many experts to keep cosines of sites for each: they are kept for whole layers"
