"""FC-MoE: experts are averaged by how much each site used and changed them, without what opposes the consensus.

Shapes: C sites, E experts of one MoE layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies import experts, low_rank
from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy
from strategies.conflicts import ConflictConfig, Granularity, Space
from strategies.expert_rounds import Attention, ExpertRange, Findings, aggregate_experts, check_expert_tokens
from strategies.expert_steps import step_factors, step_products


class Importance(Enum):
    """How much say a site has in an expert. In each case a site that routed no token to it has none."""

    paper = "paper"
    """Tokens routed to the expert times the length of its update (Eq. 1)."""
    tokens = "tokens"
    """Tokens routed to the expert."""
    examples = "examples"
    """Training examples of the site."""
    uniform = "uniform"
    """The same for every site that used the expert (ablation)."""


@dataclass(kw_only=True)
class FcMoe(Strategy):
    """Conflict-aware aggregation of experts, one by one; everything else is averaged by examples.

    "FC-MoE", 2026, Eq. 1-4 (Eq. 5 and 6, retention, are the client half). https://arxiv.org/abs/2606.15625

    The paper writes no layer index and trains whole experts: here everything is done for each (layer, expert),
    on LoRA factors or whole weights. It does not mention attention and routers (averaged here as in FedAvg), nor
    experts that no site used (they keep their value). Finer granularities keep the weights of the whole expert,
    so that without conflicts they all give the same weighted mean.
    """

    name: ClassVar[str] = "fc_moe"

    importance: Importance = Importance.paper
    conflict: ConflictConfig = field(default_factory=ConflictConfig)
    attention: Attention = Attention.averaged
    """Ours: where experts are frozen, conflicts of what is left can be told from its projections."""

    def init_state(self, adapter: Arrays) -> Arrays:
        """Nothing to remember.

        Raises:
            ValueError: If ``conflict`` needs LoRA experts and the adapter has whole ones.
        """
        whole = [
            name for name in adapter if experts.is_expert_array(name) and not name.endswith((".lora_A", ".lora_B"))
        ]
        for key, setting in {"space": self.conflict.space, "granularity": self.conflict.granularity}.items():
            if whole and setting in {Space.product, Granularity.component}:
                raise ValueError(
                    f"strategy.conflict.{key}={setting.name} needs model.experts=lora, but {whole[0]} is a whole weight"
                )
        return {}

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, lacks the tokens of an expert, or has too long products."""
        super().check_update(adapter, update)
        check_expert_tokens(adapter, update)
        if self.conflict.space is Space.product:
            low_rank.check_products(update.adapter)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """One conflict-free step of every expert that was used, and the mean of the other arrays.

        Diagnostics: ``experts`` -> layer -> ``sites`` (names, in the order of the rows below); ``tokens``, ``weight``,
        ``cosine`` and ``conflict`` as [site][expert]; ``scale``, and ``lost_energy`` for space=product, as [expert]:
        see ``conflicts.measures`` and ``step_products``. A site that did not use the expert has a weight of 0 and
        None as cosine and conflict; where nobody did, what is by expert is None.
        """
        stepped, report = aggregate_experts(adapter, updates, self._step, self.attention)
        return Aggregation(adapter=stepped, state=state, diagnostics=report)

    def _step(self, experts_of_layer: ExpertRange) -> tuple[Arrays, Findings]:
        step = step_products if self.conflict.space is Space.product else step_factors
        weigh = partial(self._weights, experts_of_layer.tokens_CE, experts_of_layer.examples_C)
        return step(experts_of_layer.received, experts_of_layer.trained, weigh, self.conflict)

    def _weights(
        self, tokens_CE: NDArray[np.floating], examples_C: NDArray[np.float64], norms_CE: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(C, E) share of each site in each expert: its importance (Eq. 1) over that of all sites."""
        if self.importance is Importance.paper:
            return experts.shares(tokens_CE * norms_CE)
        if self.importance is Importance.tokens:
            return experts.shares(tokens_CE)
        say_C = examples_C if self.importance is Importance.examples else np.ones_like(examples_C)
        return experts.shares(np.where(tokens_CE > 0, say_C[:, None], 0.0))
