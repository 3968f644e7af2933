"""Counting and evening out how tokens are spread over experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.routing import balance_loss, routing_entropy


def test_entropy_is_one_for_equal_counts_and_zero_for_one_expert() -> None:
    assert routing_entropy(np.array([5.0, 5.0, 5.0])) == pytest.approx(1)
    assert routing_entropy(np.array([0.0, 9.0, 0.0])) == 0
    # -(1/4 ln 1/4 + 3/4 ln 3/4) / ln 2
    assert routing_entropy(np.array([1.0, 3.0])) == pytest.approx(0.8112781)


def test_balance_loss_by_hand() -> None:
    """Two real tokens, both to expert 0 of 2, with logits (ln 3, 0): probabilities 3/4 and 1/4.

    Shares are (1, 0), mean probabilities (3/4, 1/4): 2 * (1 * 3/4 + 0 * 1/4) = 1.5. The third token is padding.
    A layer whose tokens go one each way: shares (1/2, 1/2), mean probabilities (1/2, 1/2): 1. The mean is 1.25.
    """
    mask = torch.tensor([[True, True, False]])
    log_3 = float(np.log(3.0))
    skewed = torch.tensor([[log_3, 0.0], [log_3, 0.0], [0.0, 9.0]])
    even = torch.tensor([[log_3, 0.0], [0.0, log_3], [0.0, 9.0]])
    assert float(balance_loss([skewed, even], 1, mask)) == pytest.approx(1.25)
    assert float(balance_loss([even], 1, mask)) == pytest.approx(1.0)


def test_balance_loss_sees_layers_that_collapse_onto_different_experts() -> None:
    """Pooled over layers, expert 0 and expert 1 would be used alike."""
    first = torch.tensor([[5.0, 0.0]]).repeat(4, 1)
    loss = balance_loss([first, first.flip(1)], 1, torch.ones(1, 4, dtype=torch.bool))
    assert float(loss) == pytest.approx(2 * torch.tensor([5.0, 0.0]).softmax(0)[0].item())
