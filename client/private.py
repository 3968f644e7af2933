"""A site's own durable store: what one run must remember there and nobody else may see."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from strategies.adapters import Arrays

FORMAT = "bouquet-private-2"


def under(prefix: str, private: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays whose names begin with ``prefix``, without it: each user of a store has a prefix of its own."""
    return {name.removeprefix(prefix): array for name, array in private.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class PrivateStore:
    """Named arrays of one site in one run, kept in a file that is replaced as a whole.

    A reader sees the last complete version or none, also after a power cut or a kill in the middle of
    a save. One process at a time may save for a site.
    """

    folder: Path
    """Folder of this run's private files, created on the first save; only its owner can enter it."""
    site: str
    """Stable name of the data owner."""
    base_sha256: str
    """Hash of the base model the arrays belong to; with another base they would be meaningless."""

    @property
    def path(self) -> Path:
        """File of this site, readable by its owner alone."""
        return self.folder / f"{quote(self.site, safe='')}.safetensors"

    @property
    def previous_path(self) -> Path:
        """File of what was saved before the round that ``path`` was saved in."""
        return self.path.with_name(f"{self.path.name}.previous")

    def load(self, before_round: int | None = None) -> dict[str, NDArray[Any]]:
        """Arrays of the last save; empty if there was none.

        Args:
            before_round: The round that is about to start: what an earlier attempt at it saved does not count.

        Raises:
            ValueError: If the file is damaged, or was saved by another site or for another base model.
        """
        arrays, saved_in = self._read(self.path)
        if saved_in is None or saved_in != before_round:
            return arrays
        return self._read(self.previous_path)[0]

    def save(self, arrays: Arrays, server_round: int) -> None:
        """Replace what was saved in an earlier round, or in an earlier attempt at this one; on return it is on disk."""
        contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        metadata = {
            "format": FORMAT,
            "site": self.site,
            "base_sha256": self.base_sha256,
            "server_round": str(server_round),
            "arrays_sha256": _sha256(contiguous),
        }
        self._make_folder()
        for leftover in self.folder.glob(f".{self.path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)
        if self.path.exists() and self._read(self.path)[1] != server_round:
            _link(self.path, self.previous_path)
        _replace(self.path, safetensors.numpy.save(contiguous, metadata))

    def note(self, topic: str, values: Mapping[str, Any]) -> None:
        """Write ``SITE.<topic>.json`` beside the arrays, for whoever looks after the site; nothing reads it back."""
        self._make_folder()
        _replace(self.folder / f"{quote(self.site, safe='')}.{topic}.json", json.dumps(values, indent=2).encode())

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def _read(self, path: Path) -> tuple[dict[str, NDArray[Any]], int | None]:
        """Arrays of a file and the round they were saved in; None if there is no file."""
        if not path.exists():
            return {}, None
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(self._damaged(path, str(error))) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(self._damaged(path, f"format {metadata.get('format')!r}, expected {FORMAT!r}"))
        if metadata["arrays_sha256"] != _sha256(arrays):
            raise ValueError(self._damaged(path, "its arrays differ from the hash written with them"))
        self._check_owner(metadata)
        return arrays, int(metadata["server_round"])

    def _check_owner(self, metadata: dict[str, str]) -> None:
        if metadata["site"] != self.site:
            raise ValueError(f"{self.path} belongs to site {metadata['site']!r}, not to {self.site!r}")
        if metadata["base_sha256"] != self.base_sha256:
            raise ValueError(
                f"site {self.site!r} keeps private arrays for the base model {metadata['base_sha256'][:12]}, but this "
                f"run's base model is {self.base_sha256[:12]}: use the same base, or move {self.path} away to let the "
                "site start afresh"
            )

    def _damaged(self, path: Path, reason: str) -> str:
        return (
            f"private store of site {self.site!r} is damaged: {path}: {reason}; restore it from a backup, or "
            "move it away to let the site start afresh"
        )


def _sha256(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name}\0{arrays[name].dtype.str}\0{arrays[name].shape}\0".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _link(path: Path, second: Path) -> None:
    """Make ``second`` another name of what is at ``path``, which a later ``_replace`` of ``path`` does not change."""
    temporary = path.with_name(f".{path.name}.link.tmp")
    try:
        temporary.hardlink_to(path)
    except OSError:  # a file system without hard links
        shutil.copy(path, temporary)
    temporary.replace(second)
    temporary.unlink(missing_ok=True)  # still there if both were one file already


def _replace(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``: either all of it or, after a crash, what was there before."""
    # In the same folder, since a rename is atomic only inside one file system. mkstemp gives mode 0600.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    # The rename itself is durable only once the folder's entry is on the disk.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
