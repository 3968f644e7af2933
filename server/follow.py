"""Following a run by its log, wherever it computes, and taking its end from its own summary."""

from __future__ import annotations

import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from server.flower import run_id_of
from server.record import RunFolder, apply_line, parse_line
from server.view import View

_TAIL_LINES = 25


@dataclass
class Outcome:
    """How a followed run ended."""

    run_id: str | None = None
    summary: dict[str, Any] | None = None
    """The run's own; None if it ended without one."""
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    """Last lines of the log that are not ours."""

    @property
    def completed(self) -> bool:
        """Whether the run says of itself that it completed."""
        return self.summary is not None and self.summary["status"] == "completed"

    @property
    def error(self) -> str:
        """What went wrong, in the run's words or in the log's last lines."""
        if self.summary is not None:
            return str(self.summary["error"])
        return "the run ended without a summary; the end of its log:\n" + "\n".join(self.tail)


def follow(
    process: subprocess.Popen[str], view: View, log: Path, copy: RunFolder | None, on_start: Callable[[str], None]
) -> Outcome:
    """Read a run's log to its end.

    Args:
        process: Prints the log.
        view: Draws it.
        log: File that gets every line that is not ours; what an earlier reading left goes when there is a
            line of ours, since a log is read from its beginning.
        copy: Folder to rebuild from the log; None if the run writes it itself.
        on_start: Told the run's id as soon as it is known.
    """
    outcome = Outcome()
    assert process.stdout is not None
    log.parent.mkdir(parents=True, exist_ok=True)
    num_older_bytes = log.stat().st_size if log.exists() else 0
    with log.open("a+") as file:
        for line in process.stdout:
            values = parse_line(line)
            if num_older_bytes and values is not None:
                _drop_beginning(file, num_older_bytes)
                num_older_bytes = 0
            if values is None:
                file.write(line)
                outcome.tail.append(line.rstrip())
                outcome.run_id = outcome.run_id or run_id_of(line)
                if outcome.run_id and run_id_of(line):
                    on_start(outcome.run_id)
                continue
            if copy is not None:
                apply_line(values, copy)
            if values["kind"] == "summary":
                outcome.summary = {key: value for key, value in values.items() if key != "kind"}
            view.show(values)
    process.wait()
    return outcome


def _drop_beginning(file: TextIO, num_bytes: int) -> None:
    file.seek(num_bytes)
    rest = file.read()
    file.truncate(0)
    file.write(rest)
