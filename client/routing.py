"""How tokens are spread over the experts: counted, measured, and evened out in training.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


class ExpertTokenCounter:
    """Tokens routed to each expert, summed over the forward passes since it was made; padding is left out."""

    def __init__(self, num_experts: Mapping[str, int], device: torch.device) -> None:
        self._totals_E = {
            layer: torch.zeros(count, dtype=torch.int64, device=device) for layer, count in num_experts.items()
        }
        self._mask: torch.Tensor | None = None

    def set_mask(self, token_mask: torch.Tensor) -> None:
        """Say which tokens of the next forward pass are real: bool (batch, time), true for all but padding."""
        self._mask = token_mask.reshape(-1)

    def add(self, layer: str, top_k_index: torch.Tensor) -> None:
        """Add one layer's routing: int64 (batch * time, experts per token)."""
        assert self._mask is not None, "set_mask must come before the forward pass"
        chosen = top_k_index.reshape(len(self._mask), -1)[self._mask.to(top_k_index.device)]
        totals_E = self._totals_E[layer]
        totals_E += torch.bincount(chosen.reshape(-1), minlength=len(totals_E))

    def totals(self) -> dict[str, NDArray[np.float64]]:
        """Layer -> (num_experts,) tokens so far; a layer's sum is tokens times experts per token."""
        return {layer: totals_E.cpu().numpy().astype(np.float64) for layer, totals_E in self._totals_E.items()}


@contextmanager
def count_expert_tokens(
    experts: Mapping[str, nn.Module], num_experts: Mapping[str, int], device: torch.device
) -> Iterator[ExpertTokenCounter]:
    """Count the tokens that each layer's experts module is called with.

    Every experts module of transformers 5 is called as ``(hidden_states, top_k_index, top_k_weights)``, whatever
    PEFT has wrapped around it.
    """
    counter = ExpertTokenCounter(num_experts, device)

    def hook_for(layer: str) -> Any:
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001
            counter.add(layer, inputs[1])

        return count

    handles = [module.register_forward_pre_hook(hook_for(layer)) for layer, module in experts.items()]
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()


def routing_entropy(tokens_E: NDArray[np.floating]) -> float:
    """Entropy of one layer's token counts over that of equal counts: 1 if all experts are used alike, 0 if one is."""
    share_E = tokens_E[tokens_E > 0] / tokens_E.sum()
    return float(-(share_E * np.log(share_E)).sum() / np.log(len(tokens_E)))


def balance_loss(router_logits: Sequence[torch.Tensor], num_chosen: int, token_mask: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss, 1 if all experts are used alike (https://arxiv.org/abs/2101.03961, Eq. 4-6).

    E times the inner product of the experts' shares of tokens and their mean probabilities, averaged over
    layers. transformers' own loss pools the layers first, and is content if each uses other experts.

    Args:
        router_logits: A layer's (T, E) each.
        num_chosen: Experts per token.
        token_mask: bool, T in all; false for padding.
    """
    losses = []
    for layer_TE in router_logits:
        logits_TE = layer_TE[token_mask.reshape(-1)].float()
        num_tokens, num_experts = logits_TE.shape
        chosen = logits_TE.topk(num_chosen, dim=1).indices.reshape(-1)
        share_E = torch.bincount(chosen, minlength=num_experts) / (num_tokens * num_chosen)
        losses.append(num_experts * (share_E * logits_TE.softmax(dim=1).mean(dim=0)).sum())
    return torch.stack(losses).mean()
