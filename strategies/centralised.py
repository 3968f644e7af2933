"""The oracle: what training on all data in one place would reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy


@dataclass(kw_only=True)
class Centralised(Strategy):
    """The upper baseline in which one site holds the data of all: its adapter is the global one."""

    name: ClassVar[str] = "centralised"
    methods: ClassVar[frozenset[str]] = frozenset({"sft"})

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:  # noqa: ARG002
        """The one site's adapter.

        Raises:
            ValueError: If there is more than one update.
        """
        if len(updates) != 1:
            sites = [update.site for update in updates]
            raise ValueError(f"strategy=centralised trains at exactly 1 site, got updates from {sites}")
        return Aggregation(adapter=updates[0].adapter, state=state)
