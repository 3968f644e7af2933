"""Training without federation: the baseline every federated method must beat."""

from __future__ import annotations

from typing import ClassVar

from client.methods.base import Method
from strategies.adapters import Arrays


class LocalOnly(Method):
    """Each site trains an adapter of its own, which goes on from round to round and is never sent."""

    personal: ClassVar[bool] = True

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Nothing leaves the site."""
        return False

    def start(self, received: Arrays, private: Arrays) -> Arrays:  # noqa: ARG002
        """The site's own adapter: no array is shared, so that is what ``received`` was completed with."""
        return received

    def remember(self, received: Arrays, trained: Arrays) -> Arrays:  # noqa: ARG002
        """Nothing: what is not shared is kept anyway."""
        return {}
