"""Optimisers on the server: momentum, Adam, Adagrad and Yogi steps along the mean update.

The state is one array per moment and adapter array, called ``momentum/<name>`` and ``square/<name>``, in
float32; each step is computed in float64.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy, require
from strategies.experts import is_expert_array
from strategies.fedavg import mean_by_examples


@dataclass(kw_only=True)
class FedAvgM(Strategy):
    """FedAvg with momentum on the server: ``v <- momentum v + mean update``, then a step of ``learning_rate v``.

    Hsu et al., 2019, Section 4.3. https://arxiv.org/abs/1909.06335

    The paper fixes the server's step at 1, so that a steady update is taken 1 / (1 - momentum) times as far, and
    tunes the sites' learning rate to it. Here the step is a setting, and the defaults take a steady update at its
    full length within a few rounds: sites fine-tune with a rate chosen for FedAvg, and LoRA runs are short. Experts,
    which the paper does not have, may take another step than the rest.
    """

    name: ClassVar[str] = "fedavgm"

    learning_rate: float = 0.5
    """Server step on the momentum; 1 - momentum keeps FedAvg's length, 1 is the paper's."""
    momentum: float = 0.5
    """Decay of past updates, in [0, 1); 0 with learning_rate=1 is FedAvg."""
    expert_step: float = 1.0
    """Server step on experts, in steps of ``learning_rate``."""

    def __post_init__(self) -> None:
        _require_positive("strategy.learning_rate", self.learning_rate)
        require(0 <= self.momentum < 1, "strategy.momentum", "in [0, 1)", self.momentum)
        _require_positive("strategy.expert_step", self.expert_step)

    def init_state(self, adapter: Arrays) -> Arrays:
        """Momentum 0."""
        return {f"momentum/{name}": np.zeros(array.shape, np.float32) for name, array in adapter.items()}

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """One step of momentum along the mean update."""
        mean = mean_by_examples(updates)
        stepped, remembered = {}, {}
        for name, before in adapter.items():
            momentum = self.momentum * _wide(state[f"momentum/{name}"]) + (_wide(mean[name]) - before)
            step = self.learning_rate * (self.expert_step if is_expert_array(name) else 1.0)
            stepped[name] = (before + step * momentum).astype(np.float32)
            remembered[f"momentum/{name}"] = momentum.astype(np.float32)
        return Aggregation(adapter=stepped, state=remembered)


@dataclass(kw_only=True)
class _Adaptive(Strategy):
    """Algorithm 2 of Reddi et al., 2021 (https://arxiv.org/abs/2003.00295); a subclass says how v grows.

    With D the mean update, ``m <- beta1 m + (1 - beta1) D``, ``v`` by the subclass, then
    ``x <- x + learning_rate m / (sqrt(v) + tau)``. As in the paper there is no bias correction: v starts at
    its lower bound tau^2 instead of 0, so the first steps are damped rather than of unit size. Where the paper
    leaves the weights of D open, sites are weighted by examples.

    Defaults for LoRA: a coordinate moves by about ``learning_rate`` a round at most (up to twice that while v lags
    behind m). Tens of local Adam steps at 1e-3 move a factor's entries by a few 1e-3, which a server rate of 1e-2
    reaches within a few rounds; tau, 1e-3 in the paper as well, lies below such updates, so that they are
    normalised, and above noise.
    """

    learning_rate: float = 1e-2
    """Server step size eta: about how far a coordinate moves in a round, at most."""
    beta1: float = 0.9
    """Decay of the mean update, in [0, 1)."""
    tau: float = 1e-3
    """Degree of adaptivity: updates far below it are averaged, those far above are normalised."""

    def __post_init__(self) -> None:
        _require_positive("strategy.learning_rate", self.learning_rate)
        require(0 <= self.beta1 < 1, "strategy.beta1", "in [0, 1)", self.beta1)
        _require_positive("strategy.tau", self.tau)

    @abstractmethod
    def _grown(self, square: NDArray[np.float64], delta_squared: NDArray[np.float64]) -> NDArray[np.float64]:
        """The next v from the last one and the squared mean update."""

    def init_state(self, adapter: Arrays) -> Arrays:
        """Momentum 0 and v = tau^2."""
        momentum = {f"momentum/{name}": np.zeros(array.shape, np.float32) for name, array in adapter.items()}
        square = {f"square/{name}": np.full(array.shape, self.tau**2, np.float32) for name, array in adapter.items()}
        return momentum | square

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """One adaptive step along the mean update."""
        mean = mean_by_examples(updates)
        stepped, momenta, squares = {}, {}, {}
        for name, before in adapter.items():
            delta = _wide(mean[name]) - before
            momentum = self.beta1 * _wide(state[f"momentum/{name}"]) + (1 - self.beta1) * delta
            square = self._grown(_wide(state[f"square/{name}"]), delta**2)
            stepped[name] = (before + self.learning_rate * momentum / (np.sqrt(square) + self.tau)).astype(np.float32)
            momenta[f"momentum/{name}"] = momentum.astype(np.float32)
            squares[f"square/{name}"] = square.astype(np.float32)
        return Aggregation(adapter=stepped, state=momenta | squares)


@dataclass(kw_only=True)
class FedAdagrad(_Adaptive):
    """Steps shrink with all updates so far: ``v <- v + D^2``.

    Reddi et al., 2021, Algorithm 2, with beta1 = 0 as in its experiments. https://arxiv.org/abs/2003.00295
    """

    name: ClassVar[str] = "fedadagrad"

    beta1: float = 0.0
    """Decay of the mean update, in [0, 1)."""

    def _grown(self, square: NDArray[np.float64], delta_squared: NDArray[np.float64]) -> NDArray[np.float64]:
        return square + delta_squared


@dataclass(kw_only=True)
class FedAdam(_Adaptive):
    """Steps shrink with recent updates: ``v <- beta2 v + (1 - beta2) D^2``.

    Reddi et al., 2021, Algorithm 2. https://arxiv.org/abs/2003.00295
    """

    name: ClassVar[str] = "fedadam"

    beta2: float = 0.99
    """Decay of the mean square, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta2 < 1, "strategy.beta2", "in [0, 1)", self.beta2)

    def _grown(self, square: NDArray[np.float64], delta_squared: NDArray[np.float64]) -> NDArray[np.float64]:
        return self.beta2 * square + (1 - self.beta2) * delta_squared


@dataclass(kw_only=True)
class FedYogi(_Adaptive):
    """As FedAdam, but v forgets additively: ``v <- v - (1 - beta2) D^2 sign(v - D^2)``.

    Reddi et al., 2021, Algorithm 2. https://arxiv.org/abs/2003.00295
    """

    name: ClassVar[str] = "fedyogi"

    beta2: float = 0.99
    """One minus the rate at which v follows the squared update, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.beta2 < 1, "strategy.beta2", "in [0, 1)", self.beta2)

    def _grown(self, square: NDArray[np.float64], delta_squared: NDArray[np.float64]) -> NDArray[np.float64]:
        return square - (1 - self.beta2) * delta_squared * np.sign(square - delta_squared)


def _require_positive(key: str, value: float) -> None:
    require(0 < value < math.inf, key, "> 0", value)


def _wide(array: NDArray[np.floating]) -> NDArray[np.float64]:
    return array.astype(np.float64)
