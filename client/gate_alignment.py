"""FedAlign-MoE inside the local loop: what the routers do is measured, and pulled towards what all sites' routers do.

Shape suffixes: N real tokens of a pass, E experts of one MoE layer, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from client.local_rule import LocalRule
from conf.methods import RoutingProbability
from strategies.adapters import Arrays
from strategies.fedalign_moe import MARGIN, PROBABILITY, SEMANTICS

_SMALLEST_REFERENCE = 1e-6
"""Below it a reference counts as this: no site's routing went there, and the divergence would be infinite."""
_NO_LOGIT = -1e9
"""Of an expert that has no part in the softmax: finite, so that 0 times it is 0, in the gradient too."""


@dataclass(frozen=True)
class Target:
    """What one layer's routing is pulled towards."""

    reference_E: Tensor
    """p_g, the global reference."""
    weight_E: Tensor
    """alpha_i, how much each expert counts at this site (Eq. 9)."""


class GateAlignment(LocalRule):
    """Measures the routing of every pass and adds ``strength`` times its divergence from the target to the loss.

    The term is the mean over layers and tokens; a layer without a target is measured only. ``probability``
    says over which experts the routing probabilities are.
    """

    def __init__(
        self,
        routers: Mapping[str, nn.Module],
        experts_per_token: int,
        targets: Mapping[str, Target],
        strength: float,
        *,
        keep_under: str,
        probability: RoutingProbability,
    ) -> None:
        self._routers = routers
        self._num_selected = experts_per_token if probability is RoutingProbability.selected else None
        self._experts_per_token = experts_per_token
        self._targets = targets
        self._strength = strength
        self._keep_under = keep_under
        self._statistics = {layer: RoutingStatistics(router) for layer, router in routers.items()}
        self._real_tokens = torch.empty(0)
        self._inputs: dict[str, Tensor | None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Catch the hidden states that each router is called with."""
        with ExitStack() as stack:
            for layer, router in self._routers.items():
                stack.callback(router.register_forward_pre_hook(self._catch(layer)).remove)
            yield

    def begin_pass(self, token_mask: Tensor) -> None:
        """Wait for one call of each router; a checkpointed layer computes a pass again later."""
        self._real_tokens = token_mask.reshape(-1).nonzero().squeeze(1)
        self._inputs = dict.fromkeys(self._routers)

    def penalty(self) -> Tensor | None:
        """``strength`` times the divergence, summed over tokens, mean over layers; None if no layer has a target."""
        terms = []
        for layer, caught in self._inputs.items():
            assert caught is not None, f"the router of {layer} was not called"
            hidden_ND = caught.reshape(-1, caught.shape[-1])[self._real_tokens.to(caught.device)].float()
            log_p_NE = log_probabilities(hidden_ND, self._routers[layer], self._num_selected)
            self._statistics[layer].add(log_p_NE.detach().exp(), hidden_ND.detach())
            if layer in self._targets:
                terms.append(divergence(log_p_NE, self._targets[layer], self._experts_per_token).sum())
        self._inputs = {}
        return self._strength * torch.stack(terms).sum() / len(self._routers) if terms else None

    def to_send(self) -> Arrays:
        """The round's statistics of every layer."""
        measured = {layer: statistics.arrays() for layer, statistics in self._statistics.items()}
        return {kind + layer: array for layer, arrays in measured.items() for kind, array in arrays.items()}

    def to_keep(self) -> Arrays:
        """The site's own mean probabilities, by which it weighs experts in its next round."""
        return {
            self._keep_under + name: array for name, array in self.to_send().items() if name.startswith(PROBABILITY)
        }

    def _catch(self, layer: str) -> Any:
        def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001
            if layer in self._inputs and self._inputs[layer] is None:
                self._inputs[layer] = inputs[0]

        return catch


class RoutingStatistics:
    """Means over a round's tokens of what one router does, each token as it was routed when it was trained on."""

    def __init__(self, router: nn.Module) -> None:
        weight: Any = router.weight
        num_experts, width = weight.shape
        zeros = functools.partial(torch.zeros, dtype=torch.float64, device=weight.device)
        self._num_tokens = 0
        self._probability_E = zeros(num_experts)
        self._margin_E = zeros(num_experts)
        self._preferring_E = zeros(num_experts)
        """Tokens whose largest probability is the expert's."""
        self._hidden_ED = zeros(num_experts, width)

    def add(self, p_NE: Tensor, hidden_ND: Tensor) -> None:
        """Count the tokens of one pass: their routing probabilities and the hidden states that were routed."""
        p_NE = p_NE.double()
        largest_N2, expert_N2 = p_NE.topk(2, dim=1)
        prefers_NE = functional.one_hot(expert_N2[:, 0], p_NE.shape[1]).double()
        self._num_tokens += len(p_NE)
        self._probability_E += p_NE.sum(dim=0)
        self._margin_E += (largest_N2[:, 0] - largest_N2[:, 1]) @ prefers_NE
        self._preferring_E += prefers_NE.sum(dim=0)
        self._hidden_ED += prefers_NE.T @ hidden_ND.double()

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Float32 means, by kind.

        Probability (E,) (Eq. 3), margin (E,) (Eq. 5), and the hidden state (E, D) of the tokens that prefer each expert
        (Eq. 12), zero where there is none.
        """
        means = {
            PROBABILITY: (self._probability_E / self._num_tokens).clamp(max=1.0),
            MARGIN: self._margin_E / self._num_tokens,
            SEMANTICS: self._hidden_ED / self._preferring_E.clamp(min=1.0)[:, None],
        }
        return {kind: mean.float().cpu().numpy() for kind, mean in means.items()}


def log_probabilities(hidden_ND: Tensor, router: nn.Module, num_selected: int | None = None) -> Tensor:
    """(N, E) float32 logarithms of the softmax of the router's logits, over all experts.

    Or over each token's ``num_selected`` most probable ones: the others have the probability 0, of which the logarithm
    here is finite.
    """
    weight: Any = router.weight
    bias: Any = getattr(router, "bias", None)
    logits_NE = functional.linear(hidden_ND, weight.float(), None if bias is None else bias.float())
    if num_selected is not None:
        logits_NE = logits_NE.masked_fill(~_largest(logits_NE, num_selected), _NO_LOGIT)
    return logits_NE.log_softmax(dim=1)


def divergence(log_p_NE: Tensor, target: Target, experts_per_token: int) -> Tensor:
    """(N,) sum of alpha(e) p(e) log(p(e) / p_g(e)) over the experts that token or reference chooses (Eq. 11)."""
    chosen_NE = _largest(log_p_NE, experts_per_token)
    chosen_NE[:, target.reference_E.topk(experts_per_token).indices] = True
    log_reference_E = target.reference_E.clamp_min(_SMALLEST_REFERENCE).log()
    terms_NE = target.weight_E * log_p_NE.exp() * (log_p_NE - log_reference_E)
    return torch.where(chosen_NE, terms_NE, 0.0).sum(dim=1)


def _largest(values_NE: Tensor, count: int) -> Tensor:
    """(N, E) which experts are among each token's ``count`` largest."""
    largest_NE = torch.zeros_like(values_NE, dtype=torch.bool)
    return largest_NE.scatter_(1, values_NE.topk(count, dim=1).indices, value=True)
