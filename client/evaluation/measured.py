"""What a site tells of how good its models are: numbers alone. No torch: whoever passes messages on reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

BASE, GLOBAL, PERSONAL = "base", "global", "personal"
"""The models of a run: as pre-trained, the server's, and the one in use at a site where that is another."""
MODELS = (BASE, GLOBAL, PERSONAL)

METRICS = {"loss": "held-out loss", "rouge_l": "ROUGE-L", "accuracy": "accuracy"}
"""Numbers of a test that are compared -> their titles."""
LOWER_IS_BETTER = {"loss"}
_ROUNDING = 1e-6


def is_general(name: str) -> bool:
    """Whether a set is no site's: no site's name has stars."""
    return name.startswith("*")


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model on one set; None for what was not measured there."""

    loss: float | None = None
    """Mean negative log-likelihood, nats per response token."""
    num_tokens: int = 0
    """Response tokens of ``loss``."""
    num_examples: int = 0
    rouge_l: float | None = None
    """Mean ROUGE-L F-measure of greedy answers against the responses, 0 to 1."""
    num_answers: int = 0
    accuracy: float | None = None
    """Share of multiple-choice questions whose right option is the likeliest, 0 to 1."""
    num_questions: int = 0

    def __post_init__(self) -> None:
        for name, limit in (("loss", math.inf), ("rouge_l", 1.0), ("accuracy", 1.0)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 <= value <= limit):
                raise ValueError(f"{name} must lie between 0 and {limit:g}, got {value}")
        for name in ("num_tokens", "num_examples", "num_answers", "num_questions"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A model on a set."""

    model: str
    """``BASE``, ``GLOBAL`` or ``PERSONAL`` (of the site that tells it)."""
    on: str
    """Name of the set: a site's, for its held-out data, or a general one's."""
    score: Score


@dataclass(frozen=True, kw_only=True)
class RelativeCost:
    """What the model in use at a site takes for the same tokens, as a multiple of the base with one adapter."""

    flops: float
    """Floating-point operations of matrix products and attention, counted."""
    seconds: float
    """Of the shortest of several passes that took turns."""

    def __post_init__(self) -> None:
        for name in ("flops", "seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"relative cost in {name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class ExpertUse:
    """How the tokens of a site's own held-out data are spread over one layer's experts by the model in use there."""

    shares: tuple[float, ...]
    """Of all choices, those of each expert; together 1."""

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in self.shares) or abs(sum(self.shares) - 1) > _ROUNDING:
            raise ValueError(f"shares of experts must lie between 0 and 1 and sum to 1, got {list(self.shares)[:8]}")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One site's part of the evaluation matrix."""

    scores: tuple[Scored, ...]
    cost: RelativeCost | None = None
    """None where the model in use takes what the global one does."""
    routing: Mapping[str, ExpertUse] = field(default_factory=dict)
    """By MoE layer; empty for a dense model."""

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Measured:
        """Out of foreign JSON, of the right types.

        Raises:
            ValueError: If a model is unknown, or a number is none or out of range.
            LookupError: If a key is missing.
            TypeError: If a value is of another kind.
        """
        cost = values["cost"]
        return Measured(
            scores=tuple(_scored(each) for each in values["scores"]),
            cost=None if cost is None else RelativeCost(flops=float(cost["flops"]), seconds=float(cost["seconds"])),
            routing={
                str(layer): ExpertUse(tuple(float(share) for share in use["shares"]))
                for layer, use in values["routing"].items()
            },
        )


def _scored(values: Mapping[str, Any]) -> Scored:
    if values["model"] not in {BASE, GLOBAL, PERSONAL}:
        raise ValueError(f"model must be {BASE}, {GLOBAL} or {PERSONAL}, got {values['model']!r}")
    score: dict[str, Any] = {}
    for name in (each.name for each in fields(Score)):
        value = values["score"][name]
        kind = int if name.startswith("num_") else float
        score[name] = None if value is None and kind is float else kind(value)
    return Scored(model=str(values["model"]), on=str(values["on"]), score=Score(**score))
