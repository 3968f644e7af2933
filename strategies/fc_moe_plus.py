"""FC-MoE's question answered otherwise: experts step along a direction in which every site has an equal say.

Shapes: C sites, E experts of one MoE layer, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies import low_rank
from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy, require
from strategies.change_span import WeightedSum, changes_of
from strategies.conflicts import Granularity, Space, join, split
from strategies.equal_say import EqualSay, common_share, equal_say, has_say
from strategies.expert_rounds import Attention, ExpertRange, Findings, aggregate_experts, check_expert_tokens
from strategies.experts import is_expert_array
from strategies.flatten import flattened
from strategies.low_rank import Factors
from strategies.quotient import divided

_LORA = (".lora_A", ".lora_B")
_PREVIOUS = "previous/"
_PAIR_COSINE = "pair_cosine"
_LEAST = 0.25
"""Of step, momentum and flattening, where sites have nothing in common (LOG.md)."""
_UNKNOWN = 0.5
"""Of them, before anything is known of that: as shipped a step as long as the mean direction."""
_EPSILON = float(np.finfo(np.float32).eps)
_TRACE = 1e-6
"""Of a product's length: above the rounding of float32, below what is learnt."""


@dataclass(kw_only=True)
class FcMoePlus(Strategy):
    """Experts take a longer, flatter step in which sites' directions count alike; the rest is averaged by examples.

    Our own rule. What FC-MoE (2026, https://arxiv.org/abs/2606.15625) projects away hardly occurs: sites' updates of an
    expert are nearly orthogonal, and what averaging loses is their length. So for each (layer, expert), over the sites
    that routed tokens to it:

    1. a direction with an almost equal say for each site, and a step that makes up for the length lost, no longer than
       the sites went on average: ``equal_say``;
    2. ``momentum`` times the expert's change in the last round is added;
    3. singular values of each matrix of that raised to 1 - ``flatten`` at the same Frobenius norm: ``flatten``.

    Updates may be as nearly orthogonal where sites learn by heart what is theirs alone, and there a long step is worse
    than a short one, and a flat one than the mean. What tells them apart is whether anything is left in common:
    ``step``, ``momentum`` and ``flatten`` are whole where what sites have in common weighs as much in their mean
    direction as one of them does, a C-th of its squared length (``common_share``; of ten sites a mean cosine of 0.011
    does), and below that in proportion. What counts is the last round's mean over experts, attention among them if it
    steps, of the mean cosine of two sites' updates; of a single expert or layer it is mostly noise. In the first round,
    and until two sites have used one expert, nothing is known, and half of each is taken.

    An expert that no site used keeps its value; one that a single site used takes that site's update, whole from a
    step of 1 on, with whole momentum and flattening.

    Whole experts step as they are. LoRA experts step in their products B A, which are never formed. The sum over sites
    and the last change has the rank of all adapters together: what counts of it is what the received factors and their
    summed changes span (``Changes.weighted_sum``). As many of its leading directions are flattened as the adapter has,
    since to give the last ones as much weight would drown these in noise. B A plus the step is truncated to the
    adapter's rank, and turned towards the last A; of B A itself, directions below three thousandths of the longest may
    be lost.
    """

    name: ClassVar[str] = "fc_moe_plus"

    ridge: float | None = 0.3
    """How far from an equal say in the direction: towards 0, exactly equal; large, the mean of the directions; null: no
    equal say at all, but the mean of the updates by examples (ablation)."""
    step: float = 2.0
    """Server step on experts, in steps of the mean direction; before momentum no longer than sites went on average, by
    examples: one whose update is far longer than the others' lengthens it."""
    flatten: float = 1.0
    """1: all singular values of a matrix' step alike, where it is taken whole; 0: as they are. In [0, 1]."""
    momentum: float = 0.5
    """Share of an expert's last change that is taken again, in [0, 1); 0 remembers nothing."""
    agreement: float | None = 1.0
    """``step``, ``momentum`` and ``flatten`` are taken whole where ``common_share`` is at least that of so many of the
    round's sites, below it in proportion, and never less than a quarter. > 0; null: always whole."""
    space: Space = Space.product
    """What a LoRA expert's update is; ``factors`` are not flattened, since their spectra are not the product's."""
    attention: Attention = Attention.averaged

    def __post_init__(self) -> None:
        require(self.ridge is None or 0 < self.ridge < math.inf, "strategy.ridge", "null or > 0", self.ridge)
        require(0 < self.step < math.inf, "strategy.step", "> 0", self.step)
        require(0 <= self.flatten <= 1, "strategy.flatten", "in [0, 1]", self.flatten)
        require(0 <= self.momentum < 1, "strategy.momentum", "in [0, 1)", self.momentum)
        in_range = self.agreement is None or 0 < self.agreement < math.inf
        require(in_range, "strategy.agreement", "null or > 0", self.agreement)

    def init_state(self, adapter: Arrays) -> Arrays:
        """With momentum ``previous/<name>``: what was received a round earlier, of all arrays that step.

        Rounds add ``pair_cosine``, (1,), with ``agreement``: of the last one in which two sites used an expert.
        """
        if self.momentum == 0:
            return {}
        pairs_step = self.attention is Attention.as_experts
        return {
            _PREVIOUS + name: array
            for name, array in adapter.items()
            if is_expert_array(name) or (pairs_step and name.endswith(_LORA))
        }

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, lacks the tokens of an expert, or has too long products."""
        super().check_update(adapter, update)
        check_expert_tokens(adapter, update)
        if self.space is Space.product:
            low_rank.check_products(update.adapter)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """One step of every expert that was used, and the mean of the other arrays, or a step of attention too.

        Diagnostics: as those of ``FcMoe``, from ``EqualSay``: ``cosine`` and ``conflict`` are to the step before
        momentum is added and it is flattened, ``scale`` is its length over that of the mean by examples; and
        ``pair_cosine``.
        """
        previous = {name.removeprefix(_PREVIOUS): array for name, array in state.items() if name != _PAIR_COSINE}
        pair_cosine = float(state[_PAIR_COSINE][0]) if _PAIR_COSINE in state else None
        stepped, report = aggregate_experts(
            adapter, updates, partial(self._step, pair_cosine), self.attention, previous
        )
        return Aggregation(adapter=stepped, state=self._after(adapter, state, report), diagnostics=report)

    def _after(self, adapter: Arrays, state: Arrays, report: Mapping[str, Any]) -> Arrays:
        """State after a round whose diagnostics are ``report``."""
        layers = [layer["pair_cosine"] for layers in report.values() for layer in layers.values()]
        found = [cosine for cosines in layers for cosine in cosines if cosine is not None]
        if self.agreement is None or not (found or _PAIR_COSINE in state):
            return self.init_state(adapter)
        return {**self.init_state(adapter), _PAIR_COSINE: np.array([np.mean(found)]) if found else state[_PAIR_COSINE]}

    def _step(self, pair_cosine: float | None, layer: ExpertRange) -> tuple[Arrays, Findings]:
        """The next arrays, with the last round's ``pair_cosine``; None: there was none."""
        is_lora = all(name.endswith(_LORA) for name in layer.received)
        if is_lora and self.space is Space.product:
            return self._step_products(pair_cosine, layer)
        return self._step_arrays(pair_cosine, layer, is_lora)

    def _say(
        self, pair_cosine: float | None, layer: ExpertRange, gram_ECC: NDArray[np.float64]
    ) -> tuple[EqualSay, NDArray[np.float64], NDArray[np.float64]]:
        """Also (C, E) factor of each change in the step, that of the last one, turned back, being a further row.

        And (E,) how much the step is flattened.
        """
        examples_CE = np.where(layer.tokens_CE > 0, layer.examples_C[:, None], 0.0)
        sites = slice(len(examples_CE))
        gram_ECC = gram_ECC[:, sites, sites]
        taken_E = self._taken(pair_cosine, len(examples_CE), has_say(gram_ECC, examples_CE).sum(axis=-1))
        say = equal_say(gram_ECC, examples_CE, ridge=self.ridge, step=self.step * taken_E)
        factor_CE = say.coefficients
        if layer.previous:
            factor_CE = np.vstack([factor_CE, -self.momentum * taken_E * (say.weight.sum(axis=0) > 0)])
        return say, factor_CE, self.flatten * taken_E

    def _taken(
        self, pair_cosine: float | None, num_sites: int, num_sites_E: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """(E,) how much of each knob is taken: of the round's sites ``num_sites_E`` have a say in an expert."""
        if self.agreement is None:
            return np.ones(len(num_sites_E))
        if pair_cosine is None:
            return np.where(num_sites_E > 1, _UNKNOWN, 1.0)
        whole_from = min(self.agreement / num_sites, 1.0)
        return np.clip(common_share(pair_cosine, num_sites_E) / whole_from, _LEAST, 1.0)

    def _step_arrays(self, pair_cosine: float | None, layer: ExpertRange, is_lora: bool) -> tuple[Arrays, Findings]:
        """The next arrays (E, ...), each expert's as one vector; matrices (E, O, I) but LoRA's are flattened."""
        ((names, block),) = split(layer.received, _ends(layer), Granularity.expert).items()
        say, factor_CE, flatten_E = self._say(pair_cosine, layer, block.gram()[:, 0])
        step_EGD = block.weighted(factor_CE[..., None])
        steps: Arrays = join(names, step_EGD, layer.received, Granularity.expert)
        if not is_lora:
            steps = {name: _flattened_whole(step, layer.received[name], flatten_E) for name, step in steps.items()}
        return {name: layer.received[name] + step for name, step in steps.items()}, _findings(say)

    def _step_products(self, pair_cosine: float | None, layer: ExpertRange) -> tuple[Arrays, Findings]:
        """The next LoRA factors; ``lost_energy`` (E,): largest share of a product's squared norm that is not in them.

        It was truncated, or lies outside the span in which the step is taken.
        """
        changes = {
            prefix: changes_of(
                low_rank.factors_of(layer.received, prefix),
                [low_rank.factors_of(arrays, prefix) for arrays in _ends(layer)],
            )
            for prefix in low_rank.lora_prefixes(layer.received)
        }
        grams = [change.gram() for change in changes.values()]
        say, factor_CE, flatten_E = self._say(pair_cosine, layer, np.sum(grams, axis=0))
        used_E = say.weight.sum(axis=0) > 0
        stepped: dict[str, NDArray[np.floating]] = {}
        lost = []
        for (prefix, change), gram_ECC in zip(changes.items(), grams, strict=True):
            squared_E = np.einsum("ce,ecd,de->e", factor_CE, gram_ECC, factor_CE)
            new, lost_E = _stepped_product(change.weighted_sum(factor_CE), squared_E, flatten_E)
            for end, factor in zip(_LORA, new, strict=True):
                stepped[prefix + end] = np.where(used_E[:, None, None], factor, layer.received[prefix + end])
            lost.append(lost_E)
        return stepped, _findings(say) | {"lost_energy": np.where(used_E, np.max(lost, axis=0), np.nan)}


def _ends(layer: ExpertRange) -> list[Arrays]:
    """Where changes of what was received lead: to what each site trained and, for momentum, to a round earlier."""
    return [*layer.trained, *([layer.previous] if layer.previous else [])]


def _flattened_whole(
    step: NDArray[np.floating], received: NDArray[np.floating], flatten_E: NDArray[np.float64]
) -> NDArray[np.floating]:
    """The step of a whole array (E, ...): matrices (E, O, I) flattened, all else as it is."""
    if step.ndim != 3:
        return step
    rounding_E = _EPSILON * math.sqrt(max(step.shape[1:])) * abs(received).max(axis=(1, 2))
    return flattened(step, flatten_E, rounding=rounding_E)


def _stepped_product(
    total: WeightedSum, squared_E: NDArray[np.float64], flatten_E: NDArray[np.float64]
) -> tuple[Factors, NDArray[np.float64]]:
    """B A plus the flattened change, at the rank of A, and (E,) the share of its squared norm that was lost.

    Args:
        total: The change, in the span of what it has in common with the received factors.
        squared_E: Squared norm of the change without that restriction.
        flatten_E: As in ``flattened``.
    """
    rank = total.received_A.shape[-2]
    lengths_E = (np.sqrt((factor**2).sum(axis=(-2, -1))) for factor in (total.received_A, total.received_B))
    rounding_E = _EPSILON * math.prod(lengths_E)
    stepped = total.received_B @ total.received_A + flattened(total.change, flatten_E, rank, rounding_E)
    # Directions in which nothing was learnt keep to the received A: it leaves a trace, too small to count. Where there
    # is nothing else, it is all there is: with A and B zero an expert could never learn again.
    length_E = np.sqrt((stepped**2).sum(axis=(-2, -1)))
    trace = np.where(length_E > 0, _TRACE * length_E, 1.0)[:, None, None] * total.received_A
    _, _, right = np.linalg.svd(np.concatenate([stepped, trace], axis=-2), full_matrices=False)
    A = right[:, :rank]
    kept = low_rank.turned_towards(Factors(A, stepped @ np.swapaxes(A, -1, -2)), total.received_A)
    outside_E = np.maximum(squared_E - (total.change**2).sum(axis=(-2, -1)), 0.0)
    whole_E = length_E**2 + outside_E
    kept_E = divided((kept.B**2).sum(axis=(-2, -1)), whole_E, 1.0)
    return total.lift(kept), np.maximum(1.0 - kept_E, 0.0)


def _findings(say: EqualSay) -> dict[str, NDArray[np.float64]]:
    return {
        "weight": say.weight,
        "cosine": say.cosine,
        "conflict": say.conflict,
        "scale": say.scale,
        "pair_cosine": say.pair_cosine,
    }
