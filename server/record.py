"""The run folder, and the same facts as tagged lines of the run's log.

The ServerApp writes both. Under ``federation=remote`` the folder lies at the SuperLink; whoever follows
the log rebuilds it from the lines: ``metrics.jsonl``, ``summary.json``, ``config.yaml`` and, up to
``LOGGED_DIAGNOSTICS_BYTES`` a round and ``LOGGED_ADAPTER_BYTES``, ``diagnostics/rounds.jsonl`` and ``adapter/``; and
``evaluation.json``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import Config
from strategies.adapters import Arrays

TAG = "BOUQUET "
"""Starts every line of the log that is ours and machine-readable."""
LOGGED_ADAPTER_BYTES = 64 << 20
"""Larger adapters are not sent through the log: they are copied from the server's run folder."""
LOGGED_DIAGNOSTICS_BYTES = 2 << 20
"""Longer diagnostics of a round stay at the server: a strategy's own may be."""
_CHUNK_BYTES = 512 << 10
_LONGEST_TEXT = 2000
"""Characters of what another machine says."""


class RunFolder:
    """``outputs/<name>/`` of one run; every file is written whole or appended by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder.

        Raises:
            ValueError: If it already holds a run: nothing is ever overwritten.
        """
        if (self.path / "config.yaml").exists():
            raise ValueError(f"output={self.path} already holds a run: choose another folder, or remove it")
        self.path.mkdir(parents=True, exist_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Replace file ``name`` (a relative path) by ``text``."""
        self.write_bytes(name, text.encode())

    def write_bytes(self, name: str, content: bytes) -> None:
        """Replace file ``name`` (a relative path inside the folder) by ``content``.

        Raises:
            ValueError: If the name points outside the folder.
        """
        target = self.inside(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        temporary.write_bytes(content)
        temporary.replace(target)

    def inside(self, name: str) -> Path:
        """Path of file ``name``.

        Raises:
            ValueError: If the name points outside the folder.
        """
        target = self.path / name
        if not target.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{name} lies outside the run folder")
        return target

    def append_row(self, row: Mapping[str, Any]) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._append("metrics.jsonl", row)

    def append_diagnostics(self, values: Mapping[str, Any]) -> int:
        """Add a line to ``diagnostics/rounds.jsonl``; how long it is."""
        return self._append("diagnostics/rounds.jsonl", values)

    def rows(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``: see ``lines``."""
        return self.lines("metrics.jsonl")[0]

    def diagnostics(self) -> list[dict[str, Any]]:
        """All lines of ``diagnostics/rounds.jsonl``: one a round, none if the run kept none; see ``lines``."""
        return self.lines("diagnostics/rounds.jsonl")[0]

    def lines(self, name: str) -> tuple[list[dict[str, Any]], bool]:
        """All lines of file ``name``, without a last one that was cut off while it was written; whether there is one.

        Raises:
            ValueError: If another line is not JSON.
        """
        path = self.path / name
        text = path.read_text() if path.exists() else ""
        lines, values = text.splitlines(), []
        for number, line in enumerate(lines, start=1):
            try:
                values.append(dict(_read_json(line)))
            except (ValueError, TypeError) as error:
                if number == len(lines) and not text.endswith("\n"):
                    return values, True
                raise ValueError(f"{path} line {number} is damaged: {error}") from error
        return values, False

    def evaluation(self) -> dict[str, Any] | None:
        """``evaluation.json``; None if the run has none."""
        path = self.path / "evaluation.json"
        return _read_json(path.read_text()) if path.exists() else None

    def _append(self, name: str, values: Mapping[str, Any]) -> int:
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            return file.write(to_json(values) + "\n")

    def summary(self) -> dict[str, Any] | None:
        """``summary.json``; None if the run has not ended."""
        path = self.path / "summary.json"
        return _read_json(path.read_text()) if path.exists() else None


def evaluation_json(values: Mapping[str, Any]) -> str:
    """``evaluation.json``, a line for each test."""
    rows = ",\n  ".join(to_json(row) for row in values["scores"])
    rest = {key: value for key, value in values.items() if key != "scores"}
    return f'{json.dumps(_jsonable(rest), indent=1)[:-2]},\n "scores": [\n  {rows}\n ]\n}}\n'


class RunRecord:
    """Writes the run folder and the tagged log lines together."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.log_row: Callable[[Mapping[str, Any]], None] = _log_nowhere
        """Takes each row of metrics too: see ``server.loggers``."""

    def started(self, config_yaml: str, facts: Mapping[str, Any]) -> None:
        """The run begins: resolved settings, and what the live view needs to know."""
        self.folder.create()
        self.folder.write_text("config.yaml", config_yaml)
        emit("config", {"yaml": config_yaml})
        emit("started", dict(facts) | {"folder": str(self.folder.path)})

    def row(self, row: Mapping[str, Any]) -> None:
        """A row of metrics: of a round, or of a site in a round."""
        self.folder.append_row(row)
        self.log_row(row)
        emit("row", row)

    def event(self, text: str) -> None:
        """One line for people: a site dropped, a site joined."""
        emit("event", {"text": text})

    def diagnostics(self, values: Mapping[str, Any]) -> None:
        """What a round did to every expert: see ``strategies.diagnostics``, and what the strategy itself found."""
        if self.folder.append_diagnostics(values) <= LOGGED_DIAGNOSTICS_BYTES:
            emit("diagnostics", values)

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """The evaluation matrix: see ``server.evaluation``."""
        self.folder.write_text("evaluation.json", evaluation_json(values))
        emit("evaluation", {"evaluation": values})

    def ended(self, summary: Mapping[str, Any]) -> None:
        """The run ends, completed or failed."""
        self._emit_adapter()
        self.folder.write_text("summary.json", json.dumps(_jsonable(summary), indent=2) + "\n")
        emit("summary", summary)

    def _emit_adapter(self) -> None:
        folder = self.folder.path / "adapter"
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []
        if sum(path.stat().st_size for path in files) > LOGGED_ADAPTER_BYTES:
            self.event(f"the adapter is too large for the log: copy it from {folder} at the server")
            return
        for path in files:
            content, name = path.read_bytes(), str(path.relative_to(self.folder.path))
            for start in range(0, max(len(content), 1), _CHUNK_BYTES):
                chunk = content[start : start + _CHUNK_BYTES]
                emit("file", {"name": name, "start": start, "base64": base64.b64encode(chunk).decode()})


def _log_nowhere(row: Mapping[str, Any]) -> None:
    """Besides the run folder and the tagged lines."""


def default_name(config: Config) -> str:
    """Name of a run that was given none."""
    return f"{config.strategy.name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def emit(kind: str, values: Mapping[str, Any]) -> None:
    """Write one tagged line to standard output, in one piece: other threads log there too."""
    sys.stdout.write(f"{TAG}{to_json({'kind': kind, **values})}\n")
    sys.stdout.flush()


def parse_line(line: str) -> dict[str, Any] | None:
    """The values of a tagged line; None for any other line."""
    _, tag, text = line.partition(TAG)
    if not tag:
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        return None
    return values if isinstance(values, dict) and "kind" in values else None


def told(text: str) -> str:
    """Another machine's words, as they may stand in the log: one line, of bounded length, that is no tagged one."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[:_LONGEST_TEXT])
    return line.replace(TAG.strip(), TAG.strip().lower()) + ("..." if len(text) > _LONGEST_TEXT else "")


def to_json(values: Any) -> str:
    """Strict JSON in one line: NaN and infinity become null."""
    return json.dumps(_jsonable(values), allow_nan=False)


def _read_json(text: str) -> Any:
    """What ``to_json`` wrote: NaN and infinity are damage."""
    return json.loads(text, parse_constant=_no_number)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def adapter_sha256(adapter: Arrays) -> str:
    """SHA-256 (hex) over names, shapes and float32 values: equal for equal adapters, whatever wrote them."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        array = np.ascontiguousarray(adapter[name], dtype="<f4")
        digest.update(f"{name}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def apply_line(values: Mapping[str, Any], folder: RunFolder) -> None:
    """Write what one parsed tagged line says into ``folder``.

    Raises:
        ValueError: If a line names a file outside the folder, or a piece of a file is missing.
    """
    kind = values["kind"]
    if kind == "config":
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.write_text("config.yaml", str(values["yaml"]))
        folder.write_text("metrics.jsonl", "")  # the log is read from its beginning
        (folder.path / "diagnostics/rounds.jsonl").unlink(missing_ok=True)
    elif kind == "row":
        folder.append_row({key: value for key, value in values.items() if key != "kind"})
    elif kind == "diagnostics":
        folder.append_diagnostics({key: value for key, value in values.items() if key != "kind"})
    elif kind == "evaluation":
        folder.write_text("evaluation.json", evaluation_json(values["evaluation"]))
    elif kind == "summary":
        summary = {key: value for key, value in values.items() if key != "kind"}
        folder.write_text("summary.json", json.dumps(summary, indent=2) + "\n")
    elif kind == "file":
        _append_chunk(folder, str(values["name"]), int(values["start"]), base64.b64decode(values["base64"]))


def _append_chunk(folder: RunFolder, name: str, start: int, chunk: bytes) -> None:
    if start == 0:
        folder.write_bytes(name, chunk)
        return
    path = folder.inside(name)
    length = path.stat().st_size if path.exists() else 0
    if length != start:
        raise ValueError(f"{name}: a piece of the file is missing from the log at byte {length}")
    with path.open("ab") as file:
        file.write(chunk)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.ndarray):
        return _jsonable(value.tolist())
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
