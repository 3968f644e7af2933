"""How tokens are spread over the experts: counted, measured, and evened out in training.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


class ExpertTokenCounter:
    """Tokens routed to each expert, summed over the forward passes since it was made; padding is left out."""

    def __init__(self, num_experts: Mapping[str, int], device: torch.device) -> None:
        self._device = device
        self._totals_E = {
            layer: torch.zeros(count, dtype=torch.int64, device=device) for layer, count in num_experts.items()
        }
        self._uncounted: set[str] = set()
        self.real_tokens: torch.Tensor | None = None
        """Indices, int64, of the tokens of this pass that are real in the flattened batch; None if all are."""

    def set_mask(self, token_mask: torch.Tensor) -> None:
        """Say which tokens of the next forward pass are real: bool (batch, time), true for all but padding."""
        self._uncounted = set(self._totals_E)
        mask_N = token_mask.reshape(-1)
        # A mask lies on the CPU when it is made, so that asking it keeps no GPU waiting.
        self.real_tokens = None if bool(mask_N.all()) else mask_N.nonzero().squeeze(1).to(self._device)

    def pause(self) -> None:
        """Count nothing, and take every token for real, until the next ``set_mask``: for passes that do not train."""
        self._uncounted = set()
        self.real_tokens = None

    def add(self, layer: str, tokens_E: torch.Tensor) -> None:
        """Add one layer's real tokens of this pass; only once, since gradient checkpointing computes a pass again."""
        if layer in self._uncounted:
            self._uncounted.remove(layer)
            self._totals_E[layer] += tokens_E

    def totals(self) -> dict[str, NDArray[np.float64]]:
        """Layer -> (num_experts,) tokens so far; a layer's sum is tokens times experts per token."""
        return {layer: totals_E.cpu().numpy().astype(np.float64) for layer, totals_E in self._totals_E.items()}


@dataclass
class RoutedTokens:
    """Who counts a model's routed tokens at the moment; all its layers ask the same object."""

    counter: ExpertTokenCounter | None = None


@contextmanager
def count_expert_tokens(
    experts: Mapping[str, nn.Module], num_experts: Mapping[str, int], device: torch.device
) -> Iterator[ExpertTokenCounter]:
    """Count the tokens that each layer's experts module is called with, of any model of transformers.

    Every experts module in transformers' interface is called as ``(hidden_states, top_k_index, top_k_weights)``.
    """
    counter = ExpertTokenCounter(num_experts, device)

    def hook_for(layer: str) -> Any:
        def count(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:  # noqa: ARG001
            counter.add(layer, chosen_tokens(inputs[1], num_experts[layer], counter.real_tokens))

        return count

    with ExitStack() as stack:
        for layer, module in experts.items():
            stack.callback(module.register_forward_pre_hook(hook_for(layer)).remove)
        yield counter


@contextmanager
def count_router_choices(
    routers: Mapping[str, nn.Module], experts_per_token: int, counter: ExpertTokenCounter
) -> Iterator[None]:
    """Count what routers choose whose experts are called another way: the largest of the last (N, E) they return."""

    def hook_for(layer: str) -> Any:
        def count(module: nn.Module, inputs: Any, outputs: Any) -> None:  # noqa: ARG001
            logits_NE = outputs[-1] if isinstance(outputs, tuple) else outputs
            chosen_NK = logits_NE.topk(experts_per_token, dim=-1).indices
            counter.add(layer, chosen_tokens(chosen_NK, logits_NE.shape[-1], counter.real_tokens))

        return count

    with ExitStack() as stack:
        for layer, module in routers.items():
            stack.callback(module.register_forward_hook(hook_for(layer)).remove)
        yield


def chosen_tokens(chosen_NK: torch.Tensor, num_experts: int, real_tokens: torch.Tensor | None) -> torch.Tensor:
    """(E,) int64: how many real tokens chose each expert."""
    chosen = chosen_NK if real_tokens is None else chosen_NK[real_tokens]
    return torch.bincount(chosen.reshape(-1), minlength=num_experts)


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
