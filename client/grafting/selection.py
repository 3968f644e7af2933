"""Which pretrained expert a site's graft of each MoE layer is made from: the one that alone comes nearest to the layer.

FLEx (2025, https://arxiv.org/abs/2506.00965) selects by a local reconstruction loss, that of expert pruning (Lu et al.
2024, https://arxiv.org/abs/2402.14800). Both sides of it are routed experts: shared ones are left out.

Shape suffixes: N tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from client.evaluation.held_out import response_logits
from client.experts import every_expert
from client.model import AdaptedModel
from client.text import TokenSequence, collate

_VALUES_AT_A_TIME = 2**24
"""Of the experts' outputs and inner values: 64 MiB in float32."""
_TIE = 1e-5
"""Losses nearer to each other than this share of the outputs' lengths are told apart by rounding alone."""


@dataclass(frozen=True)
class LayerChoice:
    """What was found for one MoE layer."""

    experts: tuple[int, ...]
    """The chosen ones, the best first; where several tie, that of the lowest number."""
    loss: float
    """Sum over tokens of ||F(x) - F_chosen(x)||, with all chosen experts."""
    spread: float
    """How much smaller the best loss is than the second best, as a share of that; the least of all choices made."""
    is_tie: bool
    """Whether a choice was between losses that are equal up to rounding, as among copies of one expert."""


@dataclass(frozen=True)
class Selection:
    """What a site found."""

    layers: Mapping[str, LayerChoice]
    num_tokens: int
    seconds: float


@torch.no_grad()
def select_experts(
    adapted: AdaptedModel, sequences: Sequence[TokenSequence], num_experts: int, batch_size: int
) -> Selection:
    """The experts that each layer's graft is made from, by one pass over ``sequences`` and no training.

    The loss of a set S is ``sum_x ||F(x) - F_S(x)||`` over the real tokens, with F the sum of the layer's routed
    experts as it is, and F_S the same with every expert outside S dropped: their router logits are minus infinity. S
    grows greedily by the expert that makes it smallest.

    Args:
        adapted: The model, with the adapter loaded that the layers' inputs are to come from, and no graft.
        sequences: Calibration data.
        num_experts: Size of S.
        batch_size: Sequences of a forward pass.

    Raises:
        ValueError: If a router is not recognised.
    """
    started = time.perf_counter()
    seen = _observed(adapted, sequences, batch_size)
    experts, routers = adapted.experts(), adapted.routers()
    layers = {layer: _choose(experts[layer], routers[layer], seen[layer], num_experts) for layer in seen}
    num_tokens = sum(len(sequence.input_ids) for sequence in sequences)
    return Selection(layers, num_tokens, time.perf_counter() - started)


class _Seen:
    """What went through one layer, batch by batch, without padding, in main memory."""

    def __init__(self) -> None:
        self.routed_by: list[Tensor] = []
        """(N, D) the router's inputs: not the experts', where these work in a space of their own."""
        self.inputs: list[Tensor] = []
        """(N, D) the experts' inputs."""
        self.outputs: list[Tensor] = []
        """(N, D) F, what the experts made of them."""

    def pieces(self, num_tokens: int, device: torch.device) -> Iterator[list[Tensor]]:
        """The three, at most so many tokens at a time."""
        joined = [torch.cat(part) for part in (self.routed_by, self.inputs, self.outputs)]
        for first in range(0, len(joined[0]), num_tokens):
            yield [part[first : first + num_tokens].to(device) for part in joined]


def _observed(adapted: AdaptedModel, sequences: Sequence[TokenSequence], batch_size: int) -> dict[str, _Seen]:
    """One forward pass, by layer."""
    adapted.model.eval()
    seen = {layer: _Seen() for layer in adapted.layers}
    real = torch.empty(0, dtype=torch.bool)

    def keep(part: list[Tensor], tokens: Tensor) -> None:
        part.append(tokens.reshape(-1, tokens.shape[-1])[real].cpu())

    with _hooks(adapted, seen, keep):
        for first in range(0, len(sequences), batch_size):
            batch = collate(sequences[first : first + batch_size], adapted.tokenizer.pad_token_id)
            real = batch["token_mask"].reshape(-1).to(adapted.device)
            response_logits(adapted, batch)
    return seen


@contextmanager
def _hooks(adapted: AdaptedModel, seen: Mapping[str, _Seen], keep: Any) -> Iterator[None]:
    experts, routers = adapted.experts(), adapted.routers()
    with ExitStack() as stack:
        for layer, caught in seen.items():

            def on_router(_module: nn.Module, inputs: Any, _output: Any, caught: _Seen = caught) -> None:
                keep(caught.routed_by, inputs[0])

            def on_experts(_module: nn.Module, inputs: Any, output: Tensor, caught: _Seen = caught) -> None:
                keep(caught.inputs, inputs[0])
                keep(caught.outputs, output)

            stack.callback(routers[layer].register_forward_hook(on_router).remove)
            stack.callback(experts[layer].register_forward_hook(on_experts).remove)
        yield


def _choose(experts: Any, router: nn.Module, seen: _Seen, num_experts: int) -> LayerChoice:
    chosen: list[int] = []
    spread, is_tie, loss = 1.0, False, math.inf
    for _ in range(num_experts):
        loss_E, rounding = _losses(experts, router, seen, chosen)
        best, second = loss_E.topk(2, largest=False).values.tolist() if len(loss_E) > 1 else (float(loss_E), math.inf)
        if math.isfinite(second):
            spread = min(spread, (second - best) / second if second > 0 else 0.0)
            is_tie |= second - best <= rounding
        chosen.append(int((loss_E <= best + rounding).nonzero()[0]))
        loss = float(loss_E[chosen[-1]])
    return LayerChoice(tuple(chosen), loss, spread, is_tie)


def _losses(experts: Any, router: nn.Module, seen: _Seen, chosen: Sequence[int]) -> tuple[Tensor, float]:
    """(E,) float64 loss of ``chosen`` and one more expert, infinite for those; and a difference that means nothing."""
    fused = [experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj]
    count, device = len(experts.down_proj), experts.down_proj.device
    loss_E, length = torch.zeros(count, dtype=torch.float64, device=device), 0.0
    values_per_token = count * sum(max(weight.shape[1:]) for weight in fused)
    for routed_by_ND, x_ND, F_ND in seen.pieces(max(1, _VALUES_AT_A_TIME // values_per_token), device):
        outputs_END = every_expert(experts, x_ND).float()
        for expert in set(range(count)).difference(chosen):
            survivors = [*chosen, expert]
            weights_NS = surviving_weights(router, routed_by_ND, count, survivors)
            left_ND = (weights_NS.T[:, :, None] * outputs_END[survivors]).sum(dim=0)
            loss_E[expert] += (F_ND.float() - left_ND).norm(dim=1).sum(dtype=torch.float64)
        length += float(F_ND.float().norm(dim=1).sum())
    loss_E[list(chosen)] = math.inf
    return loss_E, _TIE * length


def surviving_weights(router: nn.Module, hidden_ND: Tensor, num_experts: int, survivors: Sequence[int]) -> Tensor:
    """(N, survivors) float32 routing weights if all other experts' logits were minus infinity.

    The router itself is asked: families differ in score, normalisation and scale.

    Args:
        router: Returns logits, (N, K) weights and (N, K) experts; Granite's, up to transformers 5.20, in reverse.
        hidden_ND: Its inputs.
        num_experts: E.
        survivors: Experts that are left.
    """
    dropped_E = torch.ones(num_experts, dtype=torch.bool, device=hidden_ND.device)
    dropped_E[list(survivors)] = False
    with _Dropped(dropped_E):
        first, weights_NK, last = router(hidden_ND)
    chosen_NK = first if last.is_floating_point() else last
    weights_NE = torch.zeros(len(hidden_ND), num_experts, device=hidden_ND.device)
    return weights_NE.scatter_(1, chosen_NK, weights_NK.float())[:, list(survivors)]


class _Dropped(TorchFunctionMode):
    """While it lasts, the logits of dropped experts are minus infinity: of the one linear map in a router."""

    def __init__(self, dropped_E: Tensor) -> None:
        super().__init__()
        self._dropped_E = dropped_E

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.masked_fill(self._dropped_E, -math.inf) if func is functional.linear else result
