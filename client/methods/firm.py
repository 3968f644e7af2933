"""FIRM at a site: several rewards, one rollout, one step along a combination that the site finds for itself.

Shape suffixes: T tokens, M objectives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from client.alignment.critic import Critic
from client.alignment.experience import Experience, advantages_by_critic, advantages_by_group, gather
from client.alignment.objective_gradients import ObjectiveGradients
from client.alignment.objective_weights import ObjectiveWeights, OwnWeights, ServerWeights
from client.alignment.policy_gradient import clipped_losses, kl_estimates
from client.alignment.reward_models import named_rewards
from client.alignment.rewards import Rewards
from client.alignment.rollouts import token_log_probabilities
from client.local_rule import LocalRule, Step, StepLoss
from client.memory import Passes
from client.methods.base import Method
from client.model import AdaptedModel
from client.private import under
from client.prompts import PromptSequence, prompt_sequences
from client.text import Example, TokenSequence, collate, response_sequence
from conf.alignment import Estimator, FirmConfig, Gram, preference_of
from conf.methods import MethodConfig
from conf.schema import DataConfig
from strategies.adapters import Arrays
from strategies.fedcmoo import WEIGHTS

_CRITIC = "firm/critic/"
_EVALUATION_SEED = 0
"""Every adapter is measured with the same draws."""


class Firm(Method):
    """Federated in-client regularised multi-objective alignment (Nourzad et al. 2025, https://arxiv.org/abs/2511.16992).

    Of the paper only the abstract is public to us. From it: each client solves a regularised multi-objective problem
    for itself at each step, it sends one set of adapted parameters, the regularisation keeps clients from choosing
    different trade-offs, and preferences over the objectives can be given. Everything else is a reconstruction: with
    the gradients g_j of M policy-gradient losses on the adapter, from one rollout, and Q their Gram matrix over the
    mean of its diagonal, lambda minimises lambda' Q lambda plus a regulariser of strength beta
    (``client.alignment.min_norm``), and the step goes along sum_j lambda_j g_j. beta = 0 is MGDA at each site,
    beta = inf linear scalarisation. Ours too: the estimators (GRPO's groups, or PPO with a value head per objective),
    KL to the base model in every objective, the smoothing of lambda, and Q from two halves of a step's prompts
    (``method.gram=halves``), which keeps the noise of a rollout from passing for steepness. Halves are not quite
    independent with a critic, whose advantages are whitened over both, nor in later steps on the same rollout.

    Only the adapter is sent. Value heads and lambda stay in the private store, and Adam's moments if they are kept;
    mean rewards, KL and, if ``method.send_weights``, the round's mean lambda are among the metrics. Under
    ``strategy=fedcmoo`` the server chooses lambda, and gets the first step's gradients for it.
    """

    def __init__(self, config: MethodConfig) -> None:
        """Take the settings under ``method.``."""
        assert isinstance(config, FirmConfig)
        self.config = config

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Everything trained is sent."""
        return True

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> Sequence[TokenSequence]:
        """Prompts; the responses of the data are there for the held-out loss alone."""
        return prompt_sequences(examples, tokenizer, data, self.config.max_new_tokens)

    def passes_over(self, sequences: Sequence[TokenSequence]) -> Passes:
        """Prompts with completions of full length, as many as a rollout has of each; a gradient of each objective."""
        full = [0] * self.config.max_new_tokens
        longest = [response_sequence(prompt.prompt_ids, full) for prompt in _as_prompts(sequences)]
        kept = self.config.num_objectives() * (2 if self.config.gram is Gram.halves else 1)
        # One more, since autograd makes them one by one.
        return Passes(
            longest * self.config.group_size, self.config.group_size, kept_gradients=kept + 1, are_sampled=True
        )

    def local_rule(self, adapted: AdaptedModel, broadcast: Arrays, private: Arrays) -> LocalRule:
        """Policy gradients, combined by the site's own weights, or by the server's if it sends any (FedCMOO).

        Raises:
            ValueError: If a reward cannot be had.
        """
        rewards = named_rewards(self.config.rewards, adapted, self.config.reward_formats)
        if WEIGHTS in broadcast:
            weights = ServerWeights(broadcast, len(rewards.names), adapted)
            return InClientAlignment(self.config, rewards, private, weights)
        return InClientAlignment(self.config, rewards, private)

    def measures(
        self, adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], batch_size: int
    ) -> dict[str, float]:
        """Mean rewards, KL and length of completions sampled for the first ``eval_prompts`` prompts."""
        prompts = _as_prompts(sequences)[: self.config.eval_prompts]
        rewards = named_rewards(self.config.rewards, adapted, self.config.reward_formats)
        sums: dict[str, float] = defaultdict(float)
        adapted.load_adapter(adapter)
        with torch.random.fork_rng(devices=[adapted.device] if adapted.device.type == "cuda" else []):
            torch.manual_seed(_EVALUATION_SEED)
            for first in range(0, len(prompts), batch_size):
                chosen = prompts[first : first + batch_size]
                experience = gather(
                    adapted, chosen, rewards, per_prompt=1, max_new_tokens=self.config.max_new_tokens,
                    temperature=self.config.temperature, batch_size=batch_size,
                )  # fmt: skip
                for name, value in _measures(experience, rewards.names).items():
                    sums[name] += value * len(chosen)
        return {f"held_out_{name}": total / len(prompts) for name, total in sums.items()}


class InClientAlignment(LocalRule):
    """One site's rounds of FIRM: what a step's gradients are, and lambda."""

    def __init__(
        self, config: FirmConfig, rewards: Rewards, private: Arrays, weights: ObjectiveWeights | None = None
    ) -> None:
        """Begin a round; ``weights``: who weighs the objectives, by default the site itself."""
        self._config = config
        self._rewards = rewards
        self._preference_M = np.array(preference_of(config.preference, len(rewards.names)))
        self._critic_arrays = under(_CRITIC, private)
        self._critic: Critic | None = None
        self._weights = weights or OwnWeights(config, len(rewards.names), private)
        self._experience: Experience | None = None
        self._advantages: list[Tensor] = []
        self._returns: list[Tensor] = []
        self._num_steps = 0
        self._num_rollouts = 0
        self._weights_sum_M = np.zeros(len(rewards.names))
        self._measured: dict[str, float] = defaultdict(float)

    def accumulate(self, step: Step) -> StepLoss:
        """The gradients of the objectives' losses, combined; a new rollout every ``steps_per_rollout`` steps.

        Batches between two rollouts are passed over. The loss that is reported is for people: KL of a completion at its
        weight less the mean rewards at the site's preference. What the step lowers is in units of an advantage.
        """
        if self._num_steps % self._config.steps_per_rollout == 0:
            self._experience = self._gather(step)
        experience = self._experience
        assert experience is not None
        self._num_steps += 1
        sequences = experience.rollout.sequences
        # A single prompt has no halves: then its gradients are compared as they are.
        num_parts = min(self._weights.num_parts, len(sequences) // self._config.group_size)
        parameters = [*step.adapted.parameters_by_name().values()]
        gradients = ObjectiveGradients(parameters, len(self._rewards.names), num_parts)
        for part, chosen in enumerate(_by_prompts(len(sequences), self._config.group_size, num_parts)):
            for indices in step.passes([sequences[index] for index in chosen]):
                losses_M = self._losses(step, experience, [chosen[index] for index in indices])
                gradients.add(losses_M, step.loss_scale, part)
        weights_M = self._weights.of(gradients)
        gradients.combine(weights_M, step.loss_scale)
        self._weights_sum_M += weights_M
        if self._critic is not None:
            self._critic.fit(torch.cat(experience.hidden), torch.cat(self._returns))
        objective = self._config.kl * experience.kl - float(experience.rewards_NM.mean(axis=0) @ self._preference_M)
        return StepLoss(total=objective * experience.num_tokens, sequences=sequences)

    def metrics(self) -> dict[str, float]:
        """Means over the round's rollouts and, of lambda, over its steps."""
        found = {name: total / self._num_rollouts for name, total in self._measured.items()}
        if self._config.send_weights:
            weights_M = self._weights_sum_M / self._num_steps
            found |= {
                f"lambda/{name}": float(weight) for name, weight in zip(self._rewards.names, weights_M, strict=True)
            }
        return found

    def to_send(self) -> Arrays:
        """What the server needs to weigh the objectives, if it does."""
        return self._weights.to_send()

    def to_keep(self) -> Arrays:
        """Lambda and the value heads."""
        critic = self._critic.arrays() if self._critic is not None else {}
        return {**self._weights.to_keep(), **{_CRITIC + name: array for name, array in critic.items()}}

    def _gather(self, step: Step) -> Experience:
        config = self._config
        step.counter.pause()
        experience = gather(
            step.adapted, _as_prompts(step.chosen), self._rewards, per_prompt=config.group_size,
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, batch_size=step.micro_batch,
        )  # fmt: skip
        self._num_rollouts += 1
        for name, value in _measures(experience, self._rewards.names).items():
            self._measured[name] += value
        if config.estimator is Estimator.group:
            self._advantages = advantages_by_group(experience, config.group_size)
        else:
            self._advantages, self._returns = advantages_by_critic(
                experience, self._critic_for(experience), kl=config.kl, discount=config.discount, decay=config.decay
            )
        return experience

    def _critic_for(self, experience: Experience) -> Critic:
        if self._critic is None:
            hidden_CD = experience.hidden[0]
            self._critic = Critic(
                hidden_CD.shape[-1], len(self._rewards.names), self._config.critic_learning_rate, hidden_CD.device
            )
            if self._critic_arrays:
                self._critic.load(self._critic_arrays)
        return self._critic

    def _losses(self, step: Step, experience: Experience, indices: Sequence[int]) -> Tensor:
        """(M,) each objective's part of the loss from one pass: a mean over the tokens of the whole rollout.

        With groups KL is a term of every loss (GRPO, Eq. 3), so the combined loss has it once; with a critic it is in
        the rewards already.
        """
        sequences = [experience.rollout.sequences[index] for index in indices]
        old_T, reference_T, advantages_TM = (
            torch.cat([part[index] for index in indices])
            for part in (experience.old_log_p, experience.reference_log_p, self._advantages)
        )
        batch = collate(sequences, step.adapted.tokenizer.pad_token_id)
        step.counter.set_mask(batch["token_mask"])
        log_p_T = token_log_probabilities(step.adapted, batch, self._config.temperature)
        losses_M = clipped_losses(log_p_T, old_T, advantages_TM, self._config.clip).sum(dim=0)
        if self._config.estimator is Estimator.group:
            losses_M = losses_M + self._config.kl * kl_estimates(log_p_T, reference_T).sum()
        return losses_M / experience.num_tokens


def _by_prompts(num_completions: int, group_size: int, num_parts: int) -> list[list[int]]:
    """Indices of the completions in parts; those of a prompt, whose advantages depend on each other, in the same."""
    prompts = np.array_split(np.arange(num_completions).reshape(-1, group_size), num_parts)
    return [part.ravel().tolist() for part in prompts]


def _measures(experience: Experience, names: Sequence[str]) -> dict[str, float]:
    """Mean rewards, KL in nats and tokens of a completion."""
    means_M = experience.rewards_NM.mean(axis=0)
    rewards = {f"reward/{name}": float(mean) for name, mean in zip(names, means_M, strict=True)}
    num_completions = len(experience.rollout.sequences)
    return {**rewards, "kl": experience.kl, "completion_tokens": experience.num_tokens / num_completions}


def _as_prompts(sequences: Sequence[TokenSequence]) -> Sequence[PromptSequence]:
    assert all(isinstance(sequence, PromptSequence) for sequence in sequences), "made by Firm.encode"
    return cast("Sequence[PromptSequence]", sequences)
