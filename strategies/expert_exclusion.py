"""Single experts of a site left out, put back or counted less, while the rest of its update stays as it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from strategies import experts
from strategies.adapters import Arrays
from strategies.base import ClientUpdate

Expert = tuple[str, int]
"""MoE layer and index on its expert axis."""


def as_told(received: Arrays, update: ClientUpdate) -> ClientUpdate:
    """The update with what was received in every expert that it counts no tokens for.

    Such an expert is judged by nobody; a mean by examples would take its values all the same.
    """
    changed = dict(update.adapter)
    for layer, arrays in experts.by_layer(received).items():
        idle_E = update.expert_tokens[layer] == 0
        for name, before in arrays.items() if idle_E.any() else ():
            if not np.array_equal(before[idle_E], changed[name][idle_E]):
                changed[name] = changed[name].copy()
                changed[name][idle_E] = before[idle_E]
    return replace(update, adapter=changed)


def counted_less(
    received: Arrays, updates: Sequence[ClientUpdate], rejected: Mapping[Expert, Collection[str]], weight: float
) -> list[ClientUpdate]:
    """The updates, in which each rejected expert counts ``weight`` of what it is; 0 leaves it out.

    Any rule may come afterwards. The rejected sites' values x are moved towards the mean m of the other sites,

        m + f (x - m),    f = weight N / (N_others + weight N_rejected),    N: training examples,

    so that the mean by examples over all sites is the one in which they count ``weight``; rules that weigh otherwise
    see them as much nearer to the others. Where all are rejected, m is what was received. With ``weight`` 0 the
    expert's tokens are 0 as well: to a rule that asks who used it, a site that is left out did not.

    Args:
        received: Global adapter before the round.
        updates: Of the sites that take part.
        rejected: Expert -> names of the sites whose values of it are not trusted; others than those of ``updates`` are
            passed over.
        weight: In [0, 1].
    """
    changed = [dict(update.adapter) for update in updates]
    tokens = [dict(update.expert_tokens) for update in updates]
    examples = np.array([update.num_examples for update in updates], np.float64)
    layers = experts.by_layer(received)
    for (layer, expert), sites in rejected.items():
        is_rejected = np.array([update.site in sites for update in updates], bool)
        chosen = np.flatnonzero(is_rejected)
        for name, before in layers[layer].items() if len(chosen) else ():
            values = np.stack([update.adapter[name][expert] for update in updates]).astype(np.float64)
            moved = _moved(values, before[expert], examples, is_rejected, weight)
            for i in chosen:
                changed[i][name] = _with_expert(changed[i][name], expert, moved[i])
        for i in chosen if weight == 0 else ():
            if layer in tokens[i]:
                tokens[i][layer] = _with_expert(tokens[i][layer], expert, 0.0)
    return [
        replace(update, adapter=arrays, expert_tokens=counts)
        for update, arrays, counts in zip(updates, changed, tokens, strict=True)
    ]


def _moved(
    values: NDArray[np.float64],
    received: NDArray[np.floating],
    examples: NDArray[np.float64],
    is_rejected: NDArray[np.bool_],
    weight: float,
) -> NDArray[np.float64]:
    """(sites, ...) the values moved towards the mean of those that are not rejected; right for the rejected ones."""
    others = examples * ~is_rejected
    if not others.any():
        return np.asarray(received + weight * (values - received))
    mean = np.tensordot(others / others.sum(), values, axes=1)
    share = weight * examples.sum() / (others.sum() + weight * examples[is_rejected].sum())
    return np.asarray(mean + share * (values - mean))


def _with_expert(array: NDArray[np.floating], expert: int, value: NDArray[np.floating] | float) -> NDArray[np.floating]:
    """A copy with another value of one expert."""
    copy = array.copy()
    copy[expert] = value
    return copy
