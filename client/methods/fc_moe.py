"""FC-MoE at a site: local training starts from experts that lean towards what the site learnt last time.

Shape suffix: E experts of one MoE layer. Each expert is one vector: all its arrays, flattened.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from client.methods.base import Method
from client.private import under
from conf.methods import FcMoeConfig, MethodConfig, RetentionKind
from strategies.adapters import Arrays, difference
from strategies.experts import by_layer, dots, is_expert_array, norms

_UPDATE = "fc_moe/update/"
_RECEIVED = "fc_moe/received/"


class FcMoe(Method):
    """FC-MoE's local knowledge retention (2026, Section "Local Knowledge Retention", Eq. 5-6, https://arxiv.org/abs/2606.15625).

    Everything is sent. From the site's second round on, each received expert Theta is re-anchored to
    Theta + lambda R before training, with R computed from the site's own last update of that expert,
    Delta = trained - received (so what re-anchoring added is part of the next update).
    Where that update is zero, so is R; arrays without an expert axis start as received.

    Differs from the paper: its Eq. 5 makes R a multiple of Theta, while its prose speaks of the filtered,
    domain-specific part; ``kind`` offers both readings. With LoRA the vector is the expert's factors A and B.
    ``norm_guard`` bounds what lambda R may add in one round: R of an expert is shortened, its direction kept, until
    ||Theta + lambda R|| <= norm_guard ||Theta||. Growth over rounds it slows down to that factor a round.
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
        for layer, experts in by_layer(received).items():
            residual = self._residual(experts, last_update.get(layer, {}), last_received.get(layer, {}))
            added = _scaled(residual, self.retention.strength * self._shortening(experts, residual))
            start |= {name: (array + added[name]).astype(array.dtype) for name, array in experts.items()}
        return start

    def remember(self, received: Arrays, trained: Arrays) -> Arrays:
        """The update of every expert array and, where ``kind`` compares it with the global step, the array received."""
        if self.retention.kind is RetentionKind.off:
            return {}
        before = {name: array for name, array in received.items() if is_expert_array(name)}
        after = {name: trained[name] for name in before}
        kept = {_UPDATE + name: array for name, array in difference(after, before).items()}
        if self.retention.kind is not RetentionKind.paper:
            kept |= {_RECEIVED + name: array for name, array in before.items()}
        return kept

    def _residual(self, received: Arrays, update: Arrays, last_received: Arrays) -> Arrays:
        """R of the experts of one layer."""
        if self.retention.kind is RetentionKind.paper:  # Eq. 5: (<Delta, Theta> / ||Theta||^2) Theta
            return _scaled(received, _ratio(dots(update, received), dots(received, received)))
        step = difference(received, last_received)
        along_E = _ratio(dots(update, step), dots(step, step))
        if self.retention.kind is RetentionKind.filtered:  # min(0, <Delta, g>) / ||g||^2 g
            return _scaled(step, np.minimum(along_E, 0.0))
        return difference(update, _scaled(step, along_E))  # Delta - (<Delta, g> / ||g||^2) g

    def _shortening(self, received: Arrays, residual: Arrays) -> NDArray[np.float64]:
        """(E,) largest factor c in [0, 1] with ||Theta + c lambda R|| <= norm_guard ||Theta||."""
        length_E = norms(received)
        guard, strength = self.retention.norm_guard, self.retention.strength
        if guard is None:
            return np.ones_like(length_E)
        # ||Theta + c lambda R||^2 = guard^2 ||Theta||^2 is a c^2 + 2 b c - d = 0 with a, d >= 0: its
        # one root >= 0, written without the difference of near-equal numbers.
        a_E = strength**2 * dots(residual, residual)
        b_E = strength * dots(received, residual)
        d_E = (guard**2 - 1.0) * length_E**2
        root_E = np.sqrt(b_E**2 + a_E * d_E)
        c_E = np.where(b_E > 0, _ratio(d_E, b_E + root_E), _ratio(root_E - b_E, a_E))
        return np.where(a_E > 0, np.minimum(c_E, 1.0), 1.0)


def _scaled(arrays: Arrays, factor_E: NDArray[np.float64]) -> Arrays:
    """Each expert times its factor, in float64."""
    return {name: array * factor_E.reshape(-1, *[1] * (array.ndim - 1)) for name, array in arrays.items()}


def _ratio(numerator_E: NDArray[np.float64], denominator_E: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quotient, and 0 where the denominator is 0: nothing can be parallel to a zero vector."""
    return np.divide(numerator_E, denominator_E, out=np.zeros_like(numerator_E), where=denominator_E > 0)
