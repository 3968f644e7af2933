"""Metrics in a second place, read back from there."""

from __future__ import annotations

import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conf.schema import Config, Logger
from server.loggers import open_logger, scalars

ROUND = {"type": "round", "round": 2, "global_loss": 1.5, "train_loss": None, "dropped": {}, "num_sites": 3}
SITE = {"type": "site", "round": 2, "site": "ward", "loss": 1.25, "bytes_up": 100, "dropped": "too late"}


def test_scalars_are_the_numbers_of_a_row_under_the_sites_name():
    assert dict(scalars(ROUND)) == {"global_loss": 1.5, "num_sites": 3.0}
    assert dict(scalars(SITE)) == {"ward/loss": 1.25, "ward/bytes_up": 100.0}


def test_tensorboard_gets_every_number_at_its_round(tmp_path):
    log_row = open_logger(Config(logger=Logger.tensorboard), tmp_path)
    for server_round in (1, 2):
        log_row(SITE | {"round": server_round, "loss": 3.0 - server_round})
        log_row(ROUND | {"round": server_round})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["global_loss", "num_sites", "ward/bytes_up", "ward/loss"]
    assert [(event.step, event.value) for event in events.Scalars("ward/loss")] == [(1, 2.0), (2, 1.0)]


def test_whole_run_logs_the_same_as_its_folder(run):
    result = run("logger=tensorboard rounds=1")
    events = EventAccumulator(str(result.folder.path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("global_loss")] == pytest.approx(
        [row["global_loss"] for row in result.rounds()]
    )


def test_no_logger_takes_rows_and_leaves_nothing(tmp_path):
    open_logger(Config(), tmp_path)(ROUND)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_logger_without_its_package_ends_the_run_with_what_to_install(run):
    result = run("logger=wandb")
    assert str(result.error) == "logger=wandb needs its package: pip install 'bouquet-fl[wandb]'"
    assert result.summary["status"] == "failed"
    assert result.grid.sent == []
