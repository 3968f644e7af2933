"""How much memory local training takes, found out before a round: by passes over one sequence, not by a formula.

What a step needs beside the base model and the adapter are the adapter's gradients and moments, and what a forward
and backward pass makes: activations kept for the backward pass, logits, temporary tensors, layers computed again.
The latter are counted as they are made and freed, so they are those of this model, dtype and way of running experts.
Where a step begins with sampling, the KV cache of all its sequences is counted likewise.
"""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import psutil
import torch

from client.cgroups import free_of_cgroups
from client.live_bytes import sampling_peak_bytes, step_peak_bytes, storage_bytes
from client.model import AdaptedModel
from client.text import IGNORED_LABEL, TokenSequence
from conf.schema import TrainConfig

AUTO = "auto"
"""``train.micro_batch``: as many sequences at a time as fit."""

_processes = 1
"""How many take from this machine's memory alike: see ``divide_among``."""
SMALLER = "train.gradient_checkpointing=true, a smaller data.max_length or model.dtype=bfloat16"
"""What makes a step take less."""
_CUDA_HEADROOM = 1.1
"""What is counted is taken this many times: for the kernels' own buffers and gaps between tensors."""
_CPU_HEADROOM = 2.4
_CPU_CHECKPOINTING_HEADROOM = 3.8
"""glibc's heap keeps gaps as large as the tensors: the resident set was measured to grow by 1.7 to 2.3 times the
tensors of a step (Llama and OLMoE of width 128, 16 and 64 sequences of 256 tokens), with checkpointing by 2.7 to 3.7
times. Without gaps (MALLOC_MMAP_THRESHOLD_=131072) it was 1.0, and a step took two to four times as long."""


@dataclass(frozen=True)
class Passes:
    """What the forward passes go over when a site trains."""

    sequences: Sequence[TokenSequence]
    per_example: int = 1
    """How many of them come of one training example."""
    kept_gradients: int = 0
    """How many gradients of the whole adapter a step holds beside the one that it goes along."""
    are_sampled: bool = False
    """Whether the model writes a step's sequences itself first, all at a time."""

    def of_step(self, batch_size: int) -> int:
        """How many sequences an optimiser step goes over."""
        return min(batch_size * self.per_example, len(self.sequences))


@dataclass(frozen=True)
class Shape:
    """The largest sequence of a site, as far as memory is concerned."""

    num_tokens: int
    num_targets: int
    """Tokens with a loss: their logits are widened to float32."""
    packed: bool

    @classmethod
    def of(cls, sequences: Iterable[TokenSequence]) -> Shape:
        """The least shape that no sequence exceeds."""
        shapes = [(len(sequence.input_ids), sequence.num_targets, len(sequence.lengths) > 1) for sequence in sequences]
        tokens, targets, packed = zip(*shapes, strict=True)
        return cls(max(tokens), max(targets), any(packed))

    def sequence(self) -> TokenSequence:
        """A sequence of this shape, of whatever tokens."""
        num_prompt = self.num_tokens - self.num_targets
        labels = [IGNORED_LABEL] * num_prompt + [0] * self.num_targets
        half = self.num_tokens // 2
        return TokenSequence([0] * self.num_tokens, labels, [half, self.num_tokens - half][not self.packed :])


class TrainingMemory:
    """Bytes that training takes on the model's device, with sequences of one shape."""

    def __init__(self, adapted: AdaptedModel, shape: Shape, *, gradient_checkpointing: bool) -> None:
        # Weakly, since what is known of a model lasts as long as the model.
        self._adapted = weakref.ref(adapted)
        self._shape = shape
        trained = adapted.parameters_by_name().values()
        base = adapted.base.model
        self.base_bytes = storage_bytes([*base.parameters(), *base.buffers()])
        self.adapter_bytes = storage_bytes(trained)
        checkpointing_headroom = _CPU_CHECKPOINTING_HEADROOM if gradient_checkpointing else _CPU_HEADROOM
        on_gpu = adapted.device.type == "cuda"
        self.optimizer_bytes = 3 * self.adapter_bytes
        """A gradient and Adam's two moments of every trained value."""
        step = partial(step_peak_bytes, gradient_checkpointing=gradient_checkpointing)
        self._step = _Growth(partial(self._measured, step), _CUDA_HEADROOM if on_gpu else checkpointing_headroom)
        self._sampling = _Growth(
            partial(self._measured, sampling_peak_bytes), _CUDA_HEADROOM if on_gpu else _CPU_HEADROOM
        )

    def activation_bytes(self, num_sequences: int) -> int:
        """What a forward and backward pass over so many sequences takes at its highest point."""
        return self._step.of(num_sequences)

    def sampling_bytes(self, num_sequences: int) -> int:
        """What writing so many sequences at a time takes at its highest point: the KV cache, and a layer at work."""
        return self._sampling.of(num_sequences)

    def total_bytes(self, num_sequences: int) -> int:
        """Everything that training takes, base model and adapter included."""
        present = self.base_bytes + self.adapter_bytes
        return present + self.optimizer_bytes + self.activation_bytes(num_sequences)

    def at_most(self, num_sequences: int) -> int:
        """More than gradients, moments and activations take: nothing grows faster than in proportion.

        Often that is proof enough, and saves the pass over two sequences.
        """
        return self.optimizer_bytes + self._step.at_most(num_sequences)

    def fits(self, num_sequences: int, free_bytes: int) -> bool:
        """Whether gradients, moments and activations fit into ``free_bytes``."""
        if self.at_most(num_sequences) <= free_bytes:
            return True
        return self.optimizer_bytes + self.activation_bytes(num_sequences) <= free_bytes

    def largest_fit(self, num_sequences: int, free_bytes: int) -> int:
        """As many sequences, at most ``num_sequences``, as fit into ``free_bytes``; 0 if not even one does."""
        return next((count for count in range(num_sequences, 0, -1) if self.fits(count, free_bytes)), 0)

    def describe(self, num_sequences: int) -> str:
        """What ``num_sequences`` at a time need, in words and numbers."""
        optimizer, activations = self.optimizer_bytes, self.activation_bytes(num_sequences)
        return (
            f"training needs {amount(optimizer + activations)} beside {self._present()}: {amount(optimizer)} for "
            f"gradients and moments, {amount(activations)} for activations of {num_sequences} x "
            f"{self._shape.num_tokens} tokens"
        )

    def describe_sampling(self, num_sequences: int) -> str:
        """What writing ``num_sequences`` at a time needs, in words and numbers."""
        optimizer, sampling = self.optimizer_bytes, self.sampling_bytes(num_sequences)
        return (
            f"sampling needs {amount(optimizer + sampling)} beside {self._present()}: {amount(optimizer)} for "
            f"gradients and moments, {amount(sampling)} for {num_sequences} x {self._shape.num_tokens} tokens at a time"
        )

    def _present(self) -> str:
        return f"base model ({amount(self.base_bytes)}) and adapter ({amount(self.adapter_bytes)})"

    def _measured(self, peak_bytes: Callable[[AdaptedModel, Sequence[TokenSequence]], int], num_sequences: int) -> int:
        adapted = self._adapted()
        assert adapted is not None
        try:
            return peak_bytes(adapted, [self._shape.sequence()] * num_sequences)
        except torch.OutOfMemoryError:
            # Raised anew: a library's words may quote data, and its tensors end with its traceback.
            pass
        raise _NoRoomError(
            f"not even {num_sequences} x {self._shape.num_tokens} tokens can be trained on beside {self._present()}: "
            f"{amount(free_bytes(adapted.device))} are free on {adapted.device}: set {SMALLER}"
        )


class _NoRoomError(ValueError):
    """Measuring itself found no room."""


class _Growth:
    """Bytes at the highest point of a computation over so many sequences, from those over one and over two."""

    def __init__(self, measured: Callable[[int], int], headroom: float) -> None:
        self._measured = measured
        self._headroom = headroom

    def of(self, num_sequences: int) -> int:
        """With what is taken beside what is counted."""
        return int(self._headroom * (self._one + (num_sequences - 1) * self._another))

    def at_most(self, num_sequences: int) -> int:
        """No less than ``of``, without the measurement over two sequences."""
        return math.ceil(num_sequences * self._headroom * self._one)

    @cached_property
    def _one(self) -> int:
        return self._measured(1)

    @cached_property
    def _another(self) -> int:
        """What each further sequence adds; as much as the first, which is the most, where there is no room to tell."""
        try:
            return max(0, self._measured(2) - self._one)
        except _NoRoomError:
            return self._one


_measured: weakref.WeakKeyDictionary[AdaptedModel, dict[tuple[Shape, bool], TrainingMemory]] = (
    weakref.WeakKeyDictionary()
)


def training_memory(adapted: AdaptedModel, sequences: Sequence[TokenSequence], config: TrainConfig) -> TrainingMemory:
    """The memory that training on ``sequences`` takes; measured once a process for each shape of them.

    Overwrites no adapter, but leaves no gradient either, and draws from torch's generator where the model has dropout.
    """
    shape = Shape.of(sequences)
    known = _measured.setdefault(adapted, {})
    key = (shape, config.gradient_checkpointing)
    if key not in known:
        known[key] = TrainingMemory(adapted, shape, gradient_checkpointing=config.gradient_checkpointing)
    return known[key]


def choose_micro_batch(adapted: AdaptedModel, passes: Passes, config: TrainConfig, free: int | None = None) -> int:
    """Sequences of a forward and backward pass: ``train.micro_batch``, or with ``auto`` as many as fit.

    Args:
        adapted: The model; see ``training_memory``.
        passes: What it will be trained on.
        config: The settings under ``train.``.
        free: Bytes that training may take; None: all that the model's device has.

    Raises:
        ValueError: If they do not fit; the message has the numbers and what to set.
    """
    wanted = passes.of_step(config.batch_size)
    if isinstance(config.micro_batch, int):
        wanted = min(wanted, config.micro_batch)
    memory = training_memory(adapted, passes.sequences, config)
    kept = passes.kept_gradients * memory.adapter_bytes
    sampled = passes.of_step(config.batch_size) if passes.are_sampled else 0
    sampling = memory.optimizer_bytes + memory.sampling_bytes(sampled) if sampled else 0
    if free is None:
        free = free_bytes(adapted.device, enough=max(memory.at_most(wanted) + kept, sampling))
    if sampling > free:
        raise ValueError(
            f"{memory.describe_sampling(sampled)}; {amount(free)} are free on {adapted.device}: set a smaller "
            "train.batch_size, method.group_size or data.max_length, or model.dtype=bfloat16"
        )
    if memory.fits(wanted, free - kept):
        return wanted
    fitting = memory.largest_fit(wanted, free - kept)
    if fitting and config.micro_batch == AUTO:
        return fitting
    advice = f"train.micro_batch={fitting} (or auto)" if fitting else SMALLER
    needed = memory.describe(wanted) + (f", and {amount(kept)} for the objectives' gradients" if kept else "")
    raise ValueError(f"{needed}; {amount(free)} are free on {adapted.device}: set {advice}")


def free_bytes(device: torch.device, enough: float = math.inf) -> int:
    """Memory that this process can still take: of the machine or container, or of the GPU and the process's share.

    On a CPU, glibc gives back what earlier rounds freed only if there is not ``enough`` without: it takes its time.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        share = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return min(free + held - used, share - used)
    found = _free_of_machine(enough)
    if found < enough and sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        found = _free_of_machine(enough)
    return found


def _free_of_machine(enough: float) -> int:
    """Bytes; what is shared with other processes is looked up, in 20 ms, only where not ``enough`` is left without."""
    machine = psutil.virtual_memory()
    free = min(machine.available, free_of_cgroups())
    if _processes > 1:
        process, share = psutil.Process(), machine.total / _processes
        held = process.memory_info().rss
        if share - held < enough:  # libraries are in memory once for all of them, so what is shared does not count
            held = process.memory_full_info().uss
        free = min(free, share - held)
    return max(0, int(free))


def divide_among(processes: int) -> None:
    """From now on this process keeps to one part of so many of the machine's memory; a GPU's is torch's affair."""
    global _processes  # noqa: PLW0603 - of the whole process, as the memory is
    _processes = processes


def amount(num_bytes: float) -> str:
    """Memory for people."""
    mebibytes = num_bytes / 2**20
    return f"{mebibytes:.1f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"
