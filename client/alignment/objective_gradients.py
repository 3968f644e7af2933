"""Gradients of several objectives on one set of parameters: kept apart, compared by a Gram matrix, combined.

Shape suffixes: M objectives, P parts of a step's samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.alignment.min_norm import positive_part

_Gradients = list[list[Tensor]]
"""For each objective a tensor for each parameter."""


class ObjectiveGradients:
    """M gradients on the same parameters, summed over the passes of a step.

    With several parts each pass belongs to one, and the Gram matrix tells what the parts have in common.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], num_objectives: int, num_parts: int = 1) -> None:
        """Start from zero."""
        self._parameters = list(parameters)
        self._sums_P = [
            [[torch.zeros_like(parameter) for parameter in self._parameters] for _ in range(num_objectives)]
            for _ in range(num_parts)
        ]

    def add(self, losses_M: Tensor, loss_scale: float = 1.0, part: int = 0) -> None:
        """Add each loss's gradient to a part's: M backward passes through the one graph that all losses share.

        ``loss_scale`` is what half precision needs on the way; the sums are without it.
        """
        last = len(losses_M) - 1
        for objective, loss in enumerate(losses_M.unbind()):
            scaled = loss * loss_scale
            found = torch.autograd.grad(
                scaled, self._parameters, retain_graph=objective < last, allow_unused=True, materialize_grads=False
            )
            for total, gradient in zip(self._sums_P[part][objective], found, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=1 / loss_scale)

    def gram(self) -> NDArray[np.float64]:
        """(M, M) inner products of the gradients, summed over parameters in float64.

        A gradient of few samples is mostly noise, and so is its square. With P > 1 parts only products of different
        parts count, P / (P - 1) times: where parts are independent, an estimate without that bias of what the gradients
        without noise would give, up to a factor that all entries share ("double sampling": Chen et al. 2023, MoDo,
        https://arxiv.org/abs/2305.20057). It is not positive semidefinite by itself: what is below zero by chance is
        cut off (``positive_part``), and that, as all that is made of it, has a bias again.
        """
        num_parts = len(self._sums_P)
        if num_parts == 1:
            return _products(*self._sums_P, *self._sums_P)
        between = [_products(left, right) for left, right in itertools.permutations(self._sums_P, 2)]
        return positive_part(np.sum(between, axis=0) * (num_parts / (num_parts - 1)))

    def combined(self, weights_M: NDArray[np.floating]) -> list[Tensor]:
        """The sum of the gradients, each times its weight: a tensor for each parameter."""
        totals = [torch.zeros_like(parameter) for parameter in self._parameters]
        for part in self._sums_P:
            for weight, gradient in zip(weights_M, part, strict=True):
                for total, one in zip(totals, gradient, strict=True):
                    total.add_(one, alpha=float(weight))
        return totals

    def combine(self, weights_M: NDArray[np.floating], loss_scale: float = 1.0) -> None:
        """Add the gradients, each times its weight and ``loss_scale``, to those that the parameters hold."""
        for parameter, total in zip(self._parameters, self.combined(loss_scale * weights_M), strict=True):
            parameter.grad = total if parameter.grad is None else parameter.grad + total


def _products(left: _Gradients, right: _Gradients) -> NDArray[np.float64]:
    """(M, M) inner products."""
    return np.array([[_inner(one, other) for other in right] for one in left])


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    products = [torch.dot(one.flatten(), other.flatten()).double() for one, other in zip(left, right, strict=True)]
    return torch.stack(products).sum().item()
