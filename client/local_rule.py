"""What a method may add to the local loop: a term of the loss, a change of the gradients, something measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from strategies.adapters import Arrays


class LocalRule:
    """One site's part of a method in one round of training; this one adds nothing.

    The loop calls ``begin_pass`` before each forward pass and ``penalty`` after it, and ``correct`` once a step.
    """

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Held while training lasts, for hooks on the model."""
        yield

    def begin_pass(self, token_mask: torch.Tensor) -> None:
        """A forward pass follows; ``token_mask`` is bool (batch, time), true for all but padding."""

    def penalty(self) -> torch.Tensor | None:
        """Term of the loss from the pass just made: float32, a sum over its real tokens, which the step averages."""
        return None

    def correct(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Change a step's gradients in place, before they are clipped; a gradient may be None, which means zero."""

    def to_send(self) -> Arrays:
        """What goes to the server beside the adapter, float32: ``ClientUpdate.extras``."""
        return {}

    def to_keep(self) -> Arrays:
        """What the site keeps for its next round; the names begin with the method's own and a slash."""
        return {}
