"""The block of frozen experts against loops over tokens, and against numerical gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from client.grouped_lora import ExpertBlock, Pairs, Projection, expert_block, grouped_linear, grouped_mm

E, N, K, D, F, R = 5, 9, 2, 8, 12, 4
SCALE = 0.5


def gated(opened: Tensor) -> Tensor:
    gate, up = opened.chunk(2, dim=-1)
    return silu(gate) * up


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) / 2).to(dtype)


def choices(num_used: int = E - 1) -> Tensor:
    """Experts of each token; the last expert is never chosen."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(num_used, generator=generator)[:K] for _ in range(N)])


def problem(*, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], ExpertBlock, Tensor]:
    """Differentiable inputs (tokens, routing weights, A and B of both projections), the rest, and the choice."""
    shapes = [(N, D), (N, K), (E, R, D), (E, 2 * F, R), (E, R, F), (E, D, R)]
    inputs = [random(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
    up_bias, down_bias = (random(E, 2 * F, dtype=dtype), random(E, D, dtype=dtype)) if bias else (None, None)
    up = Projection(random(E, 2 * F, D, dtype=dtype), up_bias, SCALE)
    down = Projection(random(E, F, D, dtype=dtype), down_bias, SCALE, is_transposed=True)
    chosen = choices()
    return inputs, ExpertBlock(up, down, gated, Pairs.of(chosen, E)), chosen


def blocked(inputs: list[Tensor], block: ExpertBlock) -> Tensor:
    hidden, weights, up_a, up_b, down_a, down_b = inputs
    return expert_block(hidden, weights, (up_a, up_b), (down_a, down_b), block)


def naive(inputs: list[Tensor], block: ExpertBlock, chosen: Tensor) -> Tensor:
    """Token by token, expert by expert, with every expert's changed weight formed in full."""
    hidden, weights, up_a, up_b, down_a, down_b = inputs
    outputs = []
    for token in range(N):
        total = torch.zeros(D, dtype=hidden.dtype)
        for place in range(K):
            expert = int(chosen[token, place])
            up = block.up.weight[expert] + SCALE * up_b[expert] @ up_a[expert]
            down = block.down.weight[expert].T + SCALE * down_b[expert] @ down_a[expert]
            opened = up @ hidden[token]
            if block.up.bias_EO is not None:
                opened = opened + block.up.bias_EO[expert]
            output = down @ gated(opened)
            if block.down.bias_EO is not None:
                output = output + block.down.bias_EO[expert]
            total = total + weights[token, place] * output
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("bias", [False, True])
def test_block_is_the_weighted_sum_of_its_experts(bias: bool) -> None:
    inputs, block, chosen = problem(bias=bias)
    ours, theirs = blocked(inputs, block), naive(inputs, block, chosen)
    torch.testing.assert_close(ours, theirs)
    direction = random(N, D, seed=9)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_numerical_ones(bias: bool) -> None:
    inputs, block, _ = problem(bias=bias)
    assert torch.autograd.gradcheck(lambda *tensors: blocked(list(tensors), block), inputs)


def test_without_factors_the_block_is_the_frozen_one() -> None:
    inputs, block, chosen = problem(bias=True)
    hidden, weights = inputs[:2]
    zeros = [torch.zeros_like(factor) for factor in inputs[2:]]
    frozen = expert_block(hidden, weights, None, None, block)
    torch.testing.assert_close(frozen, naive([hidden, weights, *zeros], block, chosen))
    frozen.sum().backward()
    assert hidden.grad is not None


def test_expert_that_nobody_chose_gets_no_gradient() -> None:
    inputs, block, _ = problem(bias=False, dtype=torch.float32)
    blocked(inputs, block).sum().backward()
    for factor in inputs[2:]:
        assert factor.grad is not None
        assert not factor.grad[E - 1].any()
        assert factor.grad[: E - 1].flatten(1).any(dim=1).all()


def test_order_of_tokens_does_not_matter() -> None:
    inputs, block, chosen = problem(bias=True)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(3))
    shuffled = ExpertBlock(block.up, block.down, block.gate, Pairs.of(chosen[order], E))
    moved = blocked([inputs[0][order], inputs[1][order], *inputs[2:]], shuffled)
    torch.testing.assert_close(moved, blocked(inputs, block)[order])


def test_pairs_by_hand() -> None:
    """Three tokens choose experts (1, 0), (1, 2), (0, 1) of four: two pairs for 0, three for 1, one for 2."""
    pairs = Pairs.of(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4)
    assert pairs.expert_S.tolist() == [0, 0, 1, 1, 1, 2]
    assert pairs.token_S.tolist() == [0, 2, 0, 1, 2, 1]
    assert pairs.tokens_per_expert().tolist() == [2, 3, 1, 0]
    assert pairs.scatter_sum(torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [32.0]])).tolist() == [[5], [40], [18]]


def test_products_without_a_kernel_are_those_with_one() -> None:
    """torch's own takes no float64, and no row of three float32 numbers."""
    pairs = Pairs.of(choices(), E)
    rows, matrices = random(N * K, D), random(E, D, 12)
    kernel = grouped_mm(rows.float(), matrices.float(), pairs.ends_E)
    torch.testing.assert_close(grouped_mm(rows, matrices, pairs.ends_E).float(), kernel)
    kernel = grouped_mm(rows.float().t(), kernel, pairs.ends_E)
    exact = grouped_mm(rows, matrices, pairs.ends_E)
    torch.testing.assert_close(grouped_mm(rows.t(), exact, pairs.ends_E).float(), kernel)
    odd = grouped_mm(rows.float(), matrices[:, :, :3].float(), pairs.ends_E)
    torch.testing.assert_close(odd, exact[:, :3].float())


def test_trainable_weights_get_autograds_own_gradient() -> None:
    inputs, block, chosen = problem(bias=False)
    weight = block.up.weight.clone().requires_grad_()
    pairs = block.pairs
    rows = inputs[0].detach()[pairs.token_S]
    grouped_linear(rows, Projection(weight), None, pairs).sum().backward()
    for expert in range(E):
        tokens = (chosen == expert).any(dim=1)
        expected = inputs[0].detach()[tokens].sum(dim=0)[:, None].expand(D, 2 * F)
        torch.testing.assert_close(weight.grad[expert], expected.T)
