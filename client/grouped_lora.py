"""A block of frozen experts with low-rank additions: its forward and backward pass, as grouped products.

Nothing of the size of the experts' weights is ever formed: the low-rank terms are two skinny products beside the
frozen one, and a frozen weight gets no gradient. For the backward pass the block keeps the tokens it was given
and the output of its first projection; what each token-expert pair saw, and the activation, are computed again.

Shape suffixes: N tokens, K experts per token, S = N * K pairs of token and expert in order of expert, D model width,
F inner width, I inputs, O outputs, E experts, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ALIGNMENT_BYTES = 16
"""torch's grouped product wants rows and columns that begin at multiples of this."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of token and expert of one pass, in order of expert."""

    token_S: Tensor
    """Token of each pair, int64."""
    slot_S: Tensor
    """Place of each pair in the flattened (N, K) choice of the router, int64."""
    expert_S: Tensor
    """Expert of each pair, int64, ascending."""
    place_NK: Tensor
    """Where each token's K pairs are, int64: the inverse of ``slot_S``."""
    ends_E: Tensor
    """Where each expert's pairs end, int32; the first expert's begin at 0."""

    @classmethod
    def of(cls, chosen_NK: Tensor, num_experts: int) -> Pairs:
        """Sort the router's choice, int64; sizes depend on shapes alone, so a GPU need not be waited for."""
        expert_S, slot_S = torch.sort(chosen_NK.reshape(-1), stable=True)
        place_S = torch.empty_like(slot_S)
        place_S[slot_S] = torch.arange(len(slot_S), device=slot_S.device)
        experts_E = torch.arange(num_experts, device=slot_S.device)
        ends_E = torch.searchsorted(expert_S, experts_E, right=True, out_int32=True)
        return cls(slot_S // chosen_NK.shape[1], slot_S, expert_S, place_S.view_as(chosen_NK), ends_E)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First and end of each expert's pairs; a GPU would have to be waited for."""
        ends = self.ends_E.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def tokens_per_expert(self) -> Tensor:
        """(E,) int32."""
        return torch.diff(self.ends_E, prepend=self.ends_E.new_zeros(1))

    def scatter_sum(self, pairs_SD: Tensor) -> Tensor:
        """Sum of each token's pairs, (N, D); in a fixed order, unlike an atomic ``index_add_``."""
        num_tokens, experts_per_token = self.place_NK.shape
        return pairs_SD[self.place_NK.reshape(-1)].view(num_tokens, experts_per_token, -1).sum(dim=1)


@dataclass(frozen=True)
class Projection:
    """One linear map per expert."""

    weight: Tensor
    """(E, O, I), or (E, I, O) if ``is_transposed``; may be a quantised tensor of torchao's."""
    bias_EO: Tensor | None = None
    scale: float = 1.0
    """Factor of the low-rank term: alpha / rank."""
    is_transposed: bool = False

    def input_major(self) -> Tensor:
        """The weight as inputs meet it; of a quantised one a new tensor, so that only one layer's is held at a time."""
        weight = self.weight.dequantize() if is_quantized(self.weight) else self.weight
        return weight if self.is_transposed else weight.mT


@dataclass(frozen=True)
class ExpertBlock:
    """What ``expert_block`` computes with, besides its differentiable inputs."""

    up: Projection
    """To the inner width; gate and up together where experts are gated."""
    down: Projection
    gate: Callable[[Tensor], Tensor]
    """(S, O) of ``up`` to (S, F): gating or plain activation, element by element."""
    pairs: Pairs


Factors = tuple[Tensor, Tensor] | None
"""A (E, R, I) and B (E, O, R) of one projection, in the weights' dtype; None: no low-rank term."""


def expert_block(hidden_ND: Tensor, weights_NK: Tensor, up: Factors, down: Factors, block: ExpertBlock) -> Tensor:
    """Sum over each token's experts of weight * down(gate(up(token))), (N, D) in the weights' dtype.

    Differentiable in tokens, routing weights and factors; once.

    Args:
        hidden_ND: Tokens, in the dtype of the experts' weights.
        weights_NK: Routing weights, in that dtype.
        up: Factors of the first projection.
        down: Factors of the second.
        block: Frozen weights and routing.
    """
    factors = [*(up or (None, None)), *(down or (None, None))]
    output: Tensor = _ExpertBlock.apply(hidden_ND, weights_NK, *factors, block)  # type: ignore[no-untyped-call]
    return output


def grouped_linear(x_SI: Tensor, projection: Projection, factors: Factors, pairs: Pairs) -> Tensor:
    """``x W + scale * (x A^T) B^T + bias`` of each pair's expert, (S, O); autograd's own, for any weight."""
    A_ERI, B_EOR = factors or (None, None)
    return _project(x_SI, projection, A_ERI, B_EOR, pairs)[0]


class _ExpertBlock(torch.autograd.Function):
    """The block with a backward pass of its own; every intermediate of size (S, D) is dropped or computed again."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd wants its inputs one by one
        ctx: Any,
        hidden_ND: Tensor,
        weights_NK: Tensor,
        up_A: Tensor | None,
        up_B: Tensor | None,
        down_A: Tensor | None,
        down_B: Tensor | None,
        block: ExpertBlock,
    ) -> Tensor:
        pairs = block.pairs
        opened_SO, up_SR = _project(hidden_ND[pairs.token_S], block.up, up_A, up_B, pairs)
        weights_S1 = weights_NK.reshape(-1, 1)[pairs.slot_S]
        # Routing weights go in before the second projection, where rows are narrower; it is linear but for its bias.
        gated_SF = block.gate(opened_SO) * weights_S1
        out_SD, down_SR = _project(gated_SF, block.down, down_A, down_B, pairs, weights_S1)
        ctx.block = block
        ctx.save_for_backward(hidden_ND, weights_NK, opened_SO, up_SR, down_SR, up_A, up_B, down_A, down_B)
        return pairs.scatter_sum(out_SD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weights_NK, opened_SO, up_SR, down_SR, up_A, up_B, down_A, down_B = ctx.saved_tensors
        block, pairs = ctx.block, ctx.block.pairs
        weights_S1 = weights_NK.reshape(-1, 1)[pairs.slot_S]
        with torch.enable_grad():
            opened_SO = opened_SO.detach().requires_grad_()
            activated_SF = block.gate(opened_SO)
        gated_SF = activated_SF.detach() * weights_S1

        grad_SD = grad_ND[pairs.token_S]
        grad_gated_SF, grad_down_A, grad_down_B = _project_backward(
            grad_SD, gated_SF, down_SR, block.down, down_A, down_B, pairs
        )
        grad_weights_NK = None
        if ctx.needs_input_grad[1]:
            # <d out, out> of a pair without ever having kept its output.
            grad_S = (grad_gated_SF * activated_SF.detach()).sum(dim=1)
            if block.down.bias_EO is not None:
                grad_S += (grad_SD * block.down.bias_EO[pairs.expert_S]).sum(dim=1)
            grad_weights_NK = grad_S[pairs.place_NK]
        (grad_SO,) = torch.autograd.grad(activated_SF, opened_SO, grad_gated_SF * weights_S1)
        x_SD = hidden_ND[pairs.token_S] if up_A is not None else None
        needs_x = ctx.needs_input_grad[0]
        grad_x_SD, grad_up_A, grad_up_B = _project_backward(
            grad_SO, x_SD, up_SR, block.up, up_A, up_B, pairs, needs_x=needs_x
        )
        grad_hidden_ND = pairs.scatter_sum(grad_x_SD) if grad_x_SD is not None else None
        return grad_hidden_ND, grad_weights_NK, grad_up_A, grad_up_B, grad_down_A, grad_down_B, None


def _project(  # noqa: PLR0917
    x_SI: Tensor,
    projection: Projection,
    A_ERI: Tensor | None,
    B_EOR: Tensor | None,
    pairs: Pairs,
    bias_weights_S1: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The projection of each pair, (S, O), and ``scale * x A^T``, (S, R)."""
    y_SO = grouped_mm(x_SI, projection.input_major(), pairs.ends_E)
    if projection.bias_EO is not None:
        bias_SO = projection.bias_EO[pairs.expert_S]
        y_SO += bias_SO if bias_weights_S1 is None else bias_SO * bias_weights_S1
    if A_ERI is None or B_EOR is None:
        return y_SO, None
    x_SR = grouped_mm(x_SI, A_ERI.mT, pairs.ends_E) * projection.scale
    _add_grouped_mm(y_SO, x_SR, B_EOR.mT, pairs)
    return y_SO, x_SR


def _project_backward(  # noqa: PLR0917
    grad_SO: Tensor,
    x_SI: Tensor | None,
    x_SR: Tensor | None,
    projection: Projection,
    A_ERI: Tensor | None,
    B_EOR: Tensor | None,
    pairs: Pairs,
    *,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the projection's input, of A and of B; none of its weight."""
    ends_E = pairs.ends_E
    grad_x_SI = grouped_mm(grad_SO, projection.input_major().mT, ends_E) if needs_x else None
    if A_ERI is None or B_EOR is None or x_SI is None or x_SR is None:
        return grad_x_SI, None, None
    grad_SR = grouped_mm(grad_SO, B_EOR, ends_E) * projection.scale
    if grad_x_SI is not None:
        _add_grouped_mm(grad_x_SI, grad_SR, A_ERI, pairs)
    grad_A_ERI = grouped_mm(grad_SR.t(), x_SI, ends_E)
    # With the short side first: on a CPU several times as fast as (S, O) by (S, R).
    grad_B_EOR = grouped_mm(x_SR.t(), grad_SO, ends_E).mT
    return grad_x_SI, grad_A_ERI, grad_B_EOR


def _add_grouped_mm(total_SO: Tensor, left_SI: Tensor, right_EIO: Tensor, pairs: Pairs) -> None:
    """Add each pair's product with its expert's matrix to ``total_SO``, in place."""
    if total_SO.device.type == "cpu" and total_SO.dtype is torch.float32 and not torch.is_grad_enabled():
        # Straight into the rows: a product in memory of its own and its addition take several times as long.
        for (first, end), right_IO in zip(pairs.spans, right_EIO, strict=True):
            total_SO[first:end].addmm_(left_SI[first:end], right_IO)
        return
    total_SO += grouped_mm(left_SI, right_EIO, pairs.ends_E)


def is_quantized(weight: Tensor) -> bool:
    """Whether torchao keeps the weight as integers and scales."""
    return hasattr(weight, "qdata")


def grouped_mm(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """One product a group of rows, or of inner dimensions.

    Args:
        left: (S, I) with ``right`` (E, I, O): row s is multiplied with its group's matrix, giving (S, O). Or (I, S).
        right: With a left (I, S), (S, O): each group's product over its part of S, giving (E, I, O).
        ends_E: Where each group ends, int32; the last at S.
    """
    if _has_kernel(left) and _has_kernel(right):
        return nn.functional.grouped_mm(left, right, offs=ends_E)
    ends = ends_E.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if right.ndim == 3:
        return torch.cat([left[first:end] @ right[group] for group, (first, end) in enumerate(spans)])
    return torch.stack([left[:, first:end] @ right[first:end] for first, end in spans])


def _has_kernel(matrix: Tensor) -> bool:
    """Whether torch's grouped product takes it: no float64, and nothing that begins in the middle of 16 bytes."""
    strides = [stride for stride in matrix.stride()[-2:] if stride != 1]
    aligned = all(stride * matrix.element_size() % ALIGNMENT_BYTES == 0 for stride in strides)
    return aligned and matrix.dtype in {torch.float32, torch.bfloat16, torch.float16}
