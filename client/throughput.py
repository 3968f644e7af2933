"""What a site's round made of its machine: tokens a second, peak memory, and the share of the matrix units' speed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from client.model import AdaptedModel
from client.text import TokenSequence
from strategies.adapters import Arrays

_LARGEST_PRODUCT = {"cpu": 2048, "cuda": 8192}
_LONG_ENOUGH_SECONDS = 0.01


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Measured over the steps of one round."""

    tokens_per_second: float
    """Prompt and response tokens trained on, padding left out."""
    peak_memory_bytes: int
    """See ``peak_memory_bytes``."""
    flop_utilization: float
    """``training_flops`` a second over the speed of a large matrix product in the model's dtype, measured here: the
    model FLOPs utilization of PaLM (https://arxiv.org/abs/2204.02311, Appendix B), against a speed that was reached."""


@dataclass(frozen=True)
class Lengths:
    """What of the sequences trained on tells how much there is to compute."""

    num_tokens: int = 0
    """Prompt and response, padding left out."""
    num_targets: int = 0
    """Tokens with a loss: only they need logits."""
    squared: int = 0
    """Sum over the examples of their length squared."""

    def plus(self, sequence: TokenSequence) -> Lengths:
        """With one sequence more."""
        return Lengths(
            self.num_tokens + len(sequence.input_ids),
            self.num_targets + sequence.num_targets,
            self.squared + sum(length**2 for length in sequence.lengths),
        )


_training_began: float | None = None


def training_began() -> float | None:
    """When the first step of this process's latest training began, Unix time in seconds; None before any."""
    return _training_began


class ThroughputMeter:
    """Counts what is trained on from its making on, which is where the first step begins."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._lengths = Lengths()
        self._peak_flops = matmul_flops_per_second(
            adapted.device.type, adapted.base.model.dtype, torch.get_num_threads()
        )
        _forget_peak_memory(adapted.device)
        self._started = time.perf_counter()
        global _training_began  # noqa: PLW0603
        _training_began = time.time()

    def add(self, sequences: Iterable[TokenSequence]) -> None:
        """Note sequences that are trained on."""
        for sequence in sequences:
            self._lengths = self._lengths.plus(sequence)

    def seconds(self) -> float:
        """Wall time since it was made."""
        return time.perf_counter() - self._started

    def result(self, expert_tokens: Arrays) -> Throughput:
        """What was reached.

        Args:
            expert_tokens: MoE layer -> (num_experts,) tokens routed to each since the meter was made.
        """
        _wait_for(self._adapted.device)
        seconds = self.seconds()
        routed = {layer: float(tokens_E.sum()) for layer, tokens_E in expert_tokens.items()}
        flops = training_flops(self._adapted, self._lengths, routed)
        return Throughput(
            tokens_per_second=self._lengths.num_tokens / seconds,
            peak_memory_bytes=peak_memory_bytes(self._adapted.device),
            flop_utilization=flops / seconds / self._peak_flops,
        )


def training_flops(adapted: AdaptedModel, lengths: Lengths, routed_tokens: Mapping[str, float]) -> float:
    """Floating-point operations that training on these tokens takes, however it is computed.

    A weight costs 2 a token forward and 2 for the gradient of its input; a trained one 2 more for its own gradient.
    Experts cost as much for each token routed to them, the output layer for each token with a loss. Attention costs
    4 H Q a layer and pair of tokens of an example forward and twice that backward (H heads of size Q; PaLM, Appendix B,
    which does not halve it for the causal mask either). Left out: norms and activations, the lookup of embeddings,
    layers computed again for checkpointing.

    Args:
        adapted: The model.
        lengths: Of the sequences.
        routed_tokens: MoE layer -> tokens routed to its experts, each as often as it has experts.
    """
    trained = adapted.parameters_by_name()
    frozen = {name: weight for name, weight in matrix_weights(adapted.base.model).items() if name not in trained}
    head: Any = adapted.base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    flops = 0.0
    for cost, weights in ((4, frozen), (6, trained)):
        for name, weight in weights.items():
            layer = name.partition(".experts.")[0]
            if layer != name and layer in routed_tokens:
                flops += cost * weight.numel() / adapted.layers[layer] * routed_tokens[layer]
            else:
                flops += cost * weight.numel() * (lengths.num_targets if weight is head.weight else lengths.num_tokens)
    return flops + 12 * _attention_width(adapted.base.model.config) * lengths.squared


def matrix_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that tokens are multiplied with, by name: all matrices but embeddings that are only looked up."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables -= {id(head.weight)}
    return {name: weight for name, weight in model.named_parameters() if weight.ndim >= 2 and id(weight) not in tables}


def _attention_width(config: Any) -> int:
    """Layers times heads times head size."""
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_hidden_layers * text.num_attention_heads * head_size)


@cache
def matmul_flops_per_second(device_type: str, dtype: torch.dtype, num_threads: int) -> float:  # noqa: ARG001
    """The best speed of square matrix products here, measured once a process, and with whatever else runs.

    Sizes are doubled until a product takes 10 ms. No random number is drawn.
    """
    device, best = torch.device(device_type), 0.0
    size = 256
    while size <= _LARGEST_PRODUCT[device_type]:
        matrix = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        seconds = min(_product_seconds(matrix) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LONG_ENOUGH_SECONDS:
            break
        size *= 2
    return best


def _product_seconds(matrix: torch.Tensor) -> float:
    _wait_for(matrix.device)
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    _wait_for(matrix.device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use since ``_forget_peak_memory``, base model included.

    On a GPU that of tensors. On a CPU the largest resident set of the process, so libraries and what the heap keeps
    for later are in it; 0 where the system does not tell (it does on Linux, in /proc/self/status).
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def _forget_peak_memory(device: torch.device) -> None:
    """Make the peak what is in use now; on a CPU whose kernel refuses, it stays that of the process's life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
