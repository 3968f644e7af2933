"""PFL-MoE at a site: its predictions are a gated mixture of the model it trained and the global one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from client.evaluation.generation import Generator, greedy
from client.evaluation.held_out import HeldOutLoss
from client.methods.base import Evaluator, Method
from client.mixed_prediction import MixedTokens, Mixture, fitted_gate, mixed_loss, predictions
from client.model import AdaptedModel
from client.private import under
from client.text import TokenSequence
from conf.methods import MethodConfig, PflMoeConfig
from strategies.adapters import Arrays

_LOCAL = "pfl_moe/local/"


class PflMoe(Method):
    """Mixture of a site's own model and the global one, as two experts (Guo et al. 2021, https://arxiv.org/abs/2012.15589).

    The local expert is the adapter as the site last trained it from the global one (the paper's PFL-FT); the gate
    reads the global model's last hidden state (its PFL-MFE, of extracted features). Experts and gate are not trained
    together: before each evaluation the gate is fitted to the site's training data, with both models as they are then.
    The local expert has seen these data, so the gate trusts it more than new text would warrant. Nothing but the
    adapter is sent, as in FedAvg.
    """

    one_adapter: ClassVar[bool] = False

    def __init__(self, config: MethodConfig) -> None:
        """Take the settings under ``method.``."""
        assert isinstance(config, PflMoeConfig)
        self.config = config

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Everything trained is sent."""
        return True

    def remember(self, received: Arrays, trained: Arrays) -> Arrays:  # noqa: ARG002
        """The adapter as it was trained here: the local expert."""
        return {_LOCAL + name: array for name, array in trained.items()}

    def evaluator(
        self,
        adapted: AdaptedModel,
        adapter: Arrays,
        private: Arrays,
        training: Callable[[], Sequence[TokenSequence]],
        batch_size: int,
    ) -> Evaluator:
        """Loss of the mixture; before the site has trained, of the global model."""
        mixture = self.mixture(adapted, adapter, private, training, batch_size)
        if mixture is None:
            return super().evaluator(adapted, adapter, private, training, batch_size)

        def loss(sequences: Sequence[TokenSequence]) -> HeldOutLoss:
            num_examples = sum(len(sequence.lengths) for sequence in sequences)
            found = predictions(adapted, mixture.local, mixture.shared, sequences, batch_size)
            return mixed_loss(mixture.gate, found, num_examples)

        return loss

    def generator(
        self,
        adapted: AdaptedModel,
        adapter: Arrays,
        private: Arrays,
        training: Callable[[], Sequence[TokenSequence]],
        batch_size: int,
    ) -> Generator:
        """Answers of the mixture; before the site has trained, of the global model."""
        mixture = self.mixture(adapted, adapter, private, training, batch_size)
        if mixture is None:
            return super().generator(adapted, adapter, private, training, batch_size)

        def answers(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
            with MixedTokens(adapted, mixture.local, mixture.shared, mixture.gate) as processor:
                return greedy(
                    adapted, mixture.shared, prompts, max_new_tokens, batch_size=batch_size, processor=processor
                )

        return answers

    def mixture(
        self,
        adapted: AdaptedModel,
        adapter: Arrays,
        private: Arrays,
        training: Callable[[], Sequence[TokenSequence]],
        batch_size: int,
    ) -> Mixture | None:
        """The model that the site last trained, and the global one, ``adapter``; None before the site has trained."""
        local = under(_LOCAL, private)
        if not local:
            return None
        seen = training()[: self.config.gate_examples]
        return Mixture(local, adapter, fitted_gate(predictions(adapted, local, adapter, seen, batch_size)))
