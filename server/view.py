"""What a run looks like while it goes on: one live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text


class View:
    """Draws the tagged lines of one run as they come."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.num_rounds = 0
        self.rounds: list[Mapping[str, Any]] = []
        self.sites: dict[str, dict[str, Any]] = {}
        self._started = time.monotonic()
        self._live = (
            Live(get_renderable=self._draw, console=console, refresh_per_second=4) if console.is_terminal else None
        )

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, values: Mapping[str, Any]) -> None:
        """Take in one parsed tagged line."""
        kind = values["kind"]
        if kind == "started":
            self.num_rounds = int(values["rounds"])
            self.tell(f"run {values['run_id']}: {values['strategy']}, {self.num_rounds} rounds")
        elif kind == "event":
            self.tell(str(values["text"]))
        elif kind == "row" and values["type"] == "site":
            self.sites.setdefault(values["site"], {}).update(values)
        elif kind == "row":
            self.rounds.append(values)
            if not self._live:
                self.tell(self._round_line(values))

    def tell(self, text: str) -> None:
        """One line above the table."""
        self.console.print(f"[dim]{escape(self.title)}[/] {escape(text)}", highlight=False, soft_wrap=True)

    def _round_line(self, row: Mapping[str, Any]) -> str:
        return (
            f"round {row['round']}/{self.num_rounds}  global loss {number(row['global_loss'])}  "
            f"train loss {number(row['train_loss'])}  sites {row['num_sites']}  up {size(row['bytes_up'])}  "
            f"down {size(row['bytes_down'])}  {row['seconds']:.1f} s  left {self._time_left()}"
        )

    def _time_left(self) -> str:
        trained = [row for row in self.rounds if row["round"] > 0]
        if not trained:
            return "?"
        mean_seconds = sum(row["seconds"] for row in trained) / len(trained)
        return duration(mean_seconds * (self.num_rounds - trained[-1]["round"]))

    def _draw(self) -> Group:
        done = self.rounds[-1]["round"] if self.rounds else 0
        progress = f"round {done}/{self.num_rounds}, {self._time_left()} left" if self.num_rounds else "starting"
        gone = duration(time.monotonic() - self._started)
        head = Text.assemble((self.title, "bold"), f"  {progress}, {gone} gone")
        losses = [number(row["global_loss"]) for row in self.rounds if row["global_loss"] is not None]
        table = Table(box=None, pad_edge=False)
        for column in ("site", "examples", "train loss", "held-out loss", "up", "down"):
            table.add_column(column, justify="left" if column == "site" else "right")
        for name, row in sorted(self.sites.items()):
            table.add_row(
                escape(name) + (" (dropped)" if row.get("dropped") and row["round"] == done else ""),
                str(row.get("num_examples", "")), number(row.get("train_loss")), number(row.get("loss")),
                size(row["bytes_up"]), size(row["bytes_down"]),
            )  # fmt: skip
        return Group(head, Text(f"global loss {' > '.join(losses[-8:]) or '-'}"), table)


def number(value: float | None) -> str:
    """A loss for people."""
    return "-" if value is None else f"{value:.4f}"


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """A length of time for people."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
