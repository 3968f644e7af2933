"""Advantages and losses of policy gradients with several objectives: pure functions of tensors.

Shape suffixes: N completions, C tokens of one completion, T tokens of several, M objectives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TINY = 1e-6
"""Added to a standard deviation: completions that are all alike have no advantage over each other."""


def group_advantages(rewards_NM: Tensor, group_size: int) -> Tensor:
    """(N, M) each reward less its group's mean, over its group's standard deviation, objective by objective.

    GRPO without a critic (Shao et al. 2024, Sect. 4.1.2, https://arxiv.org/abs/2402.03300). Normalising each objective
    by itself makes the result independent of the rewards' units.

    Args:
        rewards_NM: The completions of each prompt, one after the other.
        group_size: Completions of a prompt; N is a multiple of it.
    """
    groups = rewards_NM.view(-1, group_size, rewards_NM.shape[1])
    deviation, mean = torch.std_mean(groups, dim=1, correction=0, keepdim=True)
    return ((groups - mean) / (deviation + _TINY)).view_as(rewards_NM)


def token_rewards(rewards_M: Tensor, log_ratio_C: Tensor, kl: float) -> Tensor:
    """(C, M) reward of each token of one completion: less KL on the way, and the completion's own reward at its end.

    As in InstructGPT (Ouyang et al. 2022, Eq. 2, https://arxiv.org/abs/2203.02155).

    Args:
        rewards_M: Of the whole completion.
        log_ratio_C: log(policy / reference) of each token.
        kl: Its weight.
    """
    rewards_CM = (-kl * log_ratio_C).unsqueeze(1).repeat(1, len(rewards_M))
    rewards_CM[-1] += rewards_M
    return rewards_CM


def generalised_advantages(rewards_CM: Tensor, values_CM: Tensor, discount: float, decay: float) -> Tensor:
    """(C, M) sum over k of (discount * decay)^k delta_(t+k), delta_t = r_t + discount * V_(t+1) - V_t; 0 at the end.

    GAE (Schulman et al. 2016, Eq. 16, https://arxiv.org/abs/1506.02438).
    """
    following_CM = torch.cat([values_CM[1:], torch.zeros_like(values_CM[:1])])
    delta_CM = rewards_CM + discount * following_CM - values_CM
    advantages = torch.empty_like(delta_CM)
    later_M = torch.zeros_like(delta_CM[0])
    for token in range(len(delta_CM) - 1, -1, -1):
        later_M = delta_CM[token] + discount * decay * later_M
        advantages[token] = later_M
    return advantages


def whitened(advantages: Sequence[Tensor]) -> list[Tensor]:
    """The completions' (C, M) advantages with mean 0 and deviation 1 over all their tokens, objective by objective."""
    deviation_M, mean_M = torch.std_mean(torch.cat(list(advantages)), dim=0, correction=0)
    return [(advantages_CM - mean_M) / (deviation_M + _TINY) for advantages_CM in advantages]


def clipped_losses(log_p_T: Tensor, old_log_p_T: Tensor, advantages_TM: Tensor, clip: float) -> Tensor:
    """(T, M) PPO's loss of each token and objective, -min(ratio * A, clipped ratio * A).

    Schulman et al. 2017, Eq. 7, https://arxiv.org/abs/1707.06347. On the policy that sampled the tokens its gradient is
    REINFORCE's.

    Args:
        log_p_T: Log-probability of each token under the policy.
        old_log_p_T: The same under the policy that sampled it.
        advantages_TM: Of each token.
        clip: How far the ratio may be from 1.
    """
    ratio_T1 = (log_p_T - old_log_p_T).exp().unsqueeze(1)
    return -torch.minimum(ratio_T1 * advantages_TM, ratio_T1.clamp(1 - clip, 1 + clip) * advantages_TM)


def kl_estimates(log_p_T: Tensor, reference_log_p_T: Tensor) -> Tensor:
    """(T,) estimate of KL(policy || reference) from the policy's tokens: r - log r - 1 with r = reference / policy.

    The third of http://joschu.net/blog/kl-approx.html: unbiased, and never negative; GRPO's, Eq. 4. As a loss on
    samples of the policy itself its gradient is that of KL(reference || policy), which flattens far from the reference.
    """
    log_ratio_T = reference_log_p_T - log_p_T
    return log_ratio_T.exp() - log_ratio_T - 1
