"""Who decides how a step weighs its objectives: the site itself, as FIRM does, or the server, as FedCMOO does.

Shape suffixes: M objectives.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from client.alignment.min_norm import min_norm_weights, normalised_gram
from client.alignment.objective_gradients import ObjectiveGradients
from client.model import AdaptedModel
from conf.alignment import FirmConfig, Gram, Regulariser, preference_of
from strategies.adapters import Arrays
from strategies.fedcmoo import GRADIENT, SHARES, WEIGHTS

KEPT = "firm/weights"
"""The last step's weights, in a site's private store."""

Weights = NDArray[np.floating]


class ObjectiveWeights(ABC):
    """One site's weights over the steps of a round."""

    num_parts: int = 1
    """Into how many parts the samples of a step are divided for the gradients that ``of`` is given."""

    @abstractmethod
    def of(self, gradients: ObjectiveGradients) -> Weights:
        """(M,) weights >= 0 of a step with these gradients, which sum to 1."""

    def to_send(self) -> Arrays:
        """What goes to the server beside the adapter."""
        return {}

    def to_keep(self) -> Arrays:
        """What the site keeps for its next round."""
        return {}


class OwnWeights(ObjectiveWeights):
    """Regularised min-norm weights of each step's own gradients, smoothed (MOAC's momentum, arXiv 2405.03082)."""

    def __init__(self, config: FirmConfig, num_objectives: int, private: Arrays) -> None:
        self._config = config
        self._preference_M = np.array(preference_of(config.preference, num_objectives))
        self._last_M: Weights | None = private.get(KEPT)
        self.num_parts = 2 if config.gram is Gram.halves else 1

    def of(self, gradients: ObjectiveGradients) -> Weights:
        """Found anew, then mixed with the last step's: the new ones count ``method.rho``."""
        config, found_M = self._config, self._preference_M
        if not math.isinf(config.beta):
            found_M = min_norm_weights(
                normalised_gram(gradients.gram()),
                regulariser=config.regulariser.value,
                beta=config.beta,
                preference=None if config.regulariser is Regulariser.ridge else self._preference_M,
            )
        before_M = found_M if self._last_M is None else self._last_M
        self._last_M = (1 - config.rho) * before_M + config.rho * found_M
        return self._last_M

    def to_keep(self) -> Arrays:
        """The last step's weights."""
        return {} if self._last_M is None else {KEPT: self._last_M}


class ServerWeights(ObjectiveWeights):
    """The server's weights in every step; the first step's gradients, at the received adapter, go to the server.

    They are sent at rank 1: with the largest eigenvector s of their Gram matrix, objective j's gradient is s_j times
    sum_i s_i g_i. That is the nearest matrix of rank 1, and as many numbers as the adapter has.
    """

    def __init__(self, broadcast: Arrays, num_objectives: int, adapted: AdaptedModel) -> None:
        """Take ``FedCmoo.broadcast``'s weights; none, before the first round, are equal ones.

        Raises:
            ValueError: If they are not one for each objective.
        """
        weights_M = broadcast[WEIGHTS]
        if weights_M.size not in {0, num_objectives}:
            raise ValueError(f"the server weighs {weights_M.size} objectives, method.rewards names {num_objectives}")
        self._weights_M: Weights = weights_M if weights_M.size else np.full(num_objectives, 1 / num_objectives)
        self._adapted = adapted
        self._sent: Arrays = {}

    def of(self, gradients: ObjectiveGradients) -> Weights:
        """The server's."""
        if not self._sent:
            shares_M = np.linalg.eigh(gradients.gram())[1][:, -1]
            names = self._adapted.parameters_by_name()
            vector = {
                GRADIENT + name: self._adapted.to_canonical(name, tensor)
                for name, tensor in zip(names, gradients.combined(shares_M), strict=True)
            }
            self._sent = {SHARES: shares_M.astype(np.float32), **vector}
        return self._weights_M

    def to_send(self) -> Arrays:
        """Gradients of the first step."""
        return self._sent
