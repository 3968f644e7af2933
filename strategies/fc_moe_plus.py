"""FC-MoE's question answered otherwise: experts step along a direction in which every site has an equal say.

Shapes: C sites, E experts of one MoE layer, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies import low_rank
from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy, require
from strategies.conflicts import Space
from strategies.equal_say import EqualSay, equal_say
from strategies.expert_rounds import ExpertRange, Findings, aggregate_experts, check_expert_tokens
from strategies.flatten import flattened, flattened_product
from strategies.low_rank import Factors

_LORA = (".lora_A", ".lora_B")


@dataclass(kw_only=True)
class FcMoePlus(Strategy):
    """Experts take a longer, flatter step in which sites' directions count alike; the rest is averaged by examples.

    Our own rule. What FC-MoE (2026, https://arxiv.org/abs/2606.15625) projects away hardly occurs: sites' updates of an
    expert are nearly orthogonal, and what averaging loses is their length. So for each (layer, expert), over the sites
    that routed tokens to it:

    1. a direction with an almost equal say for each site, and a step that makes up for the length lost, no longer than
       the sites went on average: ``equal_say``;
    2. singular values of each matrix of the step raised to 1 - ``flatten`` at the same Frobenius norm: ``flatten``.

    Whole experts step as they are. LoRA experts step in their products B A, which are never formed: as many leading
    directions of the step are flattened as the adapter has, and B A plus the step is truncated to its rank, turned
    towards the last A. An expert that no site used keeps its value; one that a single site used takes that site's
    update, flattened.
    """

    name: ClassVar[str] = "fc_moe_plus"

    ridge: float = 0.3
    """How far from an equal say in the direction: towards 0, exactly equal; large, the mean of the directions."""
    step: float = 2.0
    """Server step on experts, in steps of the mean direction; never longer than the sites went on average."""
    flatten: float = 1.0
    """1: all singular values of a matrix' step alike; 0: as they are. In [0, 1]."""
    space: Space = Space.product
    """What a LoRA expert's update is; ``factors`` are not flattened, since their spectra are not the product's."""

    def __post_init__(self) -> None:
        require(0 < self.ridge < math.inf, "strategy.ridge", "> 0", self.ridge)
        require(0 < self.step < math.inf, "strategy.step", "> 0", self.step)
        require(0 <= self.flatten <= 1, "strategy.flatten", "in [0, 1]", self.flatten)

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, or does not count the tokens of every expert."""
        super().check_update(adapter, update)
        check_expert_tokens(adapter, update)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """One step of every expert that was used, and the mean of the other arrays.

        Diagnostics: as those of ``FcMoe``, from ``EqualSay``: ``cosine`` and ``conflict`` are to the step before it
        is flattened, ``scale`` is its length over that of the mean by examples.
        """
        stepped, report = aggregate_experts(adapter, updates, self._step)
        return Aggregation(adapter=stepped, state=state, diagnostics={"experts": report})

    def _step(self, layer: ExpertRange) -> tuple[Arrays, Findings]:
        is_lora = all(name.endswith(_LORA) for name in layer.received)
        if is_lora and self.space is Space.product:
            return self._step_products(layer)
        return self._step_arrays(layer, flatten=0.0 if is_lora else self.flatten)

    def _say(self, layer: ExpertRange, gram_ECC: NDArray[np.float64]) -> EqualSay:
        examples_CE = np.where(layer.tokens_CE > 0, layer.examples_C[:, None], 0.0)
        return equal_say(gram_ECC, examples_CE, ridge=self.ridge, step=self.step)

    def _step_arrays(self, layer: ExpertRange, flatten: float) -> tuple[Arrays, Findings]:
        """The next arrays (E, ...), each expert's as one vector; matrices (E, O, I) are flattened."""
        changes = {name: layer.trained[name].astype(np.float64) - before for name, before in layer.received.items()}
        say = self._say(layer, _gram(list(changes.values())))
        stepped = {}
        for name, before in layer.received.items():
            step = np.einsum("ce,ce...->e...", say.coefficients, changes[name])
            stepped[name] = before + (flattened(step, flatten) if step.ndim == 3 else step)
        return stepped, _findings(say)

    def _step_products(self, layer: ExpertRange) -> tuple[Arrays, Findings]:
        """The next LoRA factors; ``lost_energy`` (E,): largest share of a product's squared norm that was truncated."""
        prefixes = low_rank.lora_prefixes(layer.received)
        before = [low_rank.factors_of(layer.received, prefix) for prefix in prefixes]
        trained = [low_rank.factors_of(layer.trained, prefix) for prefix in prefixes]
        changes = [low_rank.change(*pair) for pair in zip(trained, before, strict=True)]
        say = self._say(layer, np.sum([_gram_of_products(change) for change in changes], axis=0))
        used_E = say.weight.any(axis=0)
        stepped: dict[str, NDArray[np.floating]] = {}
        lost = []
        for prefix, received, change in zip(prefixes, before, changes, strict=True):
            new, lost_E = _stepped_product(received, change, say.coefficients, self.flatten)
            for end, factor, kept in zip(_LORA, new, received, strict=True):
                stepped[prefix + end] = np.where(used_E[:, None, None], factor, kept)
            lost.append(lost_E)
        return stepped, _findings(say) | {"lost_energy": np.where(used_E, np.max(lost, axis=0), np.nan)}


def _stepped_product(
    received: Factors, changes: Factors, coefficients_CE: NDArray[np.float64], flatten: float
) -> tuple[Factors, NDArray[np.float64]]:
    """B A plus the flattened sum of the changes (C, E, ...), at the rank of A, and (E,) the share of energy lost."""
    rank = received.A.shape[-2]
    total = low_rank.weighted_sum([Factors(*pair) for pair in zip(*changes, strict=True)], coefficients_CE)
    step = flattened_product(total, flatten, rank)
    kept, lost_E = low_rank.truncate(low_rank.weighted_sum([received, step], [1.0, 1.0]), rank)
    return low_rank.turned_towards(kept, received.A), lost_E


def _gram(changes: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """(E, C, C) inner products of the sites' changes (C, E, ...), over all arrays."""
    flat = [np.moveaxis(change.reshape(*change.shape[:2], -1), 0, 1) for change in changes]
    return np.asarray(sum(vectors @ np.swapaxes(vectors, -1, -2) for vectors in flat))


def _gram_of_products(changes: Factors) -> NDArray[np.float64]:
    """(E, C, C) inner products of the sites' changes of one projection, (C, E, 2R, I) and (C, E, O, 2R)."""
    pairs = low_rank.inner_product(Factors(*(f[:, None] for f in changes)), Factors(*(f[None] for f in changes)))
    return np.moveaxis(pairs, -1, 0)


def _findings(say: EqualSay) -> dict[str, NDArray[np.float64]]:
    return {"weight": say.weight, "cosine": say.cosine, "conflict": say.conflict, "scale": say.scale}
