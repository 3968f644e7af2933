"""Rewards: prompts and completions as texts in, a number for each completion and objective out.

Shape suffixes: N completions, M objectives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Reward = Callable[[Sequence[str], Sequence[str]], NDArray[np.floating]]
"""(prompts, completions), N texts each, to (N,) finite numbers; higher is better, the unit is the reward's own."""

LONG_TEXT_CHARACTERS = 64
"""Where ``length`` has reached 1 and ``brevity`` 0."""


class Rewards:
    """The objectives of a site, by name."""

    def __init__(self, rewards: Mapping[str, Reward]) -> None:
        """Keep them in their order: the order of preferences and weights."""
        self._rewards = dict(rewards)

    @property
    def names(self) -> list[str]:
        """Names of the M objectives."""
        return list(self._rewards)

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.float64]:
        """(N, M) reward of each completion under each objective.

        Raises:
            ValueError: Naming the reward, if one returns anything but a finite number for each completion.
        """
        columns = [
            _checked(name, reward(prompts, completions), len(completions)) for name, reward in self._rewards.items()
        ]
        return np.stack(columns, axis=1)


def _checked(name: str, scores: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    try:
        found = np.asarray(scores, np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, texts, a tensor with gradients
        raise ValueError(
            f"reward {name!r} returned a {type(scores).__name__} that is not {count} numbers, one for each completion"
        ) from error
    if found.shape != (count,):
        raise ValueError(f"reward {name!r} returned the shape {found.shape} for {count} completions, not ({count},)")
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad):
        raise ValueError(f"reward {name!r} is {found[bad[0]]} for {len(bad)} of {count} completions; it must be finite")
    return found


def length(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.floating]:  # noqa: ARG001
    """In [0, 1], growing with the number of characters up to ``LONG_TEXT_CHARACTERS``."""
    return np.array([min(len(text.strip()) / LONG_TEXT_CHARACTERS, 1.0) for text in completions])


def brevity(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.floating]:
    """1 less ``length``: the two can only be traded for each other."""
    return 1.0 - length(prompts, completions)


_FORMAT = tuple(re.compile(pattern) for pattern in (r"^[A-Z0-9]", r"[.!?]$", r"^[^\n]+$"))
"""A capital or digit first; a full stop or its like at the end; one line."""


def sentence_format(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.floating]:  # noqa: ARG001
    """Share of three rules that a completion keeps: it begins like a sentence, ends like one, and is one line."""
    return np.array([np.mean([bool(rule.search(text)) for rule in _FORMAT]) for text in completions])


def sentiment(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.floating]:  # noqa: ARG001
    """VADER's compound score in [-1, 1] of an English text, by a lexicon (Hutto and Gilbert 2014).

    Raises:
        ValueError: If the package vaderSentiment is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415 - an optional dependency
    except ImportError as error:
        raise ValueError(
            "reward 'sentiment' needs the package vaderSentiment: pip install 'bouquet-fl[rewards]'"
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in completions])


PROGRAMMATIC: Mapping[str, Reward] = {
    "length": length,
    "brevity": brevity,
    "format": sentence_format,
    "sentiment": sentiment,
}
"""Rewards that need no model."""
