"""Which worker serves a message, and where its socket and log are.

A worker is shared only by messages that agree in all of: the site with its data file and private folder, the code,
the base model and device, and the environment. So two sites on one machine never share a process, and a worker
never answers with other code than the message's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import quote

from client.node import Node, may_have_gpu
from conf.model import ModelConfig
from conf.schema import Device

CODE_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("strategies", "conf", "client")
_ENVIRONMENT = (
    "BOUQUET_", "CUDA_", "HF_", "HOME", "LD_", "MKL_", "NCCL_", "NVIDIA_", "OMP_", "PYTHON", "PYTORCH_", "TORCH",
    "TRANSFORMERS_",
)  # fmt: skip
"""Beginnings of the names of environment variables that change where or how a model is computed."""
_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket on Linux (sockaddr_un)."""


@dataclass(frozen=True)
class Place:
    """Where one worker is found."""

    key: str
    """SHA-256 (hex) of everything its messages have in common."""
    log: Path
    """Its log: the site's own, readable by the owner alone."""

    @property
    def socket(self) -> Path:
        """Its Unix socket, in a folder that only the owner can enter."""
        return runtime_folder() / f"{self.key[:20]}.sock"


def place_of(node: Node, base: str) -> Place:
    """The worker for one real site and ``base_key``."""
    assert node.private is not None
    identity = {
        "node": [node.site, str(node.data), str(node.private)],
        "base": base,
        "code": code_sha256(),
        "process": [str(CODE_ROOT), sys.executable, str(Path.cwd())],
        "environment": sorted(item for item in os.environ.items() if item[0].startswith(_ENVIRONMENT)),
    }
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Place(key=key, log=node.private / f"{quote(node.site, safe='')}.worker.log")


def base_key(model: ModelConfig, device: Device) -> str:
    """SHA-256 (hex) of the settings that decide what a worker keeps loaded: the frozen base, and where."""
    if device is Device.auto:
        device = Device.cuda if may_have_gpu() else Device.cpu
    frozen = dataclasses.replace(model, experts=ModelConfig.experts, router=ModelConfig.router)
    return hashlib.sha256(f"{frozen!r} {device.name}".encode()).hexdigest()


@cache
def code_sha256() -> str:
    """SHA-256 (hex) over the names and bytes of all files that this process runs a site from, and their folder."""
    digest = hashlib.sha256(str(CODE_ROOT).encode())
    for package in _PACKAGES:
        for path in sorted((CODE_ROOT / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"\0{path.relative_to(CODE_ROOT)}\0{path.stat().st_size}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def open_log(path: Path) -> int:
    """Descriptor that appends to ``path``, which only its owner may read."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def runtime_folder() -> Path:
    """Folder of the sockets, created on first use: ``$XDG_RUNTIME_DIR/bouquet``, else one in the temporary folder.

    Raises:
        ValueError: If what is there belongs to somebody else or lets others in, or the path is too long for a socket.
    """
    root = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(root) / "bouquet" if root else Path(tempfile.gettempdir()) / f"bouquet-{os.getuid()}"
    longest = len(os.fsencode(folder / f"{'0' * 20}.sock"))
    if longest > _SOCKET_PATH_BYTES:
        raise ValueError(
            f"a socket in {folder} would have a path of {longest} bytes, the limit is {_SOCKET_PATH_BYTES}: set "
            'XDG_RUNTIME_DIR to a shorter folder, or worker="off" in the node config'
        )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ValueError(
            f"{folder} is {stat.filemode(found.st_mode)} of user {found.st_uid}, but must be a folder that only user "
            f'{os.getuid()} can enter: remove it, set XDG_RUNTIME_DIR to a private folder, or set worker="off" in the '
            "node config"
        )
    return folder
