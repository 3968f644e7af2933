"""What comes with a message, besides the message: where it arrived, and under which settings."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Call:
    """One message's circumstances."""

    node_id: int
    """Flower's, for a site without a name."""
    node_config: Mapping[str, str | int | float | bool]
    overrides: str
    """The run's settings, as the server composed them."""
    process_started: float | None = None
    """When the process that Flower started for the message began, Unix time in seconds; None if unknown."""

    @property
    def site(self) -> str:
        """The site's name as far as the node tells it."""
        return str(self.node_config.get("site", f"node {self.node_id}"))

    def to_json(self) -> bytes:
        """The call as bytes."""
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(content: bytes) -> Call:
        """The call that ``to_json`` wrote."""
        return Call(**json.loads(content))


def process_started() -> float | None:
    """When this process began, Unix time in seconds, to a clock tick (10 ms); None where the kernel does not tell."""
    if sys.platform != "linux":
        return None
    # Field 22, counted from behind the name, which may hold spaces and brackets.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age
