"""What a contaminated site sends instead of its update. Attackers know what the benign sites send.

Each poison takes the received adapter, what the attacker would have sent, and what the benign sites send, as adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from strategies import experts
from strategies.adapters import Arrays, difference

Named = dict[str, NDArray[np.float32]]
Poison = Callable[[Arrays, Arrays, Sequence[Arrays], np.random.Generator], Named]


def moved(received: Arrays, own: Arrays, factor: float) -> Named:
    """``received + factor (own - received)``."""
    return {name: (before + factor * (own[name] - before)).astype(np.float32) for name, before in received.items()}


def sign_flip(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """The attacker's update backwards and four times as far (Li et al., 2019, https://arxiv.org/abs/1811.03761)."""
    return moved(received, own, -4.0)


def scaling(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """The attacker's update ten times as far (Bagdasaryan et al., 2020, https://arxiv.org/abs/1807.00459)."""
    return moved(received, own, 10.0)


def gaussian_noise(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """Noise of five times the root mean square of the attacker's update, array by array."""
    noisy = {}
    for name, before in received.items():
        size = 5 * float(np.sqrt(np.mean((own[name] - before) ** 2)))
        noisy[name] = (before + size * rng.normal(size=before.shape)).astype(np.float32)
    return noisy


def alie(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """A little is enough: mean - z std of the benign (Baruch et al., 2019, https://arxiv.org/abs/1902.06156).

    z = 0.84, about what the paper's rule gives for 9 attackers among 20 sites; fewer would have to stay closer.
    """
    z = NormalDist().inv_cdf(0.8)
    return {name: (mean - z * std).astype(np.float32) for name, (mean, std) in _moments(received, benign).items()}


def inner_product(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """The benign mean backwards, four times as far (Xie et al., 2020, https://arxiv.org/abs/1903.03936)."""
    means = {name: mean for name, (mean, _) in _moments(received, benign).items()}
    return moved(received, means, -4.0)


def min_max(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """As far along -std as keeps the largest distance to a benign update within the benign ones' own.

    Shejwalkar and Houmansadr, 2021 (NDSS).
    """
    flat = np.stack([_flat(arrays) for arrays in benign])
    mean, direction = flat.mean(axis=0), -flat.std(axis=0)
    longest = max(float(np.linalg.norm(one - other)) for one in flat for other in flat)
    low, high = 0.0, 20.0
    for _ in range(30):
        middle = (low + high) / 2
        reach = float(np.linalg.norm(flat - (mean + middle * direction), axis=1).max())
        low, high = (middle, high) if reach <= longest else (low, middle)
    return _unflat(mean + low * direction, received)


def router_poison(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """An honest update whose routers are twenty times the received ones, backwards."""
    poisoned = moved(received, own, 1.0)
    for name in received:
        if ".lora_" not in name:
            poisoned[name] = (-20 * received[name]).astype(np.float32)
    return poisoned


def one_expert(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """An honest update but for one expert of each layer, the one that moved farthest: backwards, ten times as far."""
    poisoned = moved(received, own, 1.0)
    for arrays in experts.by_layer(received).values():
        before = dict(arrays)
        lengths = experts.norms(difference({name: own[name] for name in before}, before))
        expert = int(lengths.argmax())
        for name, array in before.items():
            poisoned[name][expert] = array[expert] - 10 * (own[name][expert] - array[expert])
    return poisoned


def free_rider(received: Arrays, own: Arrays, benign: Sequence[Arrays], rng: np.random.Generator) -> Named:  # noqa: ARG001
    """What was received."""
    return moved(received, own, 0.0)


POISONS: Mapping[str, Poison] = {
    "sign flip": sign_flip,
    "scaling": scaling,
    "Gaussian noise": gaussian_noise,
    "ALIE": alie,
    "inner product": inner_product,
    "min-max": min_max,
    "router": router_poison,
    "one expert": one_expert,
    "free rider": free_rider,
}
"""Poisons of what is sent; label flips and backdoors poison the data."""


def _moments(received: Arrays, benign: Sequence[Arrays]) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    stacked = {name: np.stack([arrays[name] for arrays in benign]).astype(np.float64) for name in received}
    return {name: (arrays.mean(axis=0), arrays.std(axis=0)) for name, arrays in stacked.items()}


def _flat(arrays: Arrays) -> NDArray[np.float64]:
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)]).astype(np.float64)


def _unflat(vector: NDArray[np.float64], like: Arrays) -> Named:
    arrays, start = {}, 0
    for name in sorted(like):
        size = like[name].size
        arrays[name] = vector[start : start + size].reshape(like[name].shape).astype(np.float32)
        start += size
    return arrays
