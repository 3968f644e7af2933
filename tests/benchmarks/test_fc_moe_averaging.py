"""What aggregation did to experts: by hand."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.fc_moe_averaging import MEASURES, mean_of, of_round
from strategies.base import ClientUpdate
from strategies.fc_moe import FcMoe
from strategies.fedavg import FedAvg

NAME = "layers.0.mlp.experts.up_proj"
RECEIVED = {NAME: np.zeros((3, 2, 1), np.float32)}


def update(site, values, num_examples):
    array = np.array(values, np.float32)[..., None]
    tokens = {"layers.0.mlp": np.array([5.0, 5.0, 0.0])}
    return ClientUpdate(site=site, adapter={NAME: array}, num_examples=num_examples, expert_tokens=tokens)


UPDATES = [update("a", [[3, 0], [1, 0], [0, 0]], 1), update("b", [[0, 4], [-2, 0], [0, 0]], 3)]


def measured(strategy):
    return mean_of([of_round(RECEIVED, UPDATES, strategy.aggregate(RECEIVED, {}, UPDATES), {})])


def test_orthogonal_and_opposite_updates_by_hand():
    """Expert 0: means of length 2.5 from 3 and 4, cosine 0. Expert 1: 0.5 from 1 and 2, cosine -1, site a against it.

    Site b is not against that mean, which it has most of itself, but against the other site, as a is: two of four.

    Nobody used expert 2. Weighted 1 to 3, expert 0 steps by (0.75, 3), whose product with (1.5, 2) over 2.5^2 is 1.14,
    and expert 1 by -1.25, 2.5 times its mean.
    """
    found = measured(FedAvg())
    assert found["kept"] == pytest.approx((2.5 / 3.5 + 0.5 / 1.5) / 2, abs=1e-3)
    assert found["pairs"] == pytest.approx(-0.5, abs=1e-5)
    assert found["negative"] == 0.25
    assert found["opposed"] == 0.5
    assert found["step"] == pytest.approx((1.14 + 2.5) / 2, abs=1e-3)
    assert found["largest_share"] == 0.75
    assert found["factor"] is found["largest_weight"] is None


def test_the_rules_own_factor_and_weights_by_hand():
    """Equal tokens, so weights by length: 3/7 and 4/7; 1/3 and 2/3, mean -1, which a 1 goes against: s = 1/3."""
    found = measured(FcMoe())
    assert found["factor"] == pytest.approx((1 + 4 / 3) / 2, abs=1e-3)
    assert found["largest_weight"] == pytest.approx((4 / 7 + 2 / 3) / 2, abs=1e-3)


def test_mean_is_over_the_values_of_all_rounds():
    rounds = [dict.fromkeys(MEASURES, values) for values in ([1.0, 2.0], [6.0], [])]
    assert mean_of(rounds) == dict.fromkeys(MEASURES, 3.0)


def test_where_no_expert_is_shared_nothing_is_measured():
    nothing = [ClientUpdate(site="a", adapter={}, num_examples=1)]
    found = of_round({}, nothing, FedAvg().aggregate({}, {}, nothing), {})
    assert mean_of([found]) == dict.fromkeys(MEASURES)
