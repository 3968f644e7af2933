"""Gradients of several objectives on one set of parameters: kept apart, compared by a Gram matrix, combined.

Shape suffixes: M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class ObjectiveGradients:
    """M gradients on the same parameters, summed over the passes of a step."""

    def __init__(self, parameters: Sequence[nn.Parameter], num_objectives: int) -> None:
        """Start from zero."""
        self._parameters = list(parameters)
        self._sums = [[torch.zeros_like(parameter) for parameter in self._parameters] for _ in range(num_objectives)]

    def add(self, losses_M: Tensor, loss_scale: float = 1.0) -> None:
        """Add each loss's gradient: M backward passes through the one graph that all losses share.

        ``loss_scale`` is what half precision needs on the way; the sums are without it.
        """
        last = len(losses_M) - 1
        for objective, loss in enumerate(losses_M.unbind()):
            scaled = loss * loss_scale
            found = torch.autograd.grad(
                scaled, self._parameters, retain_graph=objective < last, allow_unused=True, materialize_grads=False
            )
            for total, gradient in zip(self._sums[objective], found, strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=1 / loss_scale)

    def gram(self) -> NDArray[np.float64]:
        """(M, M) inner products, summed over parameters in float64."""
        num_objectives = len(self._sums)
        gram = np.zeros((num_objectives, num_objectives))
        for row in range(num_objectives):
            for column in range(row + 1):
                pairs = zip(self._sums[row], self._sums[column], strict=True)
                products = [torch.dot(left.flatten(), right.flatten()).double() for left, right in pairs]
                gram[row, column] = gram[column, row] = torch.stack(products).sum().item()
        return gram

    def combined(self, weights_M: NDArray[np.floating]) -> list[Tensor]:
        """The sum of the gradients, each times its weight: a tensor for each parameter."""
        columns = zip(*self._sums, strict=True)
        return [
            torch.stack([float(weight) * one for weight, one in zip(weights_M, column, strict=True)]).sum(dim=0)
            for column in columns
        ]

    def combine(self, weights_M: NDArray[np.floating], loss_scale: float = 1.0) -> None:
        """Add the gradients, each times its weight and ``loss_scale``, to those that the parameters hold."""
        for parameter, total in zip(self._parameters, self.combined(loss_scale * weights_M), strict=True):
            parameter.grad = total if parameter.grad is None else parameter.grad + total
