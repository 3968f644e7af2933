"""A run folder's files with all that pages and tables use of them: what is damaged is an error that names the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import yaml

from server.record import RunFolder

METRICS, DIAGNOSTICS = "metrics.jsonl", "diagnostics/rounds.jsonl"

_OF_ENDED = {"global_loss", "site_loss", "bytes_up", "bytes_down", "num_sites", "wall_seconds"}
_OF_LINE = {"round", "sites", "layers", "kinds"}
_OF_EVALUATION = {"scores", "summary", "routing", "cost"}

Rows = Sequence[Mapping[str, Any]]


def rows_of(folder: Path) -> tuple[Rows, bool]:
    """Lines of ``metrics.jsonl``, and whether a last one that was cut off is left out.

    Raises:
        ValueError: If a line is damaged.
    """
    return _lines_of(folder, METRICS, _wrong_row)


def diagnostics_of(folder: Path) -> tuple[Rows, bool]:
    """Lines of ``diagnostics/rounds.jsonl``, likewise.

    Raises:
        ValueError: If a line is damaged.
    """
    return _lines_of(folder, DIAGNOSTICS, _wrong_diagnostics)


def cut_off(name: str) -> str:
    """What is told of file ``name`` if its last line is left out."""
    return f"the last line of {name} was cut off: left out"


def summary_of(folder: Path) -> Mapping[str, Any] | None:
    """``summary.json``; None if the run has not ended.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / "summary.json"
    with _named(path):
        summary = RunFolder(folder).summary()
    if summary is not None:
        _check_keys(path, summary, {"status"})
        _check_keys(path, summary, _OF_ENDED if summary["status"] == "completed" else {"error"})
    return summary


def losses_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """Held-out loss of each site whose loss was a number at the run's end."""
    return {site: loss for site, loss in (summary.get("site_loss") or {}).items() if loss is not None}


def evaluation_of(folder: Path) -> Mapping[str, Any] | None:
    """``evaluation.json``; None if the run has none.

    Raises:
        ValueError: If it is damaged.
    """
    path = folder / "evaluation.json"
    with _named(path):
        evaluation = RunFolder(folder).evaluation()
    if evaluation is not None:
        _check_keys(path, evaluation, _OF_EVALUATION)
    return evaluation


def config_of(folder: Path) -> str:
    """``config.yaml``; empty if there is none.

    Raises:
        ValueError: If it is no YAML of settings.
    """
    path = folder / "config.yaml"
    with _named(path):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not isinstance(yaml.safe_load(text), Mapping | None):
            raise ValueError(f"{path} is damaged: it holds no settings")  # noqa: TRY004 - of a file, not of a caller
    return text


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a file's reader name the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: no UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path} is damaged: {error}") from error


def _lines_of(folder: Path, name: str, wrong: Callable[[Mapping[str, Any]], str]) -> tuple[Rows, bool]:
    """Lines of a file; ``wrong`` says what one lacks."""
    path = folder / name
    with _named(path):
        lines, is_cut = RunFolder(folder).lines(name)
    for number, line in enumerate(lines, start=1):
        if reason := wrong(line):
            raise ValueError(f"{path} line {number} is damaged, or of another version of Bouquet: {reason}")
    return lines, is_cut


def _check_keys(path: Path, values: Any, wanted: set[str]) -> None:
    absent = sorted(wanted - values.keys()) if isinstance(values, dict) else ["names"]
    if absent:
        raise ValueError(f"{path} is damaged, or of another version of Bouquet: no {', '.join(absent)}")


def _wrong_row(row: Mapping[str, Any]) -> str:
    """What a row of metrics lacks; nothing if it has all."""
    if not _is_round(row.get("round")):
        return "no round"
    if row.get("type") == "site" and not isinstance(row.get("site"), str):
        return "no site"
    counts = ("bytes_up", "bytes_down") if row.get("type") == "round" else ()
    wrong = [key for key in counts if not _is_number(row.get(key))]
    wrong += [key for key in ("loss", "global_loss", "aggregation_gap") if not _is_number(row.get(key, 0) or 0)]
    return f"{', '.join(wrong)}: no number" if wrong else ""


def _wrong_diagnostics(line: Mapping[str, Any]) -> str:
    if absent := sorted(_OF_LINE - line.keys()):
        return f"no {', '.join(absent)}"
    if not _is_round(line["round"]):
        return "no round"
    blocks = [line["layers"], line["kinds"]]
    if not all(isinstance(each, Mapping) and all(isinstance(one, Mapping) for one in each.values()) for each in blocks):
        return "layers or kinds hold no tables"
    return "" if isinstance(line["sites"], list) else "sites are no list"


def _is_round(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
