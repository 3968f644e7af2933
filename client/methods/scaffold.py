"""SCAFFOLD at a site: gradients are corrected by the difference of two control variates, one of them the site's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.local_rule import LocalRule
from client.methods.base import Method
from client.model import AdaptedModel
from client.private import under
from strategies.adapters import Arrays, difference
from strategies.scaffold import CONTROL

_OWN = "scaffold/control/"


class Scaffold(Method):
    """SCAFFOLD's local half (Karimireddy et al. 2020, Algorithm 1, https://arxiv.org/abs/1910.06378).

    Each step takes g - c_i + c in place of the gradient g, with c the server's control variate and c_i the site's own,
    which is in its private store; then it is clipped and goes to AdamW.

    The new c_i is the mean of the round's gradients g, before correction and clipping. With plain SGD that
    is the paper's option II, (x - y_i) / (K lr) - c + c_i, to the letter. With AdamW a displacement over a learning
    rate has no longer the scale of a gradient, so option II as printed would add numbers of different units.
    Arrays that are not shared have no control variate.
    """

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Everything trained is sent."""
        return True

    def local_rule(self, adapted: AdaptedModel, broadcast: Arrays, private: Arrays) -> LocalRule:
        """The correction by this round's control variates.

        Raises:
            ValueError: If the server sent none.
        """
        server = under(CONTROL, broadcast)
        if not server:
            raise ValueError("method=scaffold needs the server's control variate, which strategy=scaffold sends")
        own = under(_OWN, private) or {name: np.zeros_like(array) for name, array in server.items()}
        return GradientCorrection(own, server, adapted)


class Layout(Protocol):
    """How arrays become tensors in the parameters' shapes, and back; ``AdaptedModel`` is one."""

    def from_canonical(self, name: str, array: NDArray[np.floating]) -> Tensor:
        """Float32, on the parameters' device."""

    def to_canonical(self, name: str, stored: Tensor) -> NDArray[np.float32]:
        """The inverse."""


class GradientCorrection(LocalRule):
    """Adds c - c_i to each step's gradients, and averages them as they were before."""

    def __init__(self, own: Arrays, server: Arrays, layout: Layout) -> None:
        self._own = own
        self._layout = layout
        self._correction = {name: layout.from_canonical(name, array) for name, array in difference(server, own).items()}
        self._sums = {name: torch.zeros_like(correction) for name, correction in self._correction.items()}
        self._num_steps = 0

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put g - c_i + c in place of g."""
        self._num_steps += 1
        for name, correction in self._correction.items():
            parameter = parameters[name]
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._sums[name] += parameter.grad
            parameter.grad += correction

    def to_send(self) -> Arrays:
        """The change of the site's control variate."""
        return {CONTROL + name: array for name, array in difference(self._control(), self._own).items()}

    def to_keep(self) -> Arrays:
        """The site's new control variate."""
        return {_OWN + name: array for name, array in self._control().items()}

    def _control(self) -> dict[str, NDArray[np.float32]]:
        return {name: self._layout.to_canonical(name, total / self._num_steps) for name, total in self._sums.items()}
