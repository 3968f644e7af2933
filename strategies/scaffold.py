"""SCAFFOLD: the sites' drift from one another is estimated, sent around and taken out of their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from strategies.adapters import Arrays, check_same_layout
from strategies.base import Aggregation, ClientUpdate, Strategy
from strategies.fedavg import mean_by_examples

CONTROL = "control/"
"""Prefix of control variates: broadcast, the server's c; sent by a site, the change of its own c_i."""
_EXAMPLES = "examples/"


@dataclass(kw_only=True)
class Scaffold(Strategy):
    """FedAvg, and a server control variate c: the mean of the sites' own, of which they send the changes.

    Karimireddy et al., 2020, Algorithm 1 with a global step of 1, as in its experiments; the correction of
    the gradients is the client half. https://arxiv.org/abs/1910.06378

    Both means are weighted by examples, as FedAvg is here, where the paper's are uniform; with equal sites that is
    the same. The paper knows the number of all sites and starts their c_i at 0; here c is the mean over
    the sites that have taken part so far, so one that never comes does not hold it back. A site counts in c by the
    examples it had when it first came, whatever it has later. A reply that is lost leaves c without that site's last
    change, and a site that lost its own c_i leaves what it had sent before in c.
    """

    name: ClassVar[str] = "scaffold"
    methods: ClassVar[frozenset[str]] = frozenset({"scaffold"})

    def init_state(self, adapter: Arrays) -> Arrays:
        """Control variate 0."""
        return {CONTROL + name: np.zeros(array.shape, np.float32) for name, array in adapter.items()}

    def broadcast(self, state: Arrays) -> Arrays:
        """The server's control variate, as large as the adapter."""
        return {name: array for name, array in state.items() if name.startswith(CONTROL)}

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, or lacks the change of a control variate."""
        super().check_update(adapter, update)
        check_same_layout({CONTROL + name: array for name, array in adapter.items()}, update.extras)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:  # noqa: ARG002
        """The mean adapter, and c moved by the changes of the sites of this round.

        The state also holds, for each site that has taken part, its number of examples.
        """
        known = {name: array for name, array in state.items() if name.startswith(_EXAMPLES)}
        examples = {_EXAMPLES + update.site: np.array(update.num_examples, np.float64) for update in updates} | known
        before, after = (sum(float(count) for count in counts.values()) for counts in (known, examples))
        control = {}
        for name, c in self.broadcast(state).items():
            total = before * c.astype(np.float64)
            for update in updates:
                total += examples[_EXAMPLES + update.site] * update.extras[name].astype(np.float64)
            control[name] = (total / after).astype(np.float32)
        return Aggregation(adapter=mean_by_examples(updates), state=control | examples)
