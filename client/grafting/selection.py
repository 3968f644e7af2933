"""Which pretrained expert a site's graft of each MoE layer is made from: the one that alone comes nearest to the layer.

FLEx (2025, https://arxiv.org/abs/2506.00965) selects by a local reconstruction loss, that of expert pruning (Lu et al.
2024, https://arxiv.org/abs/2402.14800). Both sides of it are routed experts: shared ones are left out.

Shape suffixes: N tokens, D model width, E experts, K experts per token, C sets of experts that survive, S of each set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""Of all experts' inner values and outputs, and of their candidates' inputs to the router: 64 MiB in float32."""
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
        ValueError: If a router is not recognised, or a layer's answer is not finite.
    """
    started = time.perf_counter()
    seen = _observed(adapted, sequences, batch_size)
    layers = {layer: _choose(layer, module, seen[layer], num_experts) for layer, module in adapted.experts().items()}
    num_tokens = sum(len(sequence.input_ids) for sequence in sequences)
    return Selection(layers, num_tokens, time.perf_counter() - started)


Router = Callable[[Tensor], Any]
"""From (N, D) inputs to logits, (N, K) weights and (N, K) experts; Granite's, up to transformers 5.20, in reverse."""


class _Seen:
    """What went through one layer, batch by batch, without padding, in main memory."""

    def __init__(self) -> None:
        self.routed_by: list[Tensor] = []
        """(N, D) the router's inputs: the experts' own, but where these work in another space."""
        self.inputs: list[Tensor] = []
        """(N, D) the experts' inputs."""
        self.outputs: list[Tensor] = []
        """(N, D) F, what the experts made of them."""
        self.router: Router
        """The layer's, with whatever it is given beside its inputs, such as a bias that its layer holds."""

    def pieces(self, num_tokens: int, device: torch.device) -> Iterator[list[Tensor]]:
        """The three, at most so many tokens at a time."""
        for batch in zip(self.routed_by, self.inputs, self.outputs, strict=True):
            for first in range(0, len(batch[0]), num_tokens):
                yield [part[first : first + num_tokens].to(device) for part in batch]


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

            def on_router(module: nn.Module, inputs: Any, named: Any, _output: Any, caught: _Seen = caught) -> None:
                keep(caught.routed_by, inputs[0])
                beside = inputs[1:]  # alone: the layer's inputs are kept in main memory
                caught.router = lambda hidden_ND: module(hidden_ND, *beside, **named)

            def on_experts(_module: nn.Module, inputs: Any, output: Tensor, caught: _Seen = caught) -> None:
                keep(caught.inputs, inputs[0])
                if torch.equal(caught.routed_by[-1], caught.inputs[-1]):  # as in most families: kept once
                    caught.routed_by[-1] = caught.inputs[-1]
                keep(caught.outputs, output)

            stack.callback(routers[layer].register_forward_hook(on_router, with_kwargs=True).remove)
            stack.callback(experts[layer].register_forward_hook(on_experts).remove)
        yield


def _choose(layer: str, experts: Any, seen: _Seen, num_experts: int) -> LayerChoice:
    chosen: list[int] = []
    spread, is_tie, loss = 1.0, False, math.inf
    limit = _tokens_at_a_time(experts, seen)
    kept = list(_pieces(experts, seen, limit)) if sum(map(len, seen.outputs)) <= limit else None
    for _ in range(num_experts):
        loss_E, rounding = _losses(seen.router, kept or _pieces(experts, seen, limit), len(experts.down_proj), chosen)
        if not all(math.isfinite(loss) for expert, loss in enumerate(loss_E.tolist()) if expert not in chosen):
            raise ValueError(f"{layer}: what its experts or its router answer is not finite, so none can be chosen")
        best, second = loss_E.topk(2, largest=False).values.tolist() if len(loss_E) > 1 else (float(loss_E), math.inf)
        if math.isfinite(second):
            spread = min(spread, (second - best) / second if second > 0 else 0.0)
            is_tie |= second - best <= rounding
        chosen.append(int((loss_E <= best + rounding).nonzero()[0]))
        loss = float(loss_E[chosen[-1]])
    return LayerChoice(tuple(chosen), loss, spread, is_tie)


def _tokens_at_a_time(experts: Any, seen: _Seen) -> int:
    fused = [experts.gate_up_proj if experts.has_gate else experts.up_proj, experts.down_proj]
    values: int = sum(max(weight.shape[1:]) for weight in fused) + seen.routed_by[0].shape[1]
    return max(1, _VALUES_AT_A_TIME // (len(experts.down_proj) * values))


def _pieces(experts: Any, seen: _Seen, num_tokens: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The router's inputs (N, D), each expert's outputs (E, N, D) and F (N, D), at most so many tokens at a time."""
    for routed_by_ND, x_ND, F_ND in seen.pieces(num_tokens, experts.down_proj.device):
        yield routed_by_ND, every_expert(experts, x_ND).float(), F_ND.float()


def _losses(
    router: Router, pieces: Iterable[tuple[Tensor, Tensor, Tensor]], num_experts: int, chosen: Sequence[int]
) -> tuple[Tensor, float]:
    """(E,) float64 loss of ``chosen`` and one more expert, infinite for those; and a difference that means nothing."""
    candidates = [expert for expert in range(num_experts) if expert not in chosen]
    survivors_CS = torch.tensor([[*chosen, expert] for expert in candidates])
    loss_E, length = torch.full((num_experts,), math.inf, dtype=torch.float64), 0.0
    loss_E[candidates] = 0
    for routed_by_ND, outputs_END, F_ND in pieces:
        weights_CNS = surviving_weights(router, routed_by_ND, num_experts, survivors_CS)
        missing_CND = F_ND.repeat(len(candidates), 1, 1)
        for place, expert_C in enumerate(survivors_CS.T):
            missing_CND.addcmul_(weights_CNS[:, :, place, None], outputs_END[expert_C], value=-1)
        loss_E[candidates] += missing_CND.norm(dim=2).sum(dim=1, dtype=torch.float64).cpu()
        length += float(F_ND.norm(dim=1).sum())
    return loss_E, _TIE * length


def surviving_weights(router: Router, hidden_ND: Tensor, num_experts: int, survivors_CS: Tensor) -> Tensor:
    """(C, N, S) float32 routing weights of each set of experts if all other experts' logits were minus infinity.

    The router itself is asked, for all sets at once: families differ in score, normalisation and scale.

    Args:
        router: The layer's.
        hidden_ND: Its inputs.
        num_experts: E.
        survivors_CS: int64, the experts that are left of each set.
    """
    survivors_CS = survivors_CS.to(hidden_ND.device)
    num_sets, num_tokens = len(survivors_CS), len(hidden_ND)
    dropped_CE = torch.ones(num_sets, num_experts, dtype=torch.bool, device=hidden_ND.device)
    dropped_CE.scatter_(1, survivors_CS, value=False)
    with _Dropped(dropped_CE.repeat_interleave(num_tokens, dim=0)):
        first, weights, last = router(hidden_ND.repeat(num_sets, 1))
    chosen = first if last.is_floating_point() else last
    weights_CNE = torch.zeros(num_sets * num_tokens, num_experts, device=hidden_ND.device)
    # With fewer survivors than K the rest of the choice is of nothing, to which Phi's gives no number.
    weights_CNE.scatter_add_(1, chosen, weights.float().nan_to_num(0.0))
    weights_CNE = weights_CNE.view(num_sets, num_tokens, num_experts)
    return weights_CNE.gather(2, survivors_CS[:, None].expand(-1, num_tokens, -1))


class _Dropped(TorchFunctionMode):
    """While it lasts, the logits of dropped experts are minus infinity: of the one linear map in a router.

    Args:
        dropped: (rows, E), whether the expert is dropped for that row of the router's inputs.
    """

    def __init__(self, dropped: Tensor) -> None:
        super().__init__()
        self._dropped = dropped

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.masked_fill(self._dropped, -math.inf) if func is functional.linear else result
