"""What the model in use at a site costs a token, beside the base model with one adapter: both counted and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from client.evaluation.measured import RelativeCost
from client.text import TokenSequence

Evaluation = Callable[[Sequence[TokenSequence]], object]
"""A forward pass over sequences, whatever it returns."""

TURNS = 5
"""Passes of each of the two."""


def relative_cost(used: Evaluation, plain: Evaluation, sequences: Sequence[TokenSequence]) -> RelativeCost | None:
    """Cost of ``used`` over that of ``plain`` for the same sequences; both also load an adapter and sort the sequences.

    None if they take the same operations: a ratio of seconds would be noise. Operations do not depend on the machine;
    seconds are the ratio of the shortest of passes that take turns, since a busy machine only ever makes them longer.
    """
    flops = counted_flops(used, sequences) / counted_flops(plain, sequences)
    if flops == 1:
        return None
    used_seconds, plain_seconds = [], []
    for _ in range(TURNS):
        plain_seconds.append(_seconds(plain, sequences))
        used_seconds.append(_seconds(used, sequences))
    return RelativeCost(flops=flops, seconds=min(used_seconds) / min(plain_seconds))


def counted_flops(evaluation: Evaluation, sequences: Sequence[TokenSequence]) -> int:
    """Floating-point operations of all products of matrices and attentions in a pass, by torch's counter."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        evaluation(sequences)
    return int(counter.get_total_flops())


def _grouped_mm_flops(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    """Of rows (S, I), each times its group's matrix of (E, I, O)."""
    return 2 * left[0] * left[1] * right[2]


def _added_product_flops(total: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """Of (S, I) times (I, O), added in place."""
    return 2 * total[0] * left[1] * right[1]


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


_FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    torch.ops.aten.addmm_: _added_product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
"""Operations that torch's counter does not know."""


def _seconds(evaluation: Evaluation, sequences: Sequence[TokenSequence]) -> float:
    _synchronize()
    started = time.perf_counter()
    evaluation(sequences)
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
