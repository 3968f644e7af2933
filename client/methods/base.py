"""The contract between a site's round and the method it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from client.evaluation.generation import Generator, greedy
from client.evaluation.held_out import HeldOutLoss, held_out_loss
from client.local_rule import LocalRule
from client.memory import Passes
from client.model import AdaptedModel
from client.text import Example, TokenSequence, encode
from conf.methods import GraftConfig, MethodConfig
from conf.schema import DataConfig
from strategies.adapters import Arrays

Evaluator = Callable[[Sequence[TokenSequence]], HeldOutLoss]
"""Loss on held-out sequences of the model in use at a site."""


class Beginning(NamedTuple):
    """What a site makes of its first adapter before it trains for the first time."""

    adapter: Arrays
    metrics: Mapping[str, float]
    """Scalars for the run's records."""
    note: Mapping[str, Any]
    """JSON values for the site alone, kept beside its private store; empty: nothing to note."""


class Method(ABC):
    """The client half of a method: what leaves the site, where training starts, what the site remembers.

    Pure functions over named arrays: a method keeps nothing between calls. What must last until
    the next round goes into the site's private store through ``remember`` and comes back in ``start``. A method that
    takes part in training itself says how in ``local_rule``.
    """

    personal: ClassVar[bool] = False
    """Whether the model in use at a site is the one it trained itself, so there is no global model."""
    one_adapter: ClassVar[bool] = True
    """Whether the model in use at a site is the base and an adapter; if not, ``evaluator`` and ``generator`` are it."""
    graft: GraftConfig | None = None
    """Personal experts that the sites' models have beside what the server knows; None: none."""

    def __init__(self, config: MethodConfig) -> None:  # noqa: B027
        """Take the settings under ``method.``; most methods have none."""

    @abstractmethod
    def shares(self, name: str) -> bool:
        """Whether the trained array ``name`` is sent; what is not stays at the site and goes on from there."""

    def begin(
        self,
        adapted: AdaptedModel,  # noqa: ARG002
        adapter: Arrays,
        training: Sequence[TokenSequence],  # noqa: ARG002
        generator: np.random.Generator,  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
    ) -> Beginning:
        """Called before a round as long as the site has no array of its own; by default nothing is made of the adapter.

        Args:
            adapted: The model.
            adapter: What was received, with the initial value of every array not shared.
            training: The site's training data.
            generator: Source of every random draw.
            batch_size: Sequences of a forward pass.
        """
        return Beginning(adapter, {}, {})

    def start(self, received: Arrays, private: Arrays) -> Arrays:  # noqa: ARG002
        """Adapter that local training starts from; by default what was received.

        Args:
            received: The global adapter, completed with the site's own value of every array not shared.
            private: The site's private arrays, among them what ``remember`` returned in the site's last round; empty
                before its first.
        """
        return received

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> Sequence[TokenSequence]:
        """What the site trains on and is measured on; by default prompts with their responses.

        Raises:
            ValueError: If the examples do not fit the settings or the method.
        """
        return encode(examples, tokenizer, data)

    def passes_over(self, sequences: Sequence[TokenSequence]) -> Passes:
        """What forward passes go over when the site trains on ``sequences``: memory is estimated from it."""
        return Passes(sequences)

    def local_rule(self, adapted: AdaptedModel, broadcast: Arrays, private: Arrays) -> LocalRule:  # noqa: ARG002
        """What the method adds to the local loop of this round; by default nothing.

        Args:
            adapted: The model that is going to be trained.
            broadcast: What the server sent beside the adapter (``Strategy.broadcast``).
            private: As given to ``start``; among them what the last round's rule gave to keep.

        Raises:
            ValueError: If model or ``broadcast`` do not fit the method.
        """
        return LocalRule()

    def evaluator(
        self,
        adapted: AdaptedModel,
        adapter: Arrays,
        private: Arrays,  # noqa: ARG002
        training: Callable[[], Sequence[TokenSequence]],  # noqa: ARG002
        batch_size: int,
    ) -> Evaluator:
        """What measures the model in use at this site; by default, that of one adapter.

        Args:
            adapted: The model.
            adapter: The global adapter, completed with the site's own value of every array not shared.
            private: As given to ``start``.
            training: Gives the site's training data.
            batch_size: Sequences of a forward pass.
        """
        return partial(held_out_loss, adapted, adapter, batch_size=batch_size)

    def measures(
        self,
        adapted: AdaptedModel,  # noqa: ARG002
        adapter: Arrays,  # noqa: ARG002
        sequences: Sequence[TokenSequence],  # noqa: ARG002
        batch_size: int,  # noqa: ARG002
    ) -> dict[str, float]:
        """What is measured on held-out data beside the loss, for the run's records; by default nothing.

        Args:
            adapted: The model.
            adapter: As given to ``evaluator``.
            sequences: What ``encode`` made of a held-out set.
            batch_size: Sequences of a forward pass.
        """
        return {}

    def generator(
        self,
        adapted: AdaptedModel,
        adapter: Arrays,
        private: Arrays,  # noqa: ARG002
        training: Callable[[], Sequence[TokenSequence]],  # noqa: ARG002
        batch_size: int,
    ) -> Generator:
        """What the model in use at this site answers in words; all as for ``evaluator``, whose model it must be."""
        return partial(greedy, adapted, adapter, batch_size=batch_size)

    def remember(self, received: Arrays, trained: Arrays) -> Arrays:  # noqa: ARG002
        """Arrays that the site keeps for its next round beside what is not shared; by default none. Never sent.

        Their names begin with the method's own name and a slash.

        Args:
            received: As given to ``start`` (training need not have started there).
            trained: The adapter after local training.
        """
        return {}
