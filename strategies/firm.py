"""FIRM's server half, which is FedAvg's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from strategies.fedavg import FedAvg


@dataclass(kw_only=True)
class Firm(FedAvg):
    """FedAvg over sites that each align the model with several objectives, Nourzad et al., 2025.

    https://arxiv.org/abs/2511.16992, of which only the abstract is public to us: that a client sends one set of adapted
    parameters is from it, the plain mean is a reconstruction. What sets FIRM apart happens at the sites.
    """

    name: ClassVar[str] = "firm"
    methods: ClassVar[frozenset[str]] = frozenset({"firm"})
