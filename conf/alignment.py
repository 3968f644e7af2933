"""Settings of the methods that align a model with preferences: FIRM and federated DPO."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from conf.methods import MethodConfig
from strategies.base import require

MIN_PROMPT_TOKENS = 8
"""A prompt that may have less is a mistake in the settings."""
BUILT_IN_REWARDS = frozenset({"brevity", "format", "length", "sentiment"})
"""Rewards that need no model; any other has a source."""


REWARD_TEXTS = re.compile(r"\{prompt\}|\{response\}")
"""The two places of ``FirmConfig.reward_formats``."""


class Estimator(Enum):
    """Where advantages come from."""

    group = "group"
    """Each completion is compared with the others of its prompt; no critic (GRPO)."""
    ppo = "ppo"
    """A value head per objective, kept at the site, and GAE over tokens."""


class Regulariser(Enum):
    """What holds the weights of the objectives, beside the length of the combined gradient."""

    ridge = "ridge"
    """beta / 2 ||lambda||^2; knows no preference."""
    anchor = "anchor"
    """beta / 2 ||lambda - preference||^2; with equal preferences the same as ridge."""
    weighted = "weighted"
    """beta / 2 sum of lambda_j^2 / preference_j."""


class Gram(Enum):
    """What the products of the objectives' gradients are taken from."""

    whole = "whole"
    """A step's gradients, noise included."""
    halves = "halves"
    """Two gradients, each of half of a step's prompts: what they have in common, without the noise."""


def preference_of(preference: Sequence[float] | None, num_objectives: int) -> list[float]:
    """The preference over so many objectives; equal ones if none is given."""
    return [1 / num_objectives] * num_objectives if preference is None else list(preference)


def check_preference(preference: object, num_objectives: int, key: str) -> None:
    """Raise ``ValueError`` unless there is a weight >= 0 for each objective and they sum to 1."""
    limit = f"null or {num_objectives} weights >= 0 that sum to 1, one for each objective"
    fits = isinstance(preference, Sequence) and len(preference) == num_objectives
    weights = (
        [value for value in preference if isinstance(value, int | float)] if isinstance(preference, Sequence) else []
    )
    fits = fits and len(weights) == num_objectives and all(0 <= weight <= 1 for weight in weights)
    require(preference is None or (fits and math.isclose(sum(weights), 1, abs_tol=1e-6)), key, limit, preference)


@dataclass(kw_only=True)
class AlignmentConfig(MethodConfig, ABC):
    """What both methods have in common: whose preferences count."""

    preference: list[float] | None = None
    """Weight of each objective, in their order, summing to 1; null: equal ones. A real site's own
    ``preference=0.7,0.3`` in its node config wins."""
    site_preferences: dict[str, Any] = field(default_factory=dict)
    """Simulated site -> its own preference; all others have ``preference``."""

    @abstractmethod
    def num_objectives(self) -> int:
        """How many objectives the settings name."""

    def _check_preferences(self) -> None:
        check_preference(self.preference, self.num_objectives(), "method.preference")
        for site, preference in self.site_preferences.items():
            check_preference(preference, self.num_objectives(), f"method.site_preferences.{site}")


@dataclass(kw_only=True)
class FirmConfig(AlignmentConfig):
    """Policy gradients of several rewards, combined at each site by regularised min-norm weights."""

    name: ClassVar[str] = "firm"
    rewards: list[str] = field(default_factory=lambda: ["brevity", "format"])
    """Objectives, each ``NAME`` (length, brevity, format, sentiment) or ``NAME:SOURCE``, a source being a folder of
    ``bouquet reward train`` or a folder or hub name of a sequence classifier. A real site's own
    ``rewards="NAME:SOURCE,..."`` in its node config says where it has one."""
    reward_formats: dict[str, str] = field(default_factory=dict)
    """Name of a classifier among them -> the text that it was trained to score: ``{prompt}``, then ``{response}``, and
    ``\\n`` for a line break; its tokenizer adds special tokens of its own. Without one: the tokenizer's chat template,
    else a pair of texts. A folder of ``bouquet reward train`` has its own."""
    estimator: Estimator = Estimator.group
    group_size: int = 4
    """Completions of each prompt; a step samples ``train.batch_size`` prompts."""
    max_new_tokens: int = 32
    """Length of a completion at most; ``data.max_length`` holds prompt and completion."""
    temperature: float = 1.0
    """The policy is the model at this sampling temperature."""
    regulariser: Regulariser = Regulariser.anchor
    beta: float = 0.1
    """Its strength, on a Gram matrix divided by the mean squared length of the gradients; 0: MGDA at each site;
    inf: the weights are the preference, linear scalarisation."""
    gram: Gram = Gram.whole
    """What that matrix is made from; ``halves`` is ours, and needs ``train.batch_size`` >= 2."""
    rho: float = 1.0
    """Share of a step's new weights in those used, the rest being the last step's; 1: no smoothing."""
    kl: float = 0.05
    """Weight of the KL divergence from the base model, in nats a token. With ``estimator=group`` it is a term of every
    objective's loss (GRPO's), beside advantages whose deviation is 1; with ``ppo`` it is taken off the rewards, in
    their unit."""
    clip: float = 0.2
    """How far PPO lets the ratio of new to old policy go from 1."""
    steps_per_rollout: int = 1
    """Optimiser steps on the same completions; with 1 no ratio is ever clipped."""
    discount: float = 1.0
    """GAE's gamma, with ``estimator=ppo``."""
    decay: float = 0.95
    """GAE's lambda, with ``estimator=ppo``."""
    critic_learning_rate: float = 1e-2
    """Adam's, for the value heads of ``estimator=ppo``."""
    eval_prompts: int = 32
    """Held-out prompts, the first of the site's set, on which rewards and KL are measured; 0: none."""
    send_weights: bool | None = None
    """Whether a site sends its mean weight of each objective with its metrics; null: in a simulation only."""

    def num_objectives(self) -> int:
        """One for each reward."""
        return len(self.rewards)

    def __post_init__(self) -> None:
        names = [spec.partition(":")[0] for spec in self.rewards]
        distinct = len(names) >= 1 and all(names) and len(set(names)) == len(names)
        require(distinct, "method.rewards", "a list of rewards with different names", self.rewards)
        self._check_reward_formats()
        self._check_preferences()
        equal = len({*preference_of(self.preference, len(names))}) == 1 and not self.site_preferences
        ridge = self.regulariser is Regulariser.ridge
        require(not ridge or equal, "method.regulariser", "anchor or weighted with a preference", self.regulariser.name)
        chosen = [self.preference, *self.site_preferences.values()]
        positive = all(0 not in preference for preference in chosen if preference is not None)
        weighted = self.regulariser is Regulariser.weighted
        require(
            not weighted or positive, "method.preference", "> 0 everywhere with method.regulariser=weighted", chosen
        )
        alone = self.estimator is Estimator.group and self.group_size < 2
        require(self.group_size >= 1, "method.group_size", ">= 1", self.group_size)
        require(not alone, "method.group_size", ">= 2 with method.estimator=group", self.group_size)
        require(self.max_new_tokens >= 1, "method.max_new_tokens", ">= 1", self.max_new_tokens)
        require(0 < self.temperature < math.inf, "method.temperature", "> 0", self.temperature)
        require(self.beta >= 0, "method.beta", ">= 0, or inf", self.beta)
        require(0 < self.rho <= 1, "method.rho", "in (0, 1]", self.rho)
        require(0 <= self.kl < math.inf, "method.kl", ">= 0", self.kl)
        require(0 < self.clip < 1, "method.clip", "in (0, 1)", self.clip)
        require(self.steps_per_rollout >= 1, "method.steps_per_rollout", ">= 1", self.steps_per_rollout)
        require(0 <= self.discount <= 1, "method.discount", "in [0, 1]", self.discount)
        require(0 <= self.decay <= 1, "method.decay", "in [0, 1]", self.decay)
        rate = self.critic_learning_rate
        require(0 < rate < math.inf, "method.critic_learning_rate", "> 0", rate)
        require(self.eval_prompts >= 0, "method.eval_prompts", ">= 0", self.eval_prompts)

    def _check_reward_formats(self) -> None:
        learnt = [spec.partition(":")[0] for spec in self.rewards if spec not in BUILT_IN_REWARDS]
        for name, text in self.reward_formats.items():
            require(name in learnt, "method.reward_formats", f"for one of {learnt}, the rewards with a source", name)
            asked = REWARD_TEXTS.findall(text) == ["{prompt}", "{response}"]
            require(asked, f"method.reward_formats.{name}", "a text with {prompt} and then {response}, once each", text)


@dataclass(kw_only=True)
class DpoConfig(AlignmentConfig):
    """Direct preference optimisation on pairs of responses (https://arxiv.org/abs/2305.18290)."""

    name: ClassVar[str] = "dpo"
    objectives: list[str] = field(default_factory=list)
    """Values of ``data.objective_column`` that are trained on, each with its weight; empty: every pair counts alike."""
    beta: float = 0.1
    """Beta of Eq. 7: how strongly the policy is held to the base model."""

    def num_objectives(self) -> int:
        """One for each value named; one if none is."""
        return max(1, len(self.objectives))

    def __post_init__(self) -> None:
        distinct = len(set(self.objectives)) == len(self.objectives)
        require(distinct, "method.objectives", "different values", self.objectives)
        self._check_preferences()
        require(0 < self.beta < math.inf, "method.beta", "> 0", self.beta)
