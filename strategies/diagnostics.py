"""What one round did to every expert, for any strategy: from the adapters before, of all sites, and after.

Updates are compared as changes of the products B A, or of whole weights; the same measure for every strategy, whatever
it weighs or projects itself. The *consensus* is the plain mean of the sites that used and changed the expert.

Shapes: C sites, E experts of a block, P pairs j < k of sites, K adapters. A block is a MoE layer, or with E = 1 all
other arrays of a kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies import experts, low_rank
from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate
from strategies.low_rank import Factors
from strategies.quotient import CANCELLED, divided
from strategies.threads import each

MAX_NUMBERS = 150_000
"""Numbers kept of a round, about 1 MB as JSON: beyond, first the pairs of sites of each expert are left out, then
what there is of each site. What there is of each expert, and of each pair of sites and layer, is always kept."""

# Squared lengths below this share of the squared norms that they are a difference of are rounding.
_NOTHING = 1e-13

Table = dict[str, NDArray[np.float64]]


def kind_of(name: str) -> str:
    """What an array belongs to: ``experts``, ``attention``, ``router`` or ``other``."""
    if experts.is_expert_array(name):
        return "experts"
    if experts.is_router_array(name):
        return "router"
    return "attention" if any(part.endswith(("attn", "attention")) for part in name.split(".")) else "other"


def bytes_by_kind(adapter: Arrays, extras: Arrays) -> Counter[str]:
    """Bytes of an adapter's values by ``kind_of``, and those of what goes beside it as ``extras``."""
    total: Counter[str] = Counter()
    for name, array in adapter.items():
        total[kind_of(name)] += array.nbytes
    if extras:
        total["extras"] += sum(array.nbytes for array in extras.values())
    return total


def round_diagnostics(
    received: Arrays,
    updates: Sequence[ClientUpdate],
    aggregation: Aggregation,
    personal: Mapping[str, Arrays] | None = None,
    max_numbers: int = MAX_NUMBERS,
) -> dict[str, Any]:
    """JSON values that describe a round, small enough to keep: ``sites`` (their order), ``layers`` and ``kinds``.

    Each MoE layer, and each kind of other arrays as a block of one expert, has as [expert] ``lowest_cosine`` and
    ``lowest_to_others`` (lowest of any site: see below), ``kept`` (||consensus|| / mean ||update||: what averaging
    left), ``scale`` (<step taken, consensus> / ||consensus||^2), ``norm`` (of the next global adapter) and
    ``num_tokens``; as [site][expert] ``tokens``, ``length`` (||update||), ``cosine`` (of the update with the consensus)
    and ``cosine_to_others`` (with the consensus without the site itself, whose share in it hides that it goes against
    the rest); and the cosines of the sites' updates with each other, pairs j < k in the order of
    ``itertools.combinations``, as ``pairs`` [expert][pair] and, over the whole block, ``block_pairs`` [pair]. None
    where there is nothing to compare. What the strategy itself found of a layer (``diagnostics["experts"]``) is its
    ``rule``.

    Args:
        received: Global adapter before the round.
        updates: Of the round.
        aggregation: What the strategy made of them.
        personal: Site -> what it received in place of the global adapter.
        max_numbers: Bound on what is kept: see ``MAX_NUMBERS``.
    """
    adapters = _Adapters.of(received, updates, aggregation.adapter, personal or {})
    layers = experts.by_layer(received)
    counts = _counts(updates, {layer: experts.num_experts(arrays) for layer, arrays in layers.items()})
    others: dict[str, list[str]] = {}
    for name in sorted(received):
        if not experts.is_expert_array(name):
            others.setdefault(kind_of(name), []).append(name)
    tables = _tables(adapters, {layer: sorted(layers.get(layer, {})) for layer in {**counts, **layers}}, counts)
    kinds = _tables(adapters, others, {})
    own = {layer: _of_rule(found) for layer, found in aggregation.diagnostics.get("experts", {}).items()}
    kept = _within([*tables.values(), *kinds.values()], [*own.values()], max_numbers)
    return {
        "sites": [update.site for update in updates],
        "layers": {layer: _json(table, kept) | _rule(own.get(layer, {}), kept) for layer, table in tables.items()},
        "kinds": {kind: _json(table, kept) for kind, table in kinds.items()},
    }


@dataclass(frozen=True)
class _Adapters:
    """All adapters of a round, and which differences of them are the updates."""

    held: list[Arrays]
    """Received, one a site, next; then what each site received if that was its own."""
    changes: NDArray[np.float64]
    """(C + 1, K) coefficients of the sites' updates and of the step taken."""

    @classmethod
    def of(
        cls, received: Arrays, updates: Sequence[ClientUpdate], after: Arrays, personal: Mapping[str, Arrays]
    ) -> _Adapters:
        own = [update.site for update in updates if update.site in personal]
        held = [received, *(update.adapter for update in updates), after, *(personal[site] for site in own)]
        count = len(updates)
        changes = np.zeros((count + 1, len(held)))
        changes[:, 1 : count + 2] = np.eye(count + 1)
        before = [count + 2 + own.index(update.site) if update.site in own else 0 for update in updates]
        changes[np.arange(count + 1), [*before, 0]] = -1.0
        return cls(held, changes)


def _counts(updates: Sequence[ClientUpdate], sizes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """Layer -> (C, E) tokens, for layers that most sites counted; NaN for a site that counted otherwise.

    Strategies that do not use the counts do not check them either.
    """
    reported = Counter((layer, len(row)) for update in updates for layer, row in update.expert_tokens.items())
    counts = {}
    for (layer, size), sites in reported.items():
        if 2 * sites > len(updates) and sizes.get(layer, size) == size:
            unknown = np.full(size, np.nan)
            rows = [update.expert_tokens.get(layer, unknown) for update in updates]
            counts[layer] = np.stack([row if len(row) == size else unknown for row in rows]).astype(np.float64)
    return counts


def _tables(
    adapters: _Adapters, blocks: Mapping[str, Sequence[str]], counts: Mapping[str, NDArray[np.float64]]
) -> dict[str, Table]:
    """Block -> all its numbers."""
    found = each(lambda block: _block(adapters, blocks[block], counts.get(block)), blocks)
    return dict(zip(blocks, found, strict=True))


def _block(adapters: _Adapters, names: Sequence[str], tokens_CE: NDArray[np.float64] | None) -> Table:
    """All numbers of one block; those of its arrays only if it has any."""
    table: Table = {} if tokens_CE is None else {"tokens": tokens_CE, "num_tokens": np.nansum(tokens_CE, axis=0)}
    if not names:
        return table
    gram_EKK = _gram(adapters.held, names)
    changes_EXX = adapters.changes @ gram_EKK @ adapters.changes.T
    size_EX = np.abs(adapters.changes) @ np.diagonal(gram_EKK, axis1=1, axis2=2)[..., None]
    lengths_EX = _lengths(changes_EXX, size_EX[..., 0])
    used_CE = lengths_EX[:, :-1].T > 0
    if tokens_CE is not None:
        used_CE &= tokens_CE != 0
    norm_E = np.sqrt(np.maximum(gram_EKK[:, len(used_CE) + 1, len(used_CE) + 1], 0.0))
    whole = _cosines(changes_EXX.sum(axis=0, keepdims=True)[:, :-1, :-1], np.any(used_CE, axis=1)[:, None])
    to_others_CE = _to_others(changes_EXX[:, :-1, :-1], used_CE)
    return table | _against_consensus(changes_EXX, lengths_EX[:, :-1].T, used_CE) | {
        "norm": norm_E,
        "lowest_to_others": np.fmin.reduce(to_others_CE, axis=0),
        "cosine_to_others": to_others_CE,
        "pairs": _cosines(changes_EXX[:, :-1, :-1], used_CE),
        "block_pairs": whole[0],
    }  # fmt: skip


def _gram(held: Sequence[Arrays], names: Sequence[str]) -> NDArray[np.float64]:
    """(E, K, K) inner products of the adapters, of products B A where there are factors."""
    is_expert = experts.is_expert_array(names[0])
    prefixes = low_rank.lora_prefixes(names)
    factors = [(prefix + ".lora_A", prefix + ".lora_B") for prefix in prefixes]
    whole = [(name,) for name in names if not name.endswith((".lora_A", ".lora_B"))]
    count = len(held[0][names[0]]) if is_expert else 1
    total = np.zeros((count, len(held), len(held)))
    for group in [*factors, *whole]:
        arrays = {name: held[0][name] if is_expert else held[0][name][None] for name in group}
        for part in experts.expert_slices(arrays, len(held)):
            stacks = [np.stack([_part(adapter[name], part, is_expert) for adapter in held]) for name in group]
            total[part] += low_rank.gram(Factors(*stacks)) if len(stacks) == 2 else _plain_gram(stacks[0])
    return total


def _part(array: NDArray[np.floating], part: slice, is_expert: bool) -> NDArray[np.floating]:
    return array[part] if is_expert else array[None]


def _plain_gram(stack: NDArray[np.floating]) -> NDArray[np.float64]:
    """(E, K, K) from whole weights (K, E, ...)."""
    flat = np.swapaxes(stack.reshape(*stack.shape[:2], -1), 0, 1).astype(np.float64)
    return np.asarray(flat @ np.swapaxes(flat, 1, 2))


def _lengths(gram_EXX: NDArray[np.float64], size_EX: NDArray[np.float64]) -> NDArray[np.float64]:
    """Norms of differences from their Gram matrix; rounding counts as no change."""
    squares_EX = np.diagonal(gram_EXX, axis1=1, axis2=2)
    return np.asarray(np.sqrt(np.where(squares_EX > _NOTHING * size_EX, squares_EX, 0.0)))


def _against_consensus(
    changes_EXX: NDArray[np.float64], lengths_CE: NDArray[np.float64], used_CE: NDArray[np.bool_]
) -> Table:
    """Where each update points, and what averaging leaves of it."""
    share_CE = experts.shares(used_CE.astype(np.float64))
    dots_XE = np.einsum("exc,ce->xe", changes_EXX[:, :, :-1], share_CE)
    squared_E = (share_CE * dots_XE[:-1]).sum(axis=0)
    mean_length_E = (share_CE * lengths_CE).sum(axis=0)
    squared_E = np.where(squared_E > CANCELLED * mean_length_E**2, squared_E, 0.0)
    cosine_CE = divided(dots_XE[:-1], np.where(used_CE, lengths_CE * np.sqrt(squared_E), 0.0), np.nan)
    return {
        "lowest_cosine": np.fmin.reduce(cosine_CE, axis=0),
        "kept": divided(np.sqrt(squared_E), mean_length_E, np.nan),
        "scale": divided(dots_XE[-1], squared_E, np.nan),
        "length": np.where(used_CE, lengths_CE, 0.0),
        "cosine": cosine_CE,
    }


def _to_others(gram_ECC: NDArray[np.float64], used_CE: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(C, E) cosine of each update with the sum of the others; NaN for a site that did not use the expert or alone."""
    gram_ECC = gram_ECC * used_CE.T[:, :, None] * used_CE.T[:, None, :]
    squares_EC = np.diagonal(gram_ECC, axis1=1, axis2=2)
    dots_EC = (gram_ECC * (1.0 - np.eye(len(used_CE)))).sum(axis=2)
    # ||sum - own||^2
    squared_EC = gram_ECC.sum(axis=(1, 2))[:, None] - 2.0 * dots_EC - squares_EC
    squared_EC = np.where(squared_EC > CANCELLED * squares_EC.sum(axis=1, keepdims=True), squared_EC, 0.0)
    return divided(dots_EC, np.sqrt(np.maximum(squares_EC, 0.0) * squared_EC), np.nan).T


def _cosines(gram_ECC: NDArray[np.float64], used_CE: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(E, P) cosines of all pairs of sites; NaN unless both used the expert."""
    pairs = np.array(list(combinations(range(len(used_CE)), 2)), np.intp).reshape(-1, 2)
    j, k = pairs.T
    squares_EC = np.where(used_CE.T, np.diagonal(gram_ECC, axis1=1, axis2=2), 0.0)
    lengths_EP = np.sqrt(np.maximum(squares_EC[:, j], 0.0) * np.maximum(squares_EC[:, k], 0.0))
    return divided(gram_ECC[:, j, k], lengths_EP, np.nan)


_OF_SITES = ("tokens", "length", "cosine", "cosine_to_others")
_DECIMALS = {"tokens": 0, "num_tokens": 0, "pairs": 2, "block_pairs": 2, "kept": 3} | dict.fromkeys(
    ("lowest_cosine", "cosine", "lowest_to_others", "cosine_to_others"), 3
)
"""Of those that have a natural unit; the others are rounded to four digits."""


def _within(tables: Sequence[Table], own: Sequence[Table], max_numbers: int) -> frozenset[str]:
    """What may be kept besides the numbers of each expert; ``own`` is what the rule found."""
    of_rule = sum(values.size for table in own for values in table.values() if values.ndim > 1)

    def numbers(names: Sequence[str]) -> int:
        return of_rule + sum(table[name].size for table in tables for name in names if name in table)

    if numbers([*_OF_SITES, "pairs"]) <= max_numbers:
        return frozenset({*_OF_SITES, "pairs"})
    return frozenset(_OF_SITES) if numbers(_OF_SITES) <= max_numbers else frozenset()


def _json(table: Table, kept: frozenset[str]) -> dict[str, Any]:
    bounded = {*_OF_SITES, "pairs"} - kept
    return {name: _rounded(values, _DECIMALS.get(name)) for name, values in table.items() if name not in bounded}


def _of_rule(found: Mapping[str, Any]) -> Table:
    """What the strategy itself found of a layer, without what is here already."""
    return {name: np.array(value, np.float64) for name, value in found.items() if name not in {"sites", "tokens"}}


def _rule(own: Table, kept: frozenset[str]) -> dict[str, Any]:
    return {"rule": {name: _rounded(values) for name, values in own.items() if values.ndim < 2 or kept}} if own else {}


def _rounded(values: NDArray[np.float64], decimals: int | None = None) -> list[Any]:
    """Nested lists with None for NaN, to so many decimals or to four digits; whole numbers for no decimals."""
    boxed = np.empty(values.shape, object)
    rounded = (values if decimals is None else np.round(values, decimals) + 0.0).ravel().tolist()
    boxed.ravel()[:] = [None if math.isnan(value) else _short(value, decimals) for value in rounded]
    nested: list[Any] = boxed.tolist()
    return nested


def _short(value: float, decimals: int | None) -> float:
    """The number as it is to be written."""
    if decimals is None:
        return float(f"{value:.4g}")
    return int(value) if decimals == 0 else value
