"""Bytes alive while torch computes: counted as storages are made and freed, at the highest point of a computation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig

from client.checkpointing import checkpointed_layers
from client.evaluation.generation import generated
from client.evaluation.held_out import response_nll
from client.model import AdaptedModel
from client.text import TokenSequence, collate


def step_peak_bytes(adapted: AdaptedModel, sequences: Sequence[TokenSequence], *, gradient_checkpointing: bool) -> int:
    """Bytes alive at the highest point of a forward and backward pass, without parameters and their gradients."""
    parameters = list(adapted.parameters_by_name().values())
    was_training = adapted.model.training
    adapted.model.train()
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    known = [*adapted.model.parameters(), *adapted.model.buffers(), *gradients]
    try:
        with checkpointed_layers(adapted.model, enabled=gradient_checkpointing), LiveBytes(known) as live:
            nll, _ = response_nll(adapted, collate(sequences, adapted.tokenizer.pad_token_id))
            torch.autograd.backward(nll)
    finally:
        for parameter in parameters:
            parameter.grad = None
        adapted.model.train(was_training)
    peak: int = live.peak
    return peak


def sampling_peak_bytes(adapted: AdaptedModel, sequences: Sequence[TokenSequence]) -> int:
    """Bytes alive at the highest point of reading the sequences into a KV cache and writing one token more.

    That is no less than writing the last of their tokens one by one takes, and more the shorter the prompts are.
    """
    tokens_BT = torch.tensor([sequence.input_ids for sequence in sequences], device=adapted.device)
    batch = {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT)}
    known = [*adapted.model.parameters(), *adapted.model.buffers(), *batch.values()]
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=1, pad_token_id=adapted.tokenizer.pad_token_id
    )
    with adapted.evaluating(), LiveBytes(known) as live:
        generated(adapted, batch, config)
    peak: int = live.peak
    return peak


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all storages that torch's operations make while it lasts, and the most alive at a time."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in _plain(known)}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _plain(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._watched:
            return
        self._watched[key] = weakref.ref(storage, partial(self._freed, key, storage.nbytes()))
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)

    def _freed(self, key: int, num_bytes: int, _reference: object) -> None:
        del self._watched[key]
        self._now -= num_bytes


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of all the memory that these tensors hold, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in _plain(tensors)}
    return sum(storages.values())


def _plain(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The tensors that hold memory: of a quantised one, its integers and scales."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from _plain(getattr(tensor, name) for name in names)
        else:
            yield tensor
