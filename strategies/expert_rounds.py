"""What rules that treat every expert apart have in common: ranges of experts, all other arrays, the diagnostics.

Shapes: C sites, E experts of one range of a layer's experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies import experts
from strategies.adapters import Arrays, weighted_mean
from strategies.base import ClientUpdate
from strategies.threads import threads


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
    previous: Arrays
    """(E, ...) what the sites received a round earlier, for rules that remember it; else empty."""

    def part(self, chosen: slice) -> ExpertRange:
        """Some of its experts, as views."""
        return ExpertRange(
            received=_part(self.received, chosen),
            trained=[_part(arrays, chosen) for arrays in self.trained],
            tokens_CE=self.tokens_CE[:, chosen],
            examples_C=self.examples_C,
            previous=_part(self.previous, chosen),
        )


def _part(arrays: Arrays, chosen: slice) -> Arrays:
    return {name: array[chosen] for name, array in arrays.items()}


Findings = Mapping[str, NDArray[np.float64]]
"""What is reported: name -> values with the expert on the last axis, NaN where there is nothing to say."""
Step = Callable[[ExpertRange], tuple[Arrays, Findings]]
"""The next arrays (E, ...) of a range of experts, and what was found on the way."""


class Attention(Enum):
    """What becomes of the LoRA pairs beside experts: on attention, and in a dense model on feed-forward blocks."""

    averaged = "averaged"
    """By examples, as in FedAvg."""
    as_experts = "as_experts"
    """Each projection steps as an expert that every site used as often as it has examples."""


def aggregate_experts(
    adapter: Arrays,
    updates: Sequence[ClientUpdate],
    step: Step,
    attention: Attention = Attention.averaged,
    previous: Arrays | None = None,
) -> tuple[Arrays, dict[str, Any]]:
    """The next adapter: experts by ``step``, a range at a time; everything else by examples, or as ``attention`` says.

    ``previous`` holds, for rules that remember it, the adapter of a round earlier: all arrays that step.

    The second result is for the diagnostics: under ``experts``, layer -> ``sites`` (names, in the order of the rows),
    ``tokens`` [site][expert] and the findings of ``step``, as nested lists with None for NaN; under ``attention``, if
    it steps, the same by projection, each as one expert.
    """
    received = _Round(adapter, updates, previous or {})
    stepping = {"experts": received.layers()}
    if attention is Attention.as_experts and (projections := received.projections()):
        stepping["attention"] = projections
    stepped = {
        name: np.empty(array.shape, np.float32)
        for ranges in stepping.values()
        for whole in ranges.values()
        for name, array in whole.received.items()
    }
    dense = [{name: array for name, array in update.adapter.items() if name not in stepped} for update in updates]
    with threads() as pool:
        pending = {
            kind: {path: _begin(pool, whole, step, stepped) for path, whole in ranges.items()}
            for kind, ranges in stepping.items()
        }
        averaged = weighted_mean(dense, [float(update.num_examples) for update in updates])
        sites = [update.site for update in updates]
        report = {
            kind: {path: {"sites": sites} | findings() for path, findings in ranges.items()}
            for kind, ranges in pending.items()
        }
    stepped |= averaged
    return {name: stepped[name].reshape(array.shape) for name, array in adapter.items()}, report


@dataclass(frozen=True)
class _Round:
    """What steps in a round, taken apart."""

    adapter: Arrays
    updates: Sequence[ClientUpdate]
    previous: Arrays

    def layers(self) -> dict[str, ExpertRange]:
        """MoE layer -> its experts."""
        return {
            layer: self._whole(arrays, np.stack([update.expert_tokens[layer] for update in self.updates]))
            for layer, arrays in experts.by_layer(self.adapter).items()
        }

    def projections(self) -> dict[str, ExpertRange]:
        """Path of each LoRA pair beside the experts -> the pair as one expert that all sites used."""
        prefixes = sorted(name.removesuffix("lora_A") for name in self.adapter if name.endswith(".lora_A"))
        examples_C1 = np.array([[update.num_examples] for update in self.updates])
        return {
            prefix.removesuffix("."): self._whole([f"{prefix}lora_A", f"{prefix}lora_B"], examples_C1, is_one=True)
            for prefix in prefixes
            if not experts.is_expert_array(f"{prefix}lora_A")
        }

    def _whole(self, names: Iterable[str], tokens_CE: NDArray[Any], *, is_one: bool = False) -> ExpertRange:
        def chosen(arrays: Arrays) -> Arrays:
            return {name: arrays[name][None] if is_one else arrays[name] for name in names if name in arrays}

        return ExpertRange(
            received=chosen(self.adapter),
            trained=[chosen(update.adapter) for update in self.updates],
            tokens_CE=tokens_CE.astype(np.float64),
            examples_C=np.array([update.num_examples for update in self.updates], np.float64),
            previous=chosen(self.previous),
        )


def check_expert_tokens(adapter: Arrays, update: ClientUpdate) -> None:
    """Raise ``ValueError`` if the update does not count the tokens of every trained expert."""
    for layer, arrays in experts.by_layer(adapter).items():
        if layer not in update.expert_tokens:
            raise ValueError(f"expert_tokens lacks {layer}, which has trained experts")
        counted, expected = update.expert_tokens[layer].shape, (experts.num_experts(arrays),)
        if counted != expected:
            raise ValueError(f"expert_tokens[{layer}] must have the shape {expected}, got {counted}")


def _begin(
    pool: ThreadPoolExecutor, whole: ExpertRange, step: Step, stepped: Mapping[str, NDArray[np.float32]]
) -> Callable[[], dict[str, Any]]:
    """Step the layer, over ranges of experts that take little memory, into ``stepped``; waits for its diagnostics."""

    def step_range(chosen: slice) -> Findings:
        after, found = step(whole.part(chosen))
        for name, array in after.items():
            stepped[name][chosen] = array
        return found

    ranges = experts.expert_slices(whole.received, len(whole.trained))
    pending = [pool.submit(step_range, chosen) for chosen in ranges]

    def findings() -> dict[str, Any]:
        found = [part.result() for part in pending]
        joined = {key: np.concatenate([part[key] for part in found], axis=-1) for key in found[0]}
        return {key: _json(values) for key, values in ({"tokens": whole.tokens_CE} | joined).items()}

    return findings


def _json(values: NDArray[np.floating]) -> list[Any]:
    """Nested lists with None for NaN, which JSON lacks."""
    boxed = values.astype(object)
    boxed[np.isnan(values)] = None
    nested: list[Any] = boxed.tolist()
    return nested
