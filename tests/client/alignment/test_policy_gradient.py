"""Advantages and losses against loops written out, and against what their gradients are known to be."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.alignment.policy_gradient import (
    clipped_losses,
    generalised_advantages,
    group_advantages,
    kl_estimates,
    token_rewards,
    whitened,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_group_advantages_by_hand():
    """Two prompts, two completions, one objective: 1 and 3 are a deviation of 1 from their mean; 5 and 5 are equal."""
    advantages = group_advantages(torch.tensor([[1.0], [3.0], [5.0], [5.0]]), 2)
    torch.testing.assert_close(advantages, torch.tensor([[-1.0], [1.0], [0.0], [0.0]]), rtol=1e-5, atol=1e-6)


def test_group_advantages_against_a_loop():
    rewards = random(6, 2)
    found = group_advantages(rewards, 3).numpy()
    for prompt in range(2):
        for objective in range(2):
            group = rewards[3 * prompt : 3 * prompt + 3, objective].numpy()
            expected = (group - group.mean()) / (group.std() + 1e-6)
            np.testing.assert_allclose(found[3 * prompt : 3 * prompt + 3, objective], expected, rtol=1e-4)


@given(st.floats(0.1, 100), st.floats(-100, 100))
def test_group_advantages_do_not_depend_on_a_rewards_unit(scale, shift):
    rewards = random(8, 2).double()
    torch.testing.assert_close(
        group_advantages(rewards * scale + shift, 4), group_advantages(rewards, 4), rtol=1e-3, atol=1e-4
    )


def naive_gae(rewards, values, discount, decay):
    """The double sum of Eq. 16, for one objective."""
    count = len(rewards)
    delta = [rewards[t] + discount * (values[t + 1] if t + 1 < count else 0.0) - values[t] for t in range(count)]
    return [sum((discount * decay) ** (k - t) * delta[k] for k in range(t, count)) for t in range(count)]


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (0.8, 0.0)])
def test_gae_against_its_double_sum(discount, decay):
    rewards, values = random(5, 2), random(5, 2, seed=1)
    found = generalised_advantages(rewards, values, discount, decay)
    for objective in range(2):
        expected = naive_gae(rewards[:, objective].tolist(), values[:, objective].tolist(), discount, decay)
        np.testing.assert_allclose(found[:, objective], expected, rtol=1e-5, atol=1e-6)


def test_gae_without_decay_or_discount_is_return_less_value():
    rewards, values = random(4, 1), random(4, 1, seed=1)
    returns = rewards.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(generalised_advantages(rewards, values, 1.0, 1.0), returns - values)


def test_a_completions_reward_stands_at_its_end_and_kl_on_the_way():
    """log ratios .1 and .2 at a weight of .5 cost .05 and .1; rewards 1 and 2 come with the last token."""
    found = token_rewards(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.2]), 0.5)
    torch.testing.assert_close(found, torch.tensor([[-0.05, -0.05], [0.9, 1.9]]))


def test_whitened_over_all_tokens():
    parts = whitened([random(3, 2) * 5 + 1, random(4, 2, seed=1) * 5])
    together = torch.cat(parts)
    assert [len(part) for part in parts] == [3, 4]
    torch.testing.assert_close(together.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(together.std(0, correction=0), torch.ones(2), rtol=1e-4, atol=0)


def test_clipped_losses_against_a_loop():
    log_p, old, advantages = random(6), random(6, seed=1), random(6, 2, seed=2)
    found = clipped_losses(log_p, old, advantages, 0.2)
    for token in range(6):
        ratio = math.exp(log_p[token] - old[token])
        for objective in range(2):
            advantage = advantages[token, objective].item()
            expected = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            assert found[token, objective].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_on_the_sampling_policy_the_gradient_is_reinforces():
    """d/d log p of the loss is -A there; a ratio beyond the clip that already gained has none."""
    log_p = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([[3.0], [-0.5]])
    (gradient,) = torch.autograd.grad(clipped_losses(log_p, log_p.detach(), advantages, 0.2).sum(), log_p)
    torch.testing.assert_close(gradient, -advantages[:, 0])
    (beyond,) = torch.autograd.grad(clipped_losses(log_p, log_p.detach() - 1, advantages.abs(), 0.2).sum(), log_p)
    assert beyond.tolist() == [0.0, 0.0]


def test_kl_estimate_is_unbiased_and_never_negative():
    """Its mean under the policy is the exact KL of two distributions over four tokens."""
    policy, reference = (random(4, seed=seed).log_softmax(0) for seed in (0, 1))
    estimates = kl_estimates(policy, reference)
    assert (estimates >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimates).sum(), exact)
