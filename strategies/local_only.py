"""No federation: what each site reaches alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy


@dataclass(kw_only=True)
class LocalOnly(Strategy):
    """The baseline in which every site trains by itself: updates hold counts and metrics, the global adapter stays.

    Each site's adapter lives in its private store and is evaluated there.
    """

    name: ClassVar[str] = "local_only"
    methods: ClassVar[frozenset[str]] = frozenset({"local_only"})

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:  # noqa: ARG002
        """Raise ``ValueError`` if the site sent any array, or its counts are not valid."""
        if update.adapter:
            raise ValueError(
                f"local_only sites send no arrays, got {len(update.adapter)}: {sorted(update.adapter)[:4]}"
            )
        super().check_update({}, update)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:  # noqa: ARG002
        """The global adapter as it was."""
        return Aggregation(adapter=adapter, state=state)
