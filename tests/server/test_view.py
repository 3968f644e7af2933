"""What people see of a run: plain lines in a file, a table in a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from server.view import View, duration, number, size

STARTED = {"kind": "started", "run_id": "7", "strategy": "fc_moe", "rounds": 4, "folder": "/x"}
SITE = {"kind": "row", "type": "site", "round": 1, "site": "ward [7]", "bytes_up": 2_000, "bytes_down": 10,
        "num_examples": 12, "train_loss": 2.0, "loss": 1.75}  # fmt: skip
ROUND = {"kind": "row", "type": "round", "round": 1, "global_loss": 1.5, "train_loss": 2.0, "num_sites": 3,
         "bytes_up": 6_000, "bytes_down": 30, "seconds": 20.0}  # fmt: skip


def shown(lines, *, terminal, title="my-run"):
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system=None)
    with View(console, title) as view:
        for values in lines:
            view.show(values)
    return console.file.getvalue()


def test_outside_a_terminal_each_round_is_one_line():
    start = ROUND | {"round": 0, "train_loss": None, "seconds": 1.0}
    lines = shown([STARTED, start, SITE, ROUND], terminal=False).splitlines()
    assert lines[0] == "my-run run 7: fc_moe, 4 rounds"
    assert lines[1].startswith("my-run round 0/4  global loss 1.5000  train loss -  ")
    assert lines[2] == (
        "my-run round 1/4  global loss 1.5000  train loss 2.0000  sites 3  up 6.0 kB  down 30 B  20.0 s  "
        "left 1 min 00 s"
    )
    assert len(lines) == 3


def test_time_left_is_the_mean_of_the_trained_rounds_times_those_to_come():
    """Rounds of 20 s and 40 s: 2 rounds left of 4, at 30 s each."""
    lines = shown([STARTED, ROUND, ROUND | {"round": 2, "seconds": 40.0}], terminal=False).splitlines()
    assert lines[-1].endswith("left 1 min 00 s")


def test_terminal_shows_the_sites_and_who_was_dropped():
    dropped = SITE | {"site": "clinic", "dropped": "too late"}
    text = shown([STARTED, SITE, dropped, ROUND], terminal=True)
    last = text[text.rindex("my-run  round 1/4") :]
    assert "ward [7]" in last
    assert "clinic (dropped)" in last
    assert "1.7500" in last
    assert "global loss 1.5000" in last


@pytest.mark.parametrize("terminal", [True, False])
def test_markup_in_a_sites_words_is_only_text(terminal):
    """A site chooses its name and its reasons; they must not colour or break the terminal's table."""
    event = {"kind": "event", "text": "dropped [bold]x[/bold]: [/red] was bad"}
    text = shown([STARTED, event, SITE | {"site": "[/red]"}, ROUND], terminal=terminal, title="a=[b]")
    assert "a=[b]" in text
    assert "dropped [bold]x[/bold]: [/red] was bad" in text


def test_real_log_can_be_shown(fc_moe_run):
    for terminal in (True, False):
        text = shown(fc_moe_run.lines, terminal=terminal)
        assert f"{fc_moe_run.summary['global_loss']:.4f}" in text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (7e12, "7000.0 GB")]
)
def test_bytes_for_people(num_bytes, text):
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3725, "62 min 05 s")])
def test_seconds_for_people(seconds, text):
    assert duration(seconds) == text


def test_loss_for_people():
    assert (number(None), number(1.23456)) == ("-", "1.2346")
