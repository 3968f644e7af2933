"""Folders that commands write, whole or not at all, and folders that others wrote and that may be damaged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def make_folder(folder: Path, setting: str = "") -> None:
    """Make ``folder`` and its parents, if they are not there.

    Args:
        folder: The folder.
        setting: ``KEY=`` of the setting that names it, for the message.

    Raises:
        ValueError: If that cannot be: it is a file, say.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{setting}{folder} cannot be made a folder: {error.strerror}") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, which takes its name at the end of the block; after an error it is gone.

    Raises:
        ValueError: If ``folder`` is a file, has something in it or cannot be made; before anything is done.
    """
    target = folder.resolve()
    make_folder(target)
    try:
        target.rmdir()
        scratch = tempfile.TemporaryDirectory(dir=target.parent, prefix=".unfinished-")
    except OSError as error:
        raise ValueError(f"{folder} cannot be a new folder ({error.strerror}): choose another") from error
    with scratch:
        written = Path(scratch.name) / target.name
        written.mkdir()
        yield written
        written.rename(target)


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """What a library raises over a damaged model or adapter becomes a ``ValueError`` that names ``what`` is read."""
    try:
        yield
    except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{what} cannot be read: {type(error).__name__}: {error}") from error
