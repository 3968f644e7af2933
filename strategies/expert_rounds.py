"""What rules that treat every expert apart have in common: ranges of experts, all other arrays, the diagnostics.

Shapes: C sites, E experts of one range of a layer's experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from strategies import experts
from strategies.adapters import Arrays, weighted_mean
from strategies.base import ClientUpdate

_VALUES_AT_A_TIME = 2**22
"""Of all sites' arrays, in a range of experts: some tens of MiB for each thread."""
_THREADS = min(os.cpu_count() or 1, 8)


@dataclass(frozen=True, kw_only=True)
class ExpertRange:
    """A range of one layer's experts before and after the sites' training."""

    received: Arrays
    """(E, ...)"""
    trained: Sequence[Arrays]
    """(E, ...) of each site"""
    tokens_CE: NDArray[np.float64]
    """Tokens that each site routed to each expert."""
    examples_C: NDArray[np.float64]
    """Training examples of each site."""


Findings = Mapping[str, NDArray[np.float64]]
"""What is reported: name -> values with the expert on the last axis, NaN where there is nothing to say."""
Step = Callable[[ExpertRange], tuple[Arrays, Findings]]
"""The next arrays (E, ...) of a range of experts, and what was found on the way."""


def aggregate_experts(adapter: Arrays, updates: Sequence[ClientUpdate], step: Step) -> tuple[Arrays, dict[str, Any]]:
    """The next adapter: experts by ``step``, a range at a time; everything else is averaged by examples.

    The second result is for the diagnostics: layer -> ``sites`` (names, in the order of the rows), ``tokens``
    [site][expert] and the findings of ``step``, as nested lists with None for NaN.
    """
    dense = [
        {name: array for name, array in update.adapter.items() if not experts.is_expert_array(name)}
        for update in updates
    ]
    stepped: dict[str, NDArray[np.float32]] = weighted_mean(dense, [update.num_examples for update in updates])
    report = {}
    for layer, received in experts.by_layer(adapter).items():
        arrays, findings = _step_layer(layer, received, updates, step)
        stepped |= arrays
        report[layer] = {"sites": [update.site for update in updates]} | findings
    return {name: stepped[name] for name in adapter}, report


def check_expert_tokens(adapter: Arrays, update: ClientUpdate) -> None:
    """Raise ``ValueError`` if the update does not count the tokens of every trained expert."""
    for layer, arrays in experts.by_layer(adapter).items():
        if layer not in update.expert_tokens:
            raise ValueError(f"expert_tokens lacks {layer}, which has trained experts")
        counted, expected = update.expert_tokens[layer].shape, (experts.num_experts(arrays),)
        if counted != expected:
            raise ValueError(f"expert_tokens[{layer}] must have the shape {expected}, got {counted}")


def _step_layer(
    layer: str, received: Arrays, updates: Sequence[ClientUpdate], step: Step
) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """The layer's next arrays and its diagnostics, over ranges of experts that take little memory, in parallel."""
    tokens_CE = np.stack([update.expert_tokens[layer] for update in updates]).astype(np.float64)
    examples_C = np.array([update.num_examples for update in updates], np.float64)
    stepped = {name: np.empty(array.shape, np.float32) for name, array in received.items()}

    def step_range(chosen: slice) -> Findings:
        after, found = step(
            ExpertRange(
                received={name: array[chosen] for name, array in received.items()},
                trained=[{name: update.adapter[name][chosen] for name in received} for update in updates],
                tokens_CE=tokens_CE[:, chosen],
                examples_C=examples_C,
            )
        )
        for name, array in after.items():
            stepped[name][chosen] = array
        return found

    ranges = experts.expert_slices(received, len(updates), _VALUES_AT_A_TIME)
    # Threads of BLAS within these would only wait for each other, and their number may change last bits.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_THREADS) as pool:
        findings = list(pool.map(step_range, ranges))
    joined = {key: np.concatenate([found[key] for found in findings], axis=-1) for key in findings[0]}
    return stepped, {key: _json(values) for key, values in ({"tokens": tokens_CE} | joined).items()}


def _json(values: NDArray[np.floating]) -> list[Any]:
    """Nested lists with None for NaN, which JSON lacks."""
    boxed = values.astype(object)
    boxed[np.isnan(values)] = None
    nested: list[Any] = boxed.tolist()
    return nested
