"""How well an adapter predicts responses it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from client.model import AdaptedModel
from client.text import IGNORED_LABEL, TokenSequence, collate
from strategies.adapters import Arrays


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """Loss of one adapter on one set of held-out examples."""

    loss: float
    """Mean negative log-likelihood, nats per response token."""
    num_tokens: int
    """Response tokens, the weight of this loss in a mean over sites."""
    num_examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the method measured on them besides, such as mean rewards."""


def held_out_loss(
    adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], batch_size: int
) -> HeldOutLoss:
    """Loss of ``adapter`` on ``sequences``; up to rounding, their order and ``batch_size`` do not matter.

    ``adapter`` stays loaded: whoever computes next loads the adapter it means.

    Raises:
        ValueError: If there is no sequence, or ``adapter`` does not fit the model.
    """
    if not sequences:
        raise ValueError("no held-out sequences to evaluate on")
    total = sum(nll_of_each(adapted, adapter, sequences, batch_size))
    num_tokens = sum(sequence.num_targets for sequence in sequences)
    num_examples = sum(len(sequence.lengths) for sequence in sequences)
    return HeldOutLoss(loss=total / num_tokens, num_tokens=num_tokens, num_examples=num_examples)


def nll_of_each(
    adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], batch_size: int
) -> list[float]:
    """Negative log-likelihood of each sequence's response tokens, their sum in nats; as ``held_out_loss`` else.

    Raises:
        ValueError: If ``adapter`` does not fit the model.
    """
    adapted.load_adapter(adapter)
    adapted.model.eval()
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index].input_ids))
    found = [0.0] * len(sequences)
    with torch.no_grad():
        for first in range(0, len(by_length), batch_size):
            chosen = by_length[first : first + batch_size]
            batch = collate([sequences[index] for index in chosen], adapted.tokenizer.pad_token_id)
            logits, targets, counted = response_logits(adapted, batch)
            nll = functional.cross_entropy(logits.float(), targets, reduction="none")
            sums = [own.sum() for own in torch.split(nll, counted.sum(dim=1).tolist())]
            for index, value in zip(chosen, torch.stack(sums).tolist(), strict=True):
                found[index] = value
    return found


def response_nll(adapted: AdaptedModel, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Negative log-likelihood of a batch's response tokens: their sum in nats, float32, and their number.

    Args:
        adapted: The model, with an adapter loaded and its mode set.
        batch: What ``collate`` returned.
    """
    logits, targets, _ = response_logits(adapted, batch)
    return functional.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


def response_logits(
    adapted: AdaptedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (tokens, vocabulary) and ids (tokens,) of a batch's response tokens, and (batch, time - 1) where they are.

    Position t is true if token t + 1, which the model predicts there, is of the response. The output layer computes
    nothing elsewhere: with a large vocabulary the logits of prompts and padding are most of a step's memory.
    """
    targets = batch["labels"][:, 1:].to(adapted.device)
    counted = targets != IGNORED_LABEL
    inputs = {key: value.to(adapted.device) for key, value in batch.items() if key not in {"labels", "token_mask"}}
    dtype = adapted.base.model.dtype
    with (
        torch.autocast(adapted.device.type, dtype=dtype, enabled=dtype != torch.float32),
        output_layer_at(adapted, functional.pad(counted, (0, 1))),
    ):
        logits = adapted.model(**inputs, use_cache=False).logits
    return logits, targets[counted], counted


@contextmanager
def output_layer_at(adapted: AdaptedModel, chosen_BT: torch.Tensor) -> Iterator[None]:
    """Let the output layer see the chosen positions alone: logits are (tokens, vocabulary) then."""
    network: Any = adapted.model
    handle = network.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: inputs[0][chosen_BT])
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def reading_hidden_states(adapted: AdaptedModel) -> Iterator[list[torch.Tensor]]:
    """A list that takes what the output layer reads, (batch, time, width), of each forward pass in the context."""
    network: Any = adapted.model
    read: list[torch.Tensor] = []
    handle = network.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        handle.remove()
