"""The value heads: what they learn, and that they are the same after a round at home."""

import torch

from client.alignment.critic import Critic

CPU = torch.device("cpu")


def test_it_learns_values_that_a_linear_map_has():
    torch.manual_seed(0)
    hidden = torch.randn(64, 6)
    returns = torch.nn.functional.layer_norm(hidden, (6,)) @ torch.randn(6, 2) + torch.tensor([1.0, -2.0])
    critic = Critic(6, 2, 0.1, CPU)
    errors = [critic.fit(hidden, returns) for _ in range(300)]
    assert errors[-1] < 1e-3 < errors[0]


def test_it_starts_at_zero_and_goes_on_from_its_arrays():
    hidden, returns = torch.randn(5, 6), torch.ones(5, 2)
    critic = Critic(6, 2, 0.1, CPU)
    assert (critic(hidden) == 0).all()
    critic.fit(hidden, returns)
    again = Critic(6, 2, 0.1, CPU)
    again.load(critic.arrays())
    torch.testing.assert_close(again(hidden), critic(hidden))


def test_no_gradient_goes_on_into_the_policy():
    hidden = torch.randn(5, 6, requires_grad=True)
    critic = Critic(6, 1, 0.1, CPU)
    critic.fit(hidden, torch.ones(5, 1))
    assert hidden.grad is None
