"""What is known of one round while it goes on, and who is asked in it."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.check import needed_sites, num_asked
from conf.schema import Config
from conf.seeds import generator_for


@dataclass
class RoundRecord:
    """One round's rows of metrics, filled as replies come in."""

    server_round: int
    started: float = field(default_factory=time.monotonic)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Site -> its row."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Site -> why its reply was not used."""
    global_loss: float | None = None
    """Held-out loss of the global model, nats per response token."""
    aggregation_gap: float | None = None
    drift: float | None = None
    """Mean squared distance of the sites' adapters to their mean; measured where sites have several objectives."""
    bytes_by_kind: dict[str, Counter[str]] = field(default_factory=lambda: {"up": Counter(), "down": Counter()})
    """Bytes of adapters, and what went beside them, sent and used: see ``strategies.diagnostics.bytes_by_kind``."""

    def site(self, name: str) -> dict[str, Any]:
        """The site's row, begun when first asked for."""
        return self.sites.setdefault(
            name, {"type": "site", "round": self.server_round, "site": name, "bytes_up": 0, "bytes_down": 0}
        )

    def total(self, key: str) -> int:
        """Sum over the sites' rows."""
        return int(sum(row[key] for row in self.sites.values()))

    def rows(self) -> list[dict[str, Any]]:
        """The sites' rows by name, then the round's."""
        trained = [row for row in self.sites.values() if "train_loss" in row]
        weights = [row["num_examples"] for row in trained]
        losses = [row["train_loss"] for row in trained]
        of_round = {
            "type": "round",
            "round": self.server_round,
            "global_loss": self.global_loss,
            "train_loss": float(np.average(losses, weights=weights)) if trained else None,
            "aggregation_gap": self.aggregation_gap,
            "drift": self.drift,
            "num_sites": len(trained),
            "dropped": self.dropped,
            "bytes_up": self.total("bytes_up"),
            "bytes_down": self.total("bytes_down"),
            "bytes_by_kind": self.bytes_by_kind,
            "seconds": time.monotonic() - self.started,
        }
        return [row for _, row in sorted(self.sites.items())] + [of_round]


def sample_sites(present: list[str], config: Config, server_round: int) -> list[str]:
    """Sites to ask in a round: ``federation.fraction`` of those present, by name, with the run's generator.

    Raises:
        RuntimeError: If that is fewer than ``federation.min_sites``.
    """
    count = num_asked(config, len(present))
    if count < needed_sites(config):
        fraction = config.federation.fraction
        raise RuntimeError(
            f"round {server_round}: federation.fraction={fraction:g} of {len(present)} connected sites asks {count}, "
            f"below federation.min_sites={needed_sites(config)}"
        )
    generator = generator_for(config.seed, "sample", server_round)
    return sorted(generator.choice(present, size=count, replace=False).tolist())
