"""Two models' predictions, mixed token by token by a gate: p(token) = g p_local(token) + (1 - g) p_global(token).

Shape suffixes: T response tokens, D model width, V vocabulary, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LogitsProcessor

from client.evaluation.held_out import HeldOutLoss, reading_hidden_states, response_logits
from client.model import AdaptedModel
from client.text import TokenSequence, collate
from strategies.adapters import Arrays

_STEPS = 100
_LEARNING_RATE = 0.05
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Predictions:
    """What the two models say to the response tokens of some sequences."""

    log_local_T: Tensor
    """Log-probability of each token, nats, float32."""
    log_global_T: Tensor
    hidden_TD: Tensor
    """The global model's hidden state that its prediction was read from."""


class Gate(nn.Module):
    """g(x) = sigmoid(w.h + b) of the global model's hidden state h, with each of its coordinates standardised."""

    def __init__(self, hidden_TD: Tensor) -> None:
        super().__init__()
        deviation_D, mean_D = torch.std_mean(hidden_TD, dim=0, correction=0)
        self.mean_D = mean_D
        self.scale_D = 1 / deviation_D.clamp(min=1e-6)
        self.weight_D = nn.Parameter(torch.zeros_like(mean_D))
        self.bias = nn.Parameter(torch.zeros((), device=mean_D.device))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """(T,) the logit of g."""
        logit_T: Tensor = (hidden_TD - self.mean_D) * self.scale_D @ self.weight_D + self.bias
        return logit_T

    def nll(self, predictions: Predictions) -> Tensor:
        """(T,) negative log-likelihood of each token under the mixture, nats."""
        return -log_mixture(self(predictions.hidden_TD), predictions.log_local_T, predictions.log_global_T)


def log_mixture(logit: Tensor, log_local: Tensor, log_global: Tensor) -> Tensor:
    """ln(g p_local + (1 - g) p_global) with g = sigmoid(logit); the three are broadcast."""
    return torch.logaddexp(functional.logsigmoid(logit) + log_local, functional.logsigmoid(-logit) + log_global)


@dataclass(frozen=True)
class Mixture:
    """Two adapters of one model, and the gate between what the model predicts with either."""

    local: Arrays
    shared: Arrays
    gate: Gate


def fitted_gate(predictions: Predictions) -> Gate:
    """The gate under which the tokens are likely; it starts at 1/2 everywhere, and both models stay as they are."""
    gate = Gate(predictions.hidden_TD)
    adamw = torch.optim.AdamW(gate.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    for _ in range(_STEPS):
        adamw.zero_grad()
        torch.autograd.backward(gate.nll(predictions).mean())
        adamw.step()
    return gate


def predictions(
    adapted: AdaptedModel, local: Arrays, shared: Arrays, sequences: Sequence[TokenSequence], batch_size: int
) -> Predictions:
    """What the model says with either adapter; the shared one stays loaded.

    Raises:
        ValueError: If there is no sequence, or an adapter does not fit the model.
    """
    if not sequences:
        raise ValueError("no sequences to predict")
    log_local_T, _ = _log_probabilities(adapted, local, sequences, batch_size)
    log_global_T, hidden_TD = _log_probabilities(adapted, shared, sequences, batch_size)
    return Predictions(log_local_T, log_global_T, hidden_TD)


def mixed_loss(gate: Gate, found: Predictions, num_examples: int) -> HeldOutLoss:
    """Loss of the mixture on the tokens of ``found``."""
    with torch.no_grad():
        nll = gate.nll(found).mean()
    return HeldOutLoss(loss=nll.item(), num_tokens=len(found.log_local_T), num_examples=num_examples)


def _log_probabilities(
    adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], batch_size: int
) -> tuple[Tensor, Tensor]:
    """(T,) log-probabilities of the response tokens, in order, and (T, D) the hidden states they were read from."""
    adapted.load_adapter(adapter)
    adapted.model.eval()
    log_p, hidden = [], []
    with torch.no_grad(), reading_hidden_states(adapted) as read:
        for first in range(0, len(sequences), batch_size):
            batch = collate(sequences[first : first + batch_size], adapted.tokenizer.pad_token_id)
            logits_TV, targets_T, counted = response_logits(adapted, batch)
            log_p.append(-functional.cross_entropy(logits_TV.float(), targets_T, reduction="none"))
            hidden.append(read.pop()[:, :-1][counted].float())
    return torch.cat(log_p), torch.cat(hidden)


class MixedTokens(LogitsProcessor, AbstractContextManager["MixedTokens"]):
    """Puts the mixture's log-probabilities in place of the global model's, while that generates.

    The local model reads the whole text anew for every token, since both share one network: slow, but without a second
    cache. To be used as a context, which watches what the global model reads and the hidden states that it ends in.
    """

    def __init__(self, adapted: AdaptedModel, local: Arrays, shared: Arrays, gate: Gate) -> None:
        self._adapted = adapted
        self._local = local
        self._shared = shared
        self._gate = gate
        self._hidden_BD = torch.empty(0)
        self._mask_BT: Tensor | None = None

    def __enter__(self) -> MixedTokens:
        network: Any = self._adapted.model.get_base_model()
        self._handles = [
            network.register_forward_pre_hook(self._watch_inputs, with_kwargs=True),
            network.get_output_embeddings().register_forward_pre_hook(self._watch_end),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _watch_inputs(self, module: nn.Module, inputs: object, named: dict[str, Any]) -> None:  # noqa: ARG002
        self._mask_BT = named.get("attention_mask")  # transformers leaves it out where nothing is padded

    def _watch_end(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG002
        self._hidden_BD = inputs[0][:, -1].float()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) log-probabilities of the token after ``input_ids`` (B, time), which are padded on the left."""
        logit_B1 = self._gate(self._hidden_BD).unsqueeze(1)
        mask_BT = torch.ones_like(input_ids) if self._mask_BT is None else self._mask_BT
        self._adapted.load_adapter(self._local)
        with torch.no_grad():
            output = self._adapted.model(
                input_ids=input_ids,
                attention_mask=mask_BT,
                position_ids=(mask_BT.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
            )
        self._adapted.load_adapter(self._shared)
        log_local_BV = output.logits[:, -1].float().log_softmax(dim=-1)
        return log_mixture(logit_B1, log_local_BV, scores.float().log_softmax(dim=-1))
