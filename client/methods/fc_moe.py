"""FC-MoE at a site: local training starts from experts that lean towards what the site learnt last time.

Shape suffixes: E experts of one MoE layer, each of them one vector: all its arrays, flattened, or all its LoRA
products; V vectors that a residual is a sum of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.methods.base import Method
from client.private import under
from conf.methods import FcMoeConfig, MethodConfig, RetentionKind
from strategies import low_rank
from strategies.adapters import Arrays, check_same_layout, difference
from strategies.conflicts import Space
from strategies.experts import by_layer, dots, is_expert_array, num_experts
from strategies.low_rank import Factors
from strategies.quotient import divided

_UPDATE = "fc_moe/update/"
_RECEIVED = "fc_moe/received/"
_THETA, _DELTA, _STEP = range(3)
_VECTORS = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, -1.0]])
"""These three (rows) as sums of the product received, and of those trained and received the last time."""


class FcMoe(Method):
    """FC-MoE's local knowledge retention (2026, Section "Local Knowledge Retention", Eq. 5-6, https://arxiv.org/abs/2606.15625).

    Everything is sent. From the site's second round on, each received expert Theta is re-anchored to
    Theta + lambda R before training, with R computed from the site's own last update of that expert,
    Delta = trained - received (so what re-anchoring added is part of the next update).
    Where that update is zero, so is R; arrays without an expert axis start as received. An expert that the site's text
    no longer reaches has what re-anchoring added as its update: of that, lambda is left with every round, so under
    lambda = 1 all of it. FC-MoE's server gives such an update no weight.

    Differs from the paper: its Eq. 5 makes R a multiple of Theta, while its prose speaks of the filtered,
    domain-specific part; ``kind`` offers both readings. With LoRA ``space`` says what the vector is: the expert's
    factors A and B, or its products B A (ours), whose sum is truncated to the adapter's rank. Where the server steps in
    products it turns the factors too, and only products tell what it changed. ``norm_guard`` bounds what lambda R may
    add in one round: R of an expert is shortened, its direction kept, until ||Theta + lambda R|| <= norm_guard
    ||Theta||; an expert whose B is still 0 then stays 0 in products. Growth over rounds it slows down to that factor a
    round.
    """

    def __init__(self, config: MethodConfig) -> None:
        """Take the settings under ``method.retention.``."""
        assert isinstance(config, FcMoeConfig)
        self.retention = config.retention

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Everything trained is sent."""
        return True

    def start(self, received: Arrays, private: Arrays) -> Arrays:
        """``received`` with its experts re-anchored, if the site has trained before.

        Raises:
            ValueError: If the remembered expert arrays differ from the received ones in names or shapes.
        """
        last_update = by_layer(under(_UPDATE, private))
        if not last_update:
            return received
        start = dict(received)
        last_received = by_layer(under(_RECEIVED, private))
        re_anchored = self._in_products if self.retention.space is Space.product else self._in_arrays
        for layer, experts in by_layer(received).items():
            start |= re_anchored(experts, last_update.get(layer, {}), last_received.get(layer, {}))
        return start

    def remember(self, received: Arrays, trained: Arrays) -> Arrays:
        """The update of every expert array and, where more than it counts, the array received."""
        if self.retention.kind is RetentionKind.off:
            return {}
        before = {name: array for name, array in received.items() if is_expert_array(name)}
        after = {name: trained[name] for name in before}
        kept = {_UPDATE + name: array for name, array in difference(after, before).items()}
        if self.retention.kind is not RetentionKind.paper or self.retention.space is Space.product:
            kept |= {_RECEIVED + name: array for name, array in before.items()}
        return kept

    def _in_arrays(self, received: Arrays, update: Arrays, last_received: Arrays) -> Arrays:
        """The experts of one layer, re-anchored as vectors of what is exchanged."""
        vectors = [received, update]
        if self.retention.kind is not RetentionKind.paper:
            vectors.append(difference(received, last_received))
        added_EV = self._added(_gram(vectors))
        start: dict[str, NDArray[np.floating]] = {}
        for name, array in received.items():
            per_expert = (-1, *[1] * (array.ndim - 1))
            parts = (share_E.reshape(per_expert) * of[name] for share_E, of in zip(added_EV.T, vectors, strict=True))
            start[name] = (array + sum(parts)).astype(array.dtype)
        return start

    def _in_products(self, received: Arrays, update: Arrays, last_received: Arrays) -> Arrays:
        """The LoRA experts of one layer, re-anchored as products: all is in the span of the three that are known."""
        check_same_layout(received, last_received)
        known = [received, {name: array + update[name] for name, array in last_received.items()}, last_received]
        prefixes = low_rank.lora_prefixes(received)
        terms = {prefix: [low_rank.factors_of(arrays, prefix) for arrays in known] for prefix in prefixes}
        gram_E33 = np.sum([low_rank.gram(_stacked(of_prefix)) for of_prefix in terms.values()], axis=0)
        added_EV = self._added(_VECTORS @ gram_E33 @ _VECTORS.T)
        weights_E3 = added_EV @ _VECTORS + [1.0, 0.0, 0.0]
        is_added_E11 = np.any(added_EV != 0, axis=-1, keepdims=True)[..., None]
        start: dict[str, NDArray[np.floating]] = {}
        for prefix, of_prefix in terms.items():
            rank = of_prefix[0].A.shape[-2]
            kept, _ = low_rank.truncate(low_rank.weighted_sum(of_prefix, weights_E3.T), rank)
            turned = low_rank.turned_towards(kept, of_prefix[0].A)
            for end, factor in zip((".lora_A", ".lora_B"), turned, strict=True):
                array = received[prefix + end]
                start[prefix + end] = np.where(is_added_E11, factor, array).astype(array.dtype)
        return start

    def _added(self, gram_EVV: NDArray[np.float64]) -> NDArray[np.float64]:
        """(E, V) what is added to each expert, lambda R, as a sum of V vectors.

        Args:
            gram_EVV: Inner products of these: Theta, Delta and, but for the paper's kind, g, the global step since.
        """
        # Nothing can be parallel to a zero vector.
        residual_EV = np.zeros(gram_EVV.shape[:2])
        if self.retention.kind is RetentionKind.paper:  # Eq. 5: (<Delta, Theta> / ||Theta||^2) Theta
            residual_EV[:, _THETA] = divided(gram_EVV[:, _DELTA, _THETA], gram_EVV[:, _THETA, _THETA], 0.0)
        else:
            along_E = divided(gram_EVV[:, _DELTA, _STEP], gram_EVV[:, _STEP, _STEP], 0.0)
            if self.retention.kind is RetentionKind.filtered:  # min(0, <Delta, g>) / ||g||^2 g
                residual_EV[:, _STEP] = np.minimum(along_E, 0.0)
            else:  # Delta - (<Delta, g> / ||g||^2) g
                residual_EV[:, _DELTA] = gram_EVV[:, _DELTA, _DELTA] > 0
                residual_EV[:, _STEP] = -along_E
        added_EV = self.retention.strength * residual_EV
        if self.retention.norm_guard is None:
            return added_EV
        return added_EV * _shortening(added_EV, gram_EVV, self.retention.norm_guard)[:, None]


def _shortening(added_EV: NDArray[np.float64], gram_EVV: NDArray[np.float64], guard: float) -> NDArray[np.float64]:
    """(E,) largest factor c in [0, 1] of what is added with ||Theta + c added|| <= guard ||Theta||."""
    # ||Theta + c added||^2 = guard^2 ||Theta||^2 is a c^2 + 2 b c - d = 0 with a, d >= 0: its one root >= 0, written
    # without the difference of near-equal numbers.
    a_E = np.maximum(np.einsum("ev,evw,ew->e", added_EV, gram_EVV, added_EV), 0.0)
    b_E = np.einsum("ev,ev->e", gram_EVV[:, _THETA], added_EV)
    d_E = (guard**2 - 1.0) * np.maximum(gram_EVV[:, _THETA, _THETA], 0.0)
    root_E = np.sqrt(b_E**2 + a_E * d_E)
    c_E = np.where(b_E > 0, divided(d_E, b_E + root_E, 0.0), divided(root_E - b_E, a_E, 0.0))
    return np.where(a_E > 0, np.minimum(c_E, 1.0), 1.0)


def _gram(vectors: Sequence[Arrays]) -> NDArray[np.float64]:
    """(E, V, V) inner products of the experts' vectors, each pair multiplied once."""
    gram_EVV = np.empty((num_experts(vectors[0]), len(vectors), len(vectors)))
    for i, j in itertools.combinations_with_replacement(range(len(vectors)), 2):
        gram_EVV[:, i, j] = gram_EVV[:, j, i] = dots(vectors[i], vectors[j])
    return gram_EVV


def _stacked(terms: Sequence[Factors]) -> Factors:
    return Factors(*map(np.stack, zip(*terms, strict=True)))
