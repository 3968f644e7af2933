"""Gradient checkpointing: less memory for activations, more computation (https://arxiv.org/abs/1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def checkpointed_layers(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """While the context lasts and the model trains, keep only the inputs of its layers and compute the rest twice.

    transformers' own switch would also make the embeddings' output require a gradient, which frozen models need under
    reentrant checkpointing only, and its name differs between versions.

    Raises:
        ValueError: If the model has no layer that can be checkpointed.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if enabled else []
    if enabled and not layers:
        raise ValueError(
            "train.gradient_checkpointing=true, but the model has no layer that transformers can checkpoint: set false"
        )
    recompute: Any = partial(checkpoint, use_reentrant=False)
    for layer in layers:
        layer._gradient_checkpointing_func = recompute
        layer.gradient_checkpointing = True
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = False
