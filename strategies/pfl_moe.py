"""PFL-MoE's server half, which is FedAvg's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class PflMoe(FedAvg):
    """FedAvg over sites that use the global model mixed with their own, Guo et al., 2021.

    https://arxiv.org/abs/2012.15589. The global adapter is FedAvg's to the bit; what is personal happens at the sites.
    """

    name: ClassVar[str] = "pfl_moe"
    methods: ClassVar[frozenset[str]] = frozenset({"pfl_moe"})
