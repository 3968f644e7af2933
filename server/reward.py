"""``bouquet reward``: reward models for ``method=firm`` out of preference pairs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from client.folders import new_folder
from conf.compose import load_config
from conf.schema import Config

if TYPE_CHECKING:
    from client.data import SiteData
    from client.text import Example

reward_cli = typer.Typer(no_args_is_help=True, help="Reward models for method=firm.")


@reward_cli.callback()
def _commands() -> None:
    """Reward models for method=firm."""


@reward_cli.command()
def train(
    folder: Annotated[Path, typer.Argument(help="New folder for the head: weights and what they were trained for.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings: data.path, columns, model; key=value.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="Value of data.objective_column to train on; default: every pair.")
    ] = None,
    penalty: Annotated[float, typer.Option(min=1e-9, help="Weight of the squared weights in the loss.")] = 0.1,
) -> None:
    """Fit a linear reward head on the base model's hidden states to preference pairs.

    Reads data.path with data.prompt_column, data.response_column (the preferred response), data.rejected_column and
    data.objective_column; a data.split_column says which pairs are held out. Accuracy is shown for the held-out pairs
    of every other objective of the file too.
    """
    # torch takes seconds to import
    from client.alignment.reward_training import train_head  # noqa: PLC0415
    from client.assemble import model_for  # noqa: PLC0415

    config = load_config(["partition=iid", *(overrides or [])])  # any one: nothing is divided here
    data = config.data
    if data.path is None or data.rejected_column is None:
        raise ValueError("a reward head needs pairs: set data.path and data.rejected_column")
    if objective is not None and data.objective_column is None:
        raise ValueError(f"--objective {objective} is a value of a column: set data.objective_column")
    with new_folder(folder) as written:
        pairs = pairs_of(config, objective)
        others = held_out_of_others(config, objective) if objective else {}
        head = train_head(
            model_for(config), pairs.train, {"held_out": pairs.held_out, **others},
            objective=objective or "", data=data, penalty=penalty,
        )  # fmt: skip
        head.save(written)
    shares = ", ".join(f"{name} {share:.3f}" for name, share in head.facts.accuracy.items())
    console = Console(highlight=False)
    console.print(f"{head.facts.num_pairs} pairs; accuracy: {shares}", soft_wrap=True)
    console.print(escape(str(folder)), soft_wrap=True)


def pairs_of(config: Config, objective: str | None) -> SiteData:
    """The pairs of the file that were judged by ``objective``; None: all.

    Raises:
        ValueError: If the file cannot be read, or has too few.
    """
    from client.data import own_site  # noqa: PLC0415 - takes seconds to import

    data = config.data
    if objective is not None:
        data = replace(data, filter={**data.filter, str(data.objective_column): objective})
    return own_site(replace(config, data=data), "pairs", str(data.path))


def held_out_of_others(config: Config, objective: str) -> dict[str, list[Example]]:
    """``held_out/NAME`` -> held-out pairs of the file that were judged by another objective."""
    found: dict[str, list[Example]] = {}
    for pair in pairs_of(config, None).held_out:
        if pair.objective not in {"", objective}:
            found.setdefault(f"held_out/{pair.objective}", []).append(pair)
    return dict(sorted(found.items()))
