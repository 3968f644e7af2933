"""Metrics to TensorBoard or Weights & Biases, besides the run folder."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from conf.compose import to_dict
from conf.schema import Config, Logger

LogRow = Callable[[Mapping[str, Any]], None]
"""Takes one row of metrics."""


def open_logger(config: Config, folder: Path) -> LogRow:
    """What ``logger=`` asks for.

    Raises:
        ValueError: If the logger's package is not installed.
    """
    if config.logger is Logger.tensorboard:
        return _tensorboard(folder)
    if config.logger is Logger.wandb:
        return _wandb(config, folder)
    return lambda _row: None


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of each number in a row: ``global_loss``, or ``site-00/loss`` for a site's."""
    prefix = f"{row['site']}/" if row["type"] == "site" else ""
    for name, value in row.items():
        if isinstance(value, (int, float)) and name != "round":
            yield prefix + name, float(value)


def _tensorboard(folder: Path) -> LogRow:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ValueError("logger=tensorboard needs its package: pip install 'bouquet-fl[tensorboard]'") from error
    writer = SummaryWriter(str(folder / "tensorboard"))
    atexit.register(writer.close)

    def log_row(row: Mapping[str, Any]) -> None:
        for name, value in scalars(row):
            writer.add_scalar(name, value, row["round"])
        writer.flush()

    return log_row


def _wandb(config: Config, folder: Path) -> LogRow:
    try:
        import wandb  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ValueError("logger=wandb needs its package: pip install 'bouquet-fl[wandb]'") from error
    run = wandb.init(project="bouquet", name=folder.name, dir=str(folder), config=to_dict(config))
    atexit.register(run.finish)

    def log_row(row: Mapping[str, Any]) -> None:
        # wandb drops values of a step that has passed: the round's row comes last and closes the step.
        run.log(dict(scalars(row)), step=row["round"], commit=row["type"] == "round")

    return log_row
