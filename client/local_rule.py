"""What a method may add to the local loop: a loss of its own or a term of it, corrected gradients, measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from client.evaluation.held_out import response_nll
from client.model import AdaptedModel
from client.routing import ExpertTokenCounter
from client.text import TokenSequence, collate
from strategies.adapters import Arrays


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step of the local loop: what its gradients are to be computed from, and with."""

    chosen: Sequence[TokenSequence]
    """This step's batch."""
    adapted: AdaptedModel
    """The model, in training mode."""
    counter: ExpertTokenCounter
    """Wants to be told which tokens are real before each forward pass that trains."""
    micro_batch: int
    """Sequences of a forward and backward pass, at most."""
    loss_scale: float
    """What a loss is multiplied with before its backward pass; the loop divides the gradients by it."""

    def passes(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Indices of the sequences in groups of ``micro_batch``, alike in length to save padding; the longest first."""
        lengths = [len(sequence.input_ids) for sequence in sequences]
        order = sorted(range(len(sequences)), key=lambda index: lengths[index], reverse=True)
        return [order[first : first + self.micro_batch] for first in range(0, len(order), self.micro_batch)]


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What a step's gradients are those of."""

    total: float
    """Sum over the response tokens of ``sequences`` of the loss, without proximal term and penalty."""
    sequences: Sequence[TokenSequence]
    """What the passes went over."""

    @property
    def num_tokens(self) -> int:
        """Response tokens of the passes."""
        return sum(sequence.num_targets for sequence in self.sequences)


class LocalRule:
    """One site's part of a method in one round of training; this one trains on the supervised loss and adds nothing.

    The loop calls ``accumulate`` and then ``correct`` once a step. Supervised, ``accumulate`` calls ``begin_pass``
    before each forward pass and ``penalty`` after it.
    """

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Held while training lasts, for hooks on the model."""
        yield

    def accumulate(self, step: Step) -> StepLoss:
        """Add the gradients of one step's loss, times ``step.loss_scale``, to those of the adapter's parameters.

        The loss is the mean over the response tokens of all passes together, so it is that of the undivided batch; a
        rule's penalty is the mean over all real tokens.
        """
        num_tokens = sum(sequence.num_targets for sequence in step.chosen)
        num_real = sum(len(sequence.input_ids) for sequence in step.chosen)
        total = torch.zeros((), device=step.adapted.device)
        for indices in step.passes(step.chosen):
            batch = collate([step.chosen[index] for index in indices], step.adapted.tokenizer.pad_token_id)
            step.counter.set_mask(batch["token_mask"])
            self.begin_pass(batch["token_mask"])
            nll, _ = response_nll(step.adapted, batch)
            objective = nll * (step.loss_scale / num_tokens)
            penalty = self.penalty()
            if penalty is not None:
                objective = objective + penalty * (step.loss_scale / num_real)
            torch.autograd.backward(objective)
            total += nll.detach()
        return StepLoss(total=total.item(), sequences=step.chosen)

    def begin_pass(self, token_mask: torch.Tensor) -> None:
        """A forward pass follows; ``token_mask`` is bool (batch, time), true for all but padding."""

    def penalty(self) -> torch.Tensor | None:
        """Term of the loss from the pass just made: float32, a sum over its real tokens, which the step averages."""
        return None

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Change a step's gradients in place, before they are clipped; a gradient may be None, which means zero."""

    def metrics(self) -> dict[str, float]:
        """Scalars of this round for the run's records; they are sent with the update."""
        return {}

    def to_send(self) -> Arrays:
        """What goes to the server beside the adapter, float32: ``ClientUpdate.extras``."""
        return {}

    def to_keep(self) -> Arrays:
        """What the site keeps for its next round; the names begin with the method's own and a slash."""
        return {}
