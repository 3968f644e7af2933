"""Training without federation: the baseline every federated method must beat."""

from __future__ import annotations

from typing import ClassVar

from client.methods.base import Method


class LocalOnly(Method):
    """Each site trains an adapter of its own, which goes on from round to round and is never sent."""

    personal: ClassVar[bool] = True

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Nothing leaves the site."""
        return False
