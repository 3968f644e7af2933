"""From scored completions to advantages, on completions that are written down."""

import numpy as np
import pytest
import torch

from client.alignment.critic import Critic
from client.alignment.experience import Experience, advantages_by_critic, advantages_by_group
from client.alignment.policy_gradient import whitened
from client.alignment.rollouts import Rollout

WIDTH = 4


@pytest.fixture
def experience():
    """Two prompts with two completions of 1 to 4 tokens each, and two rewards; policy and reference differ."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 4, 2]
    parts = [[torch.randn(length, generator=generator) for length in lengths] for _ in range(2)]
    hidden = [torch.randn(length, WIDTH, generator=generator) for length in lengths]
    rewards = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.5], [1.0, 0.5]])
    return Experience(Rollout([], [], []), rewards, *parts, hidden)


def test_a_groups_better_completion_has_the_advantage_on_all_its_tokens(experience):
    found = advantages_by_group(experience, 2)
    expected = [[1, -1], [-1, 1], [1, 0], [-1, 0]]
    for advantages, row, log_p in zip(found, expected, experience.old_log_p, strict=True):
        torch.testing.assert_close(advantages, torch.tensor([row] * len(log_p)).float(), rtol=1e-4, atol=1e-4)


def test_an_ignorant_critic_leaves_each_token_its_completions_reward_less_the_kl_to_come(experience):
    """Values 0, no discount and no decay: the return of a token is r - kl * the sum of log ratios from it on."""
    critic = Critic(WIDTH, 2, 0.1, torch.device("cpu"))
    advantages, returns = advantages_by_critic(experience, critic, kl=0.5, discount=1.0, decay=1.0)
    for index, found in enumerate(returns):
        log_ratio = experience.old_log_p[index] - experience.reference_log_p[index]
        for token in range(len(log_ratio)):
            expected = experience.rewards_NM[index] - 0.5 * float(log_ratio[token:].sum())
            np.testing.assert_allclose(found[token], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(advantages), torch.cat(whitened(returns)))


def test_a_critic_that_knows_the_returns_leaves_no_advantage(experience):
    """Without whitening's division by nothing: what it adds to the values is what GAE found."""
    rewards = np.ones_like(experience.rewards_NM)
    critic = Critic(WIDTH, 2, 0.1, torch.device("cpu"))
    critic.load({"weight": np.zeros((2, WIDTH), np.float32), "bias": np.ones(2, np.float32)})
    known = Experience(experience.rollout, rewards, experience.old_log_p, experience.old_log_p, experience.hidden)
    advantages, returns = advantages_by_critic(known, critic, kl=0.5, discount=1.0, decay=0.9)
    assert all(torch.allclose(part, torch.ones_like(part)) for part in returns)
    assert all(part.abs().max() < 1e-3 for part in advantages)
    assert known.kl == 0
