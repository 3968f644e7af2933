"""Federated averaging, and FedProx, whose server half is the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies import experts
from strategies.adapters import Arrays, weighted_mean
from strategies.base import Aggregation, ClientUpdate, Strategy, require
from strategies.expert_rounds import check_expert_tokens


class Weights(Enum):
    """How much each site counts."""

    examples = "examples"
    """By its training examples, in every array: McMahan et al."""
    uniform = "uniform"
    """As much as any other, in every array."""
    tokens = "tokens"
    """In each expert by the tokens routed to it, elsewhere by examples; an expert nobody used keeps its value."""


@dataclass(kw_only=True)
class FedAvg(Strategy):
    """The mean of the sites' adapters, array by array, weighted by their training examples.

    McMahan et al., 2017, Algorithm 1. https://arxiv.org/abs/1602.05629

    The factors A and B of LoRA are averaged apart, as everyone does; what that loses against averaging their
    products is ``low_rank.aggregation_gap``.
    """

    name: ClassVar[str] = "fedavg"

    weights: Weights = Weights.examples
    expert_step: float = 1.0
    """How far experts go from the last adapter along their mean change; 1 is their mean itself."""

    def __post_init__(self) -> None:
        require(0 < self.expert_step < math.inf, "strategy.expert_step", "> 0", self.expert_step)

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, or lacks the token counts it is to be weighted by."""
        super().check_update(adapter, update)
        if self.weights is Weights.tokens:
            check_expert_tokens(adapter, update)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """Weighted mean of the updates; the last global adapter has a say through ``expert_step`` only."""
        mean = self._mean(adapter, updates)
        if self.expert_step != 1:
            mean = {name: self._stepped(name, adapter, mean) for name in mean}
        return Aggregation(adapter=mean, state=state)

    def _mean(self, adapter: Arrays, updates: Sequence[ClientUpdate]) -> Arrays:
        if self.weights is Weights.uniform:
            return weighted_mean([update.adapter for update in updates], [1.0] * len(updates))
        mean = dict(mean_by_examples(updates))
        if self.weights is Weights.tokens:
            for layer, received in experts.by_layer(adapter).items():
                trained = [{name: update.adapter[name] for name in received} for update in updates]
                tokens_CE = np.stack([update.expert_tokens[layer] for update in updates])
                mean |= experts.weighted_mean(received, trained, tokens_CE)
        return mean

    def _stepped(self, name: str, adapter: Arrays, mean: Arrays) -> NDArray[np.floating]:
        if not experts.is_expert_array(name):
            return mean[name]
        before = adapter[name].astype(np.float64)
        return (before + self.expert_step * (mean[name] - before)).astype(np.float32)


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
