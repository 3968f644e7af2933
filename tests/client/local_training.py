"""Rounds of local training at tiny size, in few words."""

import gc

import numpy as np
import torch

from client.text import TokenSequence
from client.training import train
from conf.schema import OptimizerState, TrainConfig

BETA_1 = 0.9


def eight_sequences():
    """Eight sequences of 6 to 16 tokens, the latter half of each the response."""
    generator = np.random.default_rng(0)
    made = []
    for length in generator.integers(6, 17, 8).tolist():
        input_ids = generator.integers(0, 256, length).tolist()
        made.append(TokenSequence(input_ids, [-100] * (length // 2) + input_ids[length // 2 :], [length]))
    return made


def noisy(adapter, seed=0, deviation=0.1):
    """The adapter with noise on it, so that no LoRA B is zero."""
    generator = np.random.default_rng(seed)
    return {name: (a + generator.normal(0, deviation, a.shape)).astype(np.float32) for name, a in adapter.items()}


def run(adapted, sequences, start, *, anchor=None, optimizer=None, generator=None, rule=None, **settings):
    """A round in batches of three at a learning rate of 0.01, unless ``settings`` say otherwise."""
    config = TrainConfig(**{"learning_rate": 1e-2, "batch_size": 3, **settings})
    generator = generator or np.random.default_rng(0)
    anchor, optimizer = anchor or {}, optimizer or {}
    return train(
        adapted,
        sequences,
        start=start,
        anchor=anchor,
        optimizer=optimizer,
        config=config,
        generator=generator,
        rule=rule,
    )


def gradient(adapted, sequences, start, **settings):
    """Gradient of the first step: Adam's first moment is then (1 - beta_1) times it."""
    settings = {"max_steps": 1, "max_grad_norm": 1e9, "optimizer_state": OptimizerState.keep, **settings}
    moments = run(adapted, sequences, start, **settings).optimizer
    return {name: moments[f"exp_avg/{name}"] / (1 - BETA_1) for name in start}


def distance(left, right):
    """Euclidean, over all arrays of ``left``."""
    return np.sqrt(sum(np.sum((left[name] - right[name]) ** 2) for name in left))


def length(arrays):
    """Euclidean, over all arrays."""
    return distance(arrays, dict.fromkeys(arrays, 0))


def live_tensor_bytes():
    """Bytes of all tensors that this process holds."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _live_tensors()}
    return sum(storages.values())


def live_copies(weight):
    """In how many places this process holds the values of ``weight``, its own included."""
    alike = (held for held in _live_tensors() if held.shape == weight.shape and held.dtype == weight.dtype)
    return len({held.untyped_storage()._cdata for held in alike if torch.equal(held, weight)})


def _live_tensors():
    gc.collect()
    return [held for held in gc.get_objects() if issubclass(type(held), torch.Tensor)]
