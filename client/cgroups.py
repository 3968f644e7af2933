"""How much memory a container, or a batch system's job, leaves: Linux control groups, of version 2 and of version 1."""

from __future__ import annotations

import math
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")

_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
"""Files of limit and use, and the key in ``memory.stat`` of what the kernel gives back when asked."""


def free_of_cgroups(own: Path = _OWN, mount: Path = _MOUNT) -> float:
    """Bytes that this process can take before a limit of its control group, or of one around it, is reached.

    ``inf`` without a limit, and where there are no control groups.

    Args:
        own: The kernel's list of the groups that the process is in.
        mount: Where the groups' folders are.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return math.inf
    found = [math.inf]
    for _, controllers, path in lines:
        if not controllers:
            found += _free_upwards(mount, path, _V2)
        elif "memory" in controllers.split(","):
            found += _free_upwards(mount / "memory", path, _V1)
    return min(found)


def _free_upwards(root: Path, path: str, names: tuple[str, str, str]) -> list[float]:
    """Of the group and all around it; inside a container the path may be the host's, and the root is the group."""
    group = root / path.lstrip("/")
    folders = [group, *group.parents] if group.is_dir() else [root]
    return [_free(folder, names) for folder in folders if folder == root or root in folder.parents]


def _free(folder: Path, names: tuple[str, str, str]) -> float:
    """Bytes up to the folder's own limit, with what is used for files' pages alone; ``inf`` without a limit."""
    limit, use, reclaimable = names
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / use).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the root of version 2 has no limit
        return math.inf
    return math.inf if most == "max" else max(0.0, int(most) - used + int(stat.get(reclaimable, 0)))
