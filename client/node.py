"""What a site decides for itself, read from its node config. No torch: every message's process reads it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from conf.schema import Device

_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class Node:
    """Where this process stands: what the run cannot set for a site."""

    site: str
    data: str | None = None
    """The site's own data file; None in simulation."""
    private: Path | None = None
    """Folder of the site's private state; None in simulation."""
    device: Device | None = None
    worker: bool | None = None
    """Whether a warm worker answers; None: as the run says."""
    rewards: tuple[str, ...] = ()
    """``NAME:SOURCE`` of rewards that the site has a model of its own for (``method=firm``)."""
    preference: tuple[float, ...] = ()
    """The site's own weights of the objectives; empty: the run's."""


def is_real(node_config: Mapping[str, Any]) -> bool:
    """Whether this is a SuperNode with a name of its own, not a node of a simulation."""
    return bool(node_config.get("site"))


def real_node(node_config: Mapping[str, Any]) -> Node:
    """The node config of a real site.

    Raises:
        ValueError: If ``site`` or ``data`` is missing, a key is not a field of ``Node``, or ``device``, ``worker`` or
            ``preference`` has no such value.
    """
    known = [each.name for each in fields(Node)]
    unknown = [key for key in node_config if key not in known]
    if unknown:
        raise ValueError(f"node config {unknown[0]}=... is unknown: one of {', '.join(known)}")
    for key in ("site", "data"):
        if not node_config.get(key):
            example = 'flower-supernode --node-config \'site="NAME" data="FILE"\''
            raise ValueError(f"the node config needs {key}=...: {example}")
    device, worker = str(node_config.get("device", "")), str(node_config.get("worker", ""))
    if device and device not in Device.__members__:
        raise ValueError(f"node config device must be one of {', '.join(Device.__members__)}, got {device!r}")
    if worker and worker not in _SWITCH:
        raise ValueError(f"node config worker must be on or off, got {worker!r}")
    return Node(
        site=str(node_config["site"]),
        data=str(Path(str(node_config["data"])).expanduser()),
        private=Path(str(node_config.get("private", "") or default_private_root())).expanduser(),
        device=Device[device] if device else None,
        worker=_SWITCH.get(worker),
        rewards=tuple(_words(node_config, "rewards")),
        preference=_weights(node_config),
    )


def _words(node_config: Mapping[str, Any], key: str) -> list[str]:
    return [word.strip() for word in str(node_config.get(key, "")).split(",") if word.strip()]


def _weights(node_config: Mapping[str, Any]) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in _words(node_config, "preference"))
    except ValueError:
        given = node_config["preference"]
        raise ValueError(f"node config preference must be numbers, as in '0.7,0.3', got {given!r}") from None


def default_private_root() -> Path:
    """Where a real site keeps its private state unless its node config says otherwise."""
    return Path(os.environ.get("BOUQUET_PRIVATE", "~/.local/share/bouquet/private")).expanduser()


def may_have_gpu() -> bool:
    """Whether it is worth the seconds that torch takes to know for sure; containers often lack ``nvidia-smi``."""
    return shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*"))
