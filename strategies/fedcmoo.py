"""FedCMOO: one set of weights for all sites, from compressed gradients of every objective.

Shapes: M objectives, D parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import Arrays, check_same_layout
from strategies.base import Aggregation, ClientUpdate, Strategy
from strategies.fedavg import mean_by_examples
from strategies.simplex import Weights, projection

WEIGHTS = "fedcmoo/weights"
"""Broadcast: (M,) the weights of all sites; of length 0 before the first round, which means equal ones."""
SHARES = "fedcmoo/shares"
"""Sent: (M,) how much of ``GRADIENT`` each objective's gradient is."""
GRADIENT = "fedcmoo/gradient/"
"""Prefix of what is sent of the gradients, in the adapter's layout: objective j's is SHARES[j] times it."""

_STEPS = 1000
_STEP = 1e-3


@dataclass(kw_only=True)
class FedCmoo(Strategy):
    """FedAvg over sites that all weigh their objectives alike; the server finds the weights.

    Askin, Sharma, Joshi & Joe-Wong, 2024, https://arxiv.org/abs/2410.16398. Each site sends its gradients of all
    objectives at the adapter it received, compressed to rank 1: as many numbers as the adapter has. The server moves
    the weights towards the min-norm ones of the mean gradients (``next_weights``).

    The authors exchange twice a round: gradients up and weights down, then training. Here gradients go up with the
    trained adapter, and the weights count in the next round: one round late. Their preferences (EPO-LP) are left out.
    """

    name: ClassVar[str] = "fedcmoo"
    methods: ClassVar[frozenset[str]] = frozenset({"firm"})

    def init_state(self, adapter: Arrays) -> Arrays:  # noqa: ARG002
        """No weights: how many objectives there are the sites know."""
        return {WEIGHTS: np.zeros(0, np.float32)}

    def broadcast(self, state: Arrays) -> Arrays:
        """The weights."""
        return {WEIGHTS: state[WEIGHTS].astype(np.float32)}

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, or its gradients are missing or not finite."""
        super().check_update(adapter, update)
        gradient = {name: array for name, array in update.extras.items() if name != SHARES}
        check_same_layout({GRADIENT + name: array for name, array in adapter.items()}, gradient)
        if SHARES not in update.extras or update.extras[SHARES].ndim != 1 or not update.extras[SHARES].size:
            raise ValueError(f"{SHARES} must be one number for each objective")

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:  # noqa: ARG002
        """The mean adapter, and the next round's weights, of the sites with as many objectives as weights are known of.

        In the first round, of those with as many as most. Diagnostics: ``weights``, and ``verdicts`` of the others.

        Raises:
            ValueError: If no site has as many, or in the first round no number is that of more sites than any other.
        """
        counts = {update.site: update.extras[SHARES].size for update in updates}
        num = state[WEIGHTS].size or _most_common([*counts.values()])
        heard = [update for update in updates if counts[update.site] == num]
        if not heard:
            raise ValueError(f"sites have {sorted({*counts.values()})} objectives, not {num} as before")
        last = state[WEIGHTS].astype(np.float64) if state[WEIGHTS].size else np.full(num, 1 / num)
        weights = next_weights(_mean_gram(heard), last)
        verdicts = {
            site: {"rejected": True, "reason": f"it has {count} objectives, the others {num}: see method.rewards"}
            for site, count in counts.items()
            if count != num
        }
        return Aggregation(
            adapter=mean_by_examples(heard),
            state={WEIGHTS: weights},
            diagnostics={"weights": weights.tolist(), "verdicts": verdicts},
        )


def _most_common(counts: Sequence[int]) -> int:
    """The number that more sites have than any other."""
    (num, sites), *others = Counter(counts).most_common(2)
    if others and others[0][1] == sites:
        raise ValueError(f"sites have {sorted({*counts})} objectives: method.rewards must be the same everywhere")
    return num


def _mean_gram(updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
    """(M, M) Gram matrix of the sites' mean gradients, weighted by examples, without forming them.

    With site c's gradients s_c v_c', it is sum over c, d of w_c w_d <v_c, v_d> s_c s_d'.
    """
    shares = np.array([update.num_examples for update in updates], np.float64)
    sides = np.stack([update.extras[SHARES] for update in updates]) * (shares / shares.sum())[:, None]
    vectors = [{key: array for key, array in update.extras.items() if key != SHARES} for update in updates]
    products = np.zeros((len(vectors), len(vectors)))
    for name in vectors[0]:
        rows_CD = np.stack([vector[name].ravel() for vector in vectors]).astype(np.float64)
        products += rows_CD @ rows_CD.T
    return np.asarray(sides.T @ products @ sides)


def next_weights(gram_MM: NDArray[np.floating], last_M: Weights) -> Weights:
    """The weights after 1000 steps of projected gradient on the normalised Gram matrix, from the last round's.

    As the authors' code: Q over the square of the mean of sqrt(Q_jj + 1e-4), and steps of 1e-3, so that weights move
    towards the min-norm ones over several rounds.
    """
    gram = np.asarray(gram_MM, np.float64)
    normalised = gram / np.sqrt(np.diag(gram) + 1e-4).mean() ** 2
    weights = last_M
    for _ in range(_STEPS):
        weights = projection(weights - _STEP * normalised @ weights)
    return weights
