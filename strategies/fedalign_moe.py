"""FedAlign-MoE: experts are averaged over the sites that mean the same by them; routers are aligned, not averaged.

Shapes: C sites, E experts of one MoE layer, D model width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies import experts
from strategies.adapters import Arrays, weighted_mean
from strategies.base import Aggregation, ClientUpdate, Strategy, require
from strategies.expert_rounds import check_expert_tokens

PROBABILITY, MARGIN, SEMANTICS = "probability/", "margin/", "semantics/"
"""What a site sends of each MoE layer: mean routing probability (E,), mean margin (E,), mean hidden states (E, D)."""
REFERENCE, MEAN = "reference/", "mean/"
"""What the server broadcasts of each: the global routing reference p_g (E,), and the sites' mean probability (E,)."""


@dataclass(kw_only=True)
class FedAlignMoe(Strategy):
    """Experts by pairwise agreement of updates and meaning; a global routing reference that the sites' losses pull to.

    "FedAlign-MoE", Fang et al., 2026, Eq. 3-18; the statistics and the loss, Eq. 3, 5 and 9-12, are the client half.
    https://arxiv.org/abs/2603.21276

    The paper writes no layer index: here everything is done for each layer. An expert concerns the sites that used
    it; the others' updates are zero and their meaning undefined. Where no site prefers an expert, so that Eq. 6 is 0/0,
    its reference is the sites' mean probability. The reference that a site trains towards is that of the round
    before, since a round has one exchange. With LoRA an expert's update (Eq. 13) is that of its factors A and B as one
    vector, so its cosines are of these, not of the products. Arrays without an expert axis are averaged by examples;
    routers, trained with model.router=local, never leave the sites.
    """

    name: ClassVar[str] = "fedalign_moe"
    methods: ClassVar[frozenset[str]] = frozenset({"fedalign_moe"})

    deviations: float = 1.0
    """Beta of Eq. 17, which the paper does not give: a pair this many standard deviations less alike in meaning than
    the mean pair has half its weight. Cosines differ by 2 at most, so the sigmoid is nearly flat."""

    def __post_init__(self) -> None:
        require(math.isfinite(self.deviations), "strategy.deviations", "finite", self.deviations)

    def broadcast(self, state: Arrays) -> Arrays:
        """The routing reference and the mean probability of each layer; nothing before the first aggregation."""
        return state

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, or counts or statistics of a trained layer are missing."""
        super().check_update(adapter, update)
        check_expert_tokens(adapter, update)
        for layer, arrays in experts.by_layer(adapter).items():
            rows = experts.num_experts(arrays)
            for kind, num_axes in ((PROBABILITY, 1), (MARGIN, 1), (SEMANTICS, 2)):
                array = update.extras.get(kind + layer)
                if array is None or array.ndim != num_axes or len(array) != rows:
                    shape = None if array is None else array.shape
                    raise ValueError(f"{kind}{layer} must have {rows} rows and {num_axes} axes, got {shape}")
                if kind != SEMANTICS and not ((array >= 0) & (array <= 1)).all():
                    raise ValueError(f"{kind}{layer} must be in [0, 1], got {array.min():.4g} to {array.max():.4g}")

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:  # noqa: ARG002
        """Aligned experts, the mean of the other arrays, and the next routing reference.

        Diagnostics: ``experts`` -> layer -> ``sites`` (names, in the order of the rows below); ``tokens`` and
        ``weight`` as [site][expert]; ``reference`` as [expert].
        """
        dense = [
            {name: array for name, array in update.adapter.items() if not experts.is_expert_array(name)}
            for update in updates
        ]
        stepped = weighted_mean(dense, [update.num_examples for update in updates])
        layers = experts.by_layer(adapter)
        references, report = _references(list(layers), updates), {}
        for layer, received in layers.items():
            trained = [{name: update.adapter[name] for name in received} for update in updates]
            weights_CE = self._weights(layer, received, updates)
            stepped |= experts.weighted_mean(received, trained, weights_CE)
            report[layer] = _report(layer, updates, weights_CE, references)
        return Aggregation(
            adapter={name: stepped[name] for name in adapter}, state=references, diagnostics={"experts": report}
        )

    def _weights(self, layer: str, received: Arrays, updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
        """(C, E) weights of the sites in each expert (Eq. 15)."""
        used_EC = np.stack([update.expert_tokens[layer] > 0 for update in updates], axis=1)
        semantics_CED = _semantics(layer, updates)
        directions_ECC = _cosines(_update_products(received, updates))
        meanings_ECC = _cosines(np.einsum("ied,jed->eij", semantics_CED, semantics_CED))
        pairs_ECC = pair_weights(directions_ECC, meanings_ECC, used_EC, self.deviations)
        return experts.shares(pairs_ECC.sum(axis=2).T)


def routing_reference(
    probability_CE: NDArray[np.floating], margin_CE: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(E,) global reference p_g, and (E,) the sites' mean probability, from each site's p and m (Eq. 4, 6, 7).

    A site has the more say in an expert, the more its routing overlaps with the mean and the clearer it decides. As in
    the paper p_g need not sum to 1.
    """
    probability_CE = probability_CE.astype(np.float64)
    mean_E = probability_CE.mean(axis=0)
    overlap_CE = probability_CE * mean_E
    share_CE = experts.shares(overlap_CE * margin_CE)
    return np.where(share_CE.any(axis=0), (share_CE * probability_CE).sum(axis=0), mean_E), mean_E


def pair_weights(
    directions_ECC: NDArray[np.float64],
    meanings_ECC: NDArray[np.float64],
    used_EC: NDArray[np.bool_],
    deviations: float,
) -> NDArray[np.float64]:
    """(E, C, C) gamma (Eq. 16-18): how far two sites' updates of an expert agree, and whether they mean the same by it.

    Args:
        directions_ECC: Cosines of the updates (Eq. 13).
        meanings_ECC: Cosines of the mean hidden states.
        used_EC: Which sites used the expert; mean and deviation are over their pairs, each with itself included.
        deviations: Beta.
    """
    pairs_ECC = used_EC[:, :, None] & used_EC[:, None, :]
    count_E = np.maximum(pairs_ECC.sum(axis=(1, 2)), 1)
    mean_E = np.where(pairs_ECC, meanings_ECC, 0.0).sum(axis=(1, 2)) / count_E
    squares_ECC = np.where(pairs_ECC, (meanings_ECC - mean_E[:, None, None]) ** 2, 0.0)
    threshold_E = mean_E - deviations * np.sqrt(squares_ECC.sum(axis=(1, 2)) / count_E)
    alike_ECC = 1 / (1 + np.exp(threshold_E[:, None, None] - meanings_ECC))
    return np.where(pairs_ECC, alike_ECC * np.maximum(directions_ECC, 0.0), 0.0)


def _update_products(received: Arrays, updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
    """(E, C, C) inner products of the sites' updates of each expert, over ranges of experts that fit in memory."""
    products = np.zeros((experts.num_experts(received), len(updates), len(updates)))
    for chosen in experts.expert_slices(received, len(updates)):
        for name, array in received.items():
            before = array[chosen].astype(np.float64)
            change_CED = np.stack(
                [(update.adapter[name][chosen] - before).reshape(len(before), -1) for update in updates]
            )
            change_ECD = change_CED.transpose(1, 0, 2)
            products[chosen] += change_ECD @ change_ECD.transpose(0, 2, 1)
    return products


def _semantics(layer: str, updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
    """(C, E, D) mean hidden states; zeros, which resemble nothing, of a site that sent another width than most."""
    sent = [update.extras[SEMANTICS + layer] for update in updates]
    (shape, _), *_ = Counter(array.shape for array in sent).most_common()
    return np.stack([array if array.shape == shape else np.zeros(shape) for array in sent], dtype=np.float64)


def _cosines(products_ECC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines out of inner products; 0 with a zero vector, which has no direction."""
    length_EC = np.sqrt(np.einsum("eii->ei", products_ECC))
    lengths_ECC = length_EC[:, :, None] * length_EC[:, None, :]
    cosines_ECC = np.zeros_like(products_ECC)
    np.divide(products_ECC, lengths_ECC, out=cosines_ECC, where=lengths_ECC > 0)
    return cosines_ECC


def _references(layers: Sequence[str], updates: Sequence[ClientUpdate]) -> dict[str, NDArray[np.float32]]:
    """What is broadcast before the next round."""
    found = {}
    for layer in layers:
        kinds = (np.stack([update.extras[kind + layer] for update in updates]) for kind in (PROBABILITY, MARGIN))
        reference_E, mean_E = routing_reference(*kinds)
        found[REFERENCE + layer] = reference_E.astype(np.float32)
        found[MEAN + layer] = mean_E.astype(np.float32)
    return found


def _report(
    layer: str, updates: Sequence[ClientUpdate], weights_CE: NDArray[np.float64], references: Arrays
) -> dict[str, Any]:
    return {
        "sites": [update.site for update in updates],
        "tokens": [update.expert_tokens[layer].tolist() for update in updates],
        "weight": weights_CE.tolist(),
        "reference": references[REFERENCE + layer].tolist(),
    }
