"""The contract between a round and the rule that aggregates it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from strategies.adapters import Arrays, check_finite, check_same_layout, check_size

MOST_TOKENS = 1e15
"""Of a round of one site; no training is longer."""
MOST_EXAMPLES = 1e12
"""Of one site; their sum over sites still fits into 64 bits."""


def require(condition: bool, key: str, limit: str, value: object) -> None:
    """Raise ``ValueError`` naming the setting, its limit and the value it was given."""
    if not condition:
        raise ValueError(f"{key} must be {limit}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """What one site sends after local training."""

    site: str
    """Stable name of the data owner, never Flower's node id."""
    adapter: Arrays
    """The locally trained adapter (not a difference): name -> float32; expert arrays have the expert on axis 0."""
    num_examples: float
    """Training examples the site holds, >= 1: the weight of plain averaging. Behind a screen it may be a share."""
    expert_tokens: Arrays = field(default_factory=dict)
    """MoE layer -> (num_experts,) float64: tokens routed to each expert in this round's local training."""
    extras: Arrays = field(default_factory=dict)
    """What the method's client half sends beside the adapter, float32, such as the change of a control variate."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Scalars for the run's records, such as ``train_loss`` (nats per response token)."""


@dataclass(frozen=True, kw_only=True)
class Aggregation:
    """What one round yields."""

    adapter: Arrays
    """The next global adapter, same layout as the last."""
    state: Arrays
    """What the strategy must remember until the next round."""
    personal: Mapping[str, Arrays] = field(default_factory=dict)
    """Site -> its own adapter, for methods that answer each site differently. It keeps it until it is given another:
    a site that was not asked in a round does not fall back to the global adapter."""
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    """Conflicts, verdicts, gaps: JSON values, written to the run folder. What ``experts`` says of a layer, lists by
    [site][expert] or [expert], becomes its ``rule`` there, beside what ``strategies.diagnostics`` says for all."""


@dataclass(kw_only=True)
class Strategy(ABC):
    """A rule that turns the updates of one round into the next global adapter.

    The fields of a subclass are its hyperparameters, set under ``strategy.`` and checked in
    ``__post_init__``. A strategy never changes itself or its inputs: state goes in and comes out.
    """

    name: ClassVar[str]
    """What ``strategy=`` calls it."""
    methods: ClassVar[frozenset[str]] = frozenset({"sft", "fc_moe", "flex", "firm", "dpo"})
    """Client halves it can be paired with."""

    def init_state(self, adapter: Arrays) -> Arrays:  # noqa: ARG002
        """State before the first round; most rules remember nothing."""
        return {}

    def broadcast(self, state: Arrays) -> Arrays:  # noqa: ARG002
        """What every site gets beside the adapter before it trains, float32; most rules send nothing more."""
        return {}

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if ``update`` must be left out of this round.

        Raises:
            ValueError: If names or shapes differ from the global adapter, a value is NaN, infinite or beyond
                ``LARGEST``, the number of examples is not in [1, ``MOST_EXAMPLES``], or a token count is not in
                [0, ``MOST_TOKENS``].
        """
        check_same_layout(adapter, update.adapter)
        check_size(update.adapter)
        check_finite(update.expert_tokens)
        check_size(update.extras)
        if not 1 <= update.num_examples <= MOST_EXAMPLES:
            raise ValueError(f"num_examples must be in [1, {MOST_EXAMPLES:g}], got {str(update.num_examples)[:30]}")
        for layer, tokens_E in update.expert_tokens.items():
            if tokens_E.ndim != 1 or (tokens_E < 0).any() or (tokens_E > MOST_TOKENS).any():
                raise ValueError(f"expert_tokens[{layer}] must be one count in [0, {MOST_TOKENS:g}] per expert")

    @abstractmethod
    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """The next global adapter from at least one checked update.

        Callers pass the updates in the order of their site names, so the order of arrival
        changes nothing.
        """
