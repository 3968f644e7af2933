"""Federated averaging, and FedProx, whose server half is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from strategies.adapters import Arrays, weighted_mean
from strategies.base import Aggregation, ClientUpdate, Strategy


@dataclass(kw_only=True)
class FedAvg(Strategy):
    """The mean of the sites' adapters, array by array, weighted by their training examples.

    McMahan et al., 2017, Algorithm 1. https://arxiv.org/abs/1602.05629

    The factors A and B of LoRA are averaged apart, as everyone does; what that loses against averaging their
    products is ``low_rank.aggregation_gap``.
    """

    name: ClassVar[str] = "fedavg"

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:  # noqa: ARG002
        """Weighted mean of the updates; the last global adapter has no say."""
        return Aggregation(adapter=mean_by_examples(updates), state=state)


@dataclass(kw_only=True)
class FedProx(FedAvg):
    """FedAvg over sites that were held near the global adapter by ``train.proximal_mu``.

    Li et al., 2020, Algorithm 2. https://arxiv.org/abs/1812.06127

    The paper averages the sites uniformly, having sampled them by their examples; here all are asked and
    weighted by examples, which has the same expectation.
    """

    name: ClassVar[str] = "fedprox"


def mean_by_examples(updates: Sequence[ClientUpdate]) -> Arrays:
    """Mean of the sites' adapters, weighted by their training examples."""
    return weighted_mean([update.adapter for update in updates], [update.num_examples for update in updates])
