"""Completions with all that a policy gradient needs to know of them: rewards, log-probabilities, advantages.

Shape suffixes: N completions, C tokens of one completion, T tokens of several, D model width, M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.alignment.critic import Critic
from client.alignment.policy_gradient import (
    generalised_advantages,
    group_advantages,
    kl_estimates,
    token_rewards,
    whitened,
)
from client.alignment.rewards import Rewards
from client.alignment.rollouts import Rollout, reference_log_probabilities, sample, sampled_log_probabilities
from client.model import AdaptedModel
from client.prompts import PromptSequence
from client.text import collate


@dataclass(frozen=True)
class Experience:
    """A rollout, scored, with the probabilities of its tokens at the time; lists have an entry for each completion."""

    rollout: Rollout
    rewards_NM: NDArray[np.float64]
    old_log_p: list[Tensor]
    """(C,) each, under the policy that sampled them."""
    reference_log_p: list[Tensor]
    """(C,) each, under the base model."""
    hidden: list[Tensor]
    """(C, D) each: the hidden states that the tokens were predicted from."""

    @property
    def kl(self) -> float:
        """Estimate of KL(policy || reference) of a completion, nats."""
        pairs = zip(self.old_log_p, self.reference_log_p, strict=True)
        return float(np.mean([kl_estimates(log_p_C, reference_C).sum().item() for log_p_C, reference_C in pairs]))

    @property
    def num_tokens(self) -> int:
        """Tokens of all completions."""
        return sum(len(log_p_C) for log_p_C in self.old_log_p)


def gather(
    adapted: AdaptedModel,
    prompts: Sequence[PromptSequence],
    rewards: Rewards,
    *,
    per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
) -> Experience:
    """Sample, score and judge; draws from torch's generator.

    Args:
        adapted: The model, with the policy's adapter loaded.
        prompts: At least one.
        rewards: The objectives.
        per_prompt: Completions of each prompt.
        max_new_tokens: Tokens of a completion, at most.
        temperature: Of the policy.
        batch_size: Sequences of a forward pass that judges.

    Raises:
        ValueError: Naming the reward, if one returns anything but a finite number for each completion.
    """
    rollout = sample(adapted, prompts, per_prompt=per_prompt, max_new_tokens=max_new_tokens, temperature=temperature)
    scores_NM = rewards.score(rollout.prompts, rollout.completions)
    old: list[Tensor] = []
    reference: list[Tensor] = []
    hidden: list[Tensor] = []
    for first in range(0, len(rollout.sequences), batch_size):
        chosen = rollout.sequences[first : first + batch_size]
        lengths = [sequence.num_targets for sequence in chosen]
        batch = collate(chosen, adapted.tokenizer.pad_token_id)
        log_p_T, hidden_TD = sampled_log_probabilities(adapted, batch, temperature)
        old += torch.split(log_p_T, lengths)
        hidden += torch.split(hidden_TD, lengths)
        reference += torch.split(reference_log_probabilities(adapted, batch, temperature), lengths)
    return Experience(rollout, scores_NM, old, reference, hidden)


def advantages_by_group(experience: Experience, group_size: int) -> list[Tensor]:
    """(C, M) each: a completion's advantage over the others of its prompt, the same for all its tokens."""
    device = experience.old_log_p[0].device
    advantages_NM = group_advantages(
        torch.tensor(experience.rewards_NM, dtype=torch.float32, device=device), group_size
    )
    rows = zip(experience.old_log_p, advantages_NM, strict=True)
    return [row_M.expand(len(log_p_C), -1) for log_p_C, row_M in rows]


def advantages_by_critic(
    experience: Experience, critic: Critic, *, kl: float, discount: float, decay: float
) -> tuple[list[Tensor], list[Tensor]]:
    """(C, M) each: advantages, whitened over all tokens, and the returns that the critic is to learn.

    Args:
        experience: The completions.
        critic: Gives the value of each state.
        kl: Weight of the KL divergence in each token's reward.
        discount: GAE's gamma.
        decay: GAE's lambda.
    """
    device = experience.old_log_p[0].device
    rewards_NM = torch.tensor(experience.rewards_NM, dtype=torch.float32, device=device)
    advantages, returns = [], []
    with torch.no_grad():
        for index, rewards_M in enumerate(rewards_NM):
            log_ratio_C = experience.old_log_p[index] - experience.reference_log_p[index]
            values_CM = critic(experience.hidden[index])
            found_CM = generalised_advantages(token_rewards(rewards_M, log_ratio_C, kl), values_CM, discount, decay)
            advantages.append(found_CM)
            returns.append(found_CM + values_CM)
    return whitened(advantages), returns
