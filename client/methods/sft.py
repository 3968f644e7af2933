"""Supervised fine-tuning of the received adapter: the client half of FedAvg and its relatives."""

from __future__ import annotations

from client.methods.base import Method


class Sft(Method):
    """FedAvg's local half (McMahan et al. 2017, https://arxiv.org/abs/1602.05629)."""

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Everything trained is sent."""
        return True
