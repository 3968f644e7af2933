"""FLEx's server half, which is FedAvg's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class Flex(FedAvg):
    """FedAvg over what sites share beside experts of their own, FLEx, 2025. https://arxiv.org/abs/2506.00965.

    With ``model.experts=frozen`` that is LoRA on attention. Any other rule that averages may take this place.
    """

    name: ClassVar[str] = "flex"
    methods: ClassVar[frozenset[str]] = frozenset({"flex"})
