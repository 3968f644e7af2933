"""The commands that write models, and data to try them with, beside a run or after one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from client.folders import make_folder
from conf.compose import load_config
from server.record import RunFolder

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings, key=value; see conf/schema.py and its imports.")]
Run = Annotated[Path, typer.Argument(help="Folder of a completed run.")]
SiteName = Annotated[str, typer.Option("--site", help="Name of the site.")]
PrivateFolder = Annotated[
    Path | None, typer.Option("--private", help="Folder of the private states of a real site here; as for site up.")
]


def export_base(
    folder: Annotated[Path, typer.Argument(help="New folder for the model, in transformers' format.")],
    overrides: Overrides = None,
) -> None:
    """Write a run's base model, upcycled if the settings say so."""
    from client.bases import export_base as export  # noqa: PLC0415 - torch takes seconds to import

    identity = export(load_config(overrides or []).model, folder)
    typer.echo(f"{identity.name} sha256 {identity.sha256}")
    typer.echo(folder)


def example_data(
    folder: Annotated[Path, typer.Argument(help="Folder for one file a site.")],
    num_examples: Annotated[int, typer.Option(min=8, help="Rows of all sites together.")] = 1200,
) -> None:
    """Write the embedded default data as files, to try real sites with."""
    from client.embedded import DOMAINS, embedded_rows  # noqa: PLC0415 - only needed here

    make_folder(folder)
    rows = embedded_rows(num_examples, seed=0)
    texts = {
        folder / f"{domain}.jsonl": "".join(json.dumps(row) + "\n" for row in rows if row["domain"] == domain)
        for domain in DOMAINS
    }
    for path, text in texts.items():
        if path.exists() and path.read_bytes() != text.encode():
            raise ValueError(f"{path} is there already, with other examples: choose another folder, or remove it")
    for path, text in texts.items():
        RunFolder(folder).write_text(path.name, text)
        typer.echo(path)


def merge(
    run_folder: Run,
    folder: Annotated[Path | None, typer.Argument(help="New folder; default: merged/ in the run folder.")] = None,
) -> None:
    """Write the base model with the run's adapter merged into its weights."""
    from client.merge import merge_adapter  # noqa: PLC0415 - torch takes seconds to import

    target = folder or run_folder / "merged"
    merge_adapter(run_folder / "adapter", target)
    typer.echo(target)


def export(
    run_folder: Run,
    site: SiteName,
    folder: Annotated[Path | None, typer.Argument(help="New folder; default: personal/SITE in the run folder.")] = None,
    private: PrivateFolder = None,
) -> None:
    """Write a site's personal model: adapter, graft if there is one, and what loads them into transformers."""
    from server.personal import export_personal  # noqa: PLC0415 - torch takes seconds to import

    target = folder or run_folder / "personal" / site
    export_personal(run_folder, site, target, private)
    typer.echo(target)


def join(
    run_folder: Run,
    site: SiteName,
    data: Annotated[Path, typer.Option("--data", help="The site's own data file.")],
    overrides: Overrides = None,
    private: PrivateFolder = None,
) -> None:
    """Give a site that took no part in a run a personal model beside the run's adapter, which stays as it is."""
    from server.personal import join_run  # noqa: PLC0415 - torch takes seconds to import

    for server_round, loss in join_run(run_folder, site, data, list(overrides or []), private):
        typer.echo(f"round {server_round}: held-out loss {loss:.4f}" if server_round else f"before: {loss:.4f}")


def pretrain(
    folder: Annotated[Path, typer.Argument(help="New folder for the model.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 4000,
    seed: int = 0,
    num_threads: Annotated[int, typer.Option(min=1)] = os.cpu_count() or 1,
) -> None:
    """Rebuild tiny_moe, the packaged base model, from generated text."""
    from client.pretrain import pretrain_tiny_moe  # noqa: PLC0415 - torch takes seconds to import

    pretrain_tiny_moe(folder, steps=steps, seed=seed, num_threads=num_threads)
    typer.echo(folder)
