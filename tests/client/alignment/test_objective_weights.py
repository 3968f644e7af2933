"""Who weighs the objectives: what the server is sent when it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.alignment.objective_gradients import ObjectiveGradients
from client.alignment.objective_weights import ServerWeights
from client.model import adapted_model
from conf.model import LoraConfig
from strategies.fedcmoo import GRADIENT, SHARES, WEIGHTS
from tests.client.tiny_models import save_tiny_base


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    base = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return adapted_model(base, LoraConfig(rank=2), torch.device("cpu"))


def linear_gradients(adapted, num_objectives, seed=0):
    """Losses that are linear in the parameters: gradients that are known, here as (M, D) in the adapter's layout."""
    parameters = adapted.parameters_by_name()
    generator = torch.Generator().manual_seed(seed)
    slopes = [
        [torch.randn(parameter.shape, generator=generator) for parameter in parameters.values()]
        for _ in range(num_objectives)
    ]
    gradients = ObjectiveGradients([*parameters.values()], num_objectives)
    pairs = [zip(parameters.values(), slope, strict=True) for slope in slopes]
    gradients.add(torch.stack([sum((left * right).sum() for left, right in pair) for pair in pairs]))
    dense = [
        np.concatenate([adapted.to_canonical(name, one).ravel() for name, one in zip(parameters, slope, strict=True)])
        for slope in slopes
    ]
    return gradients, np.stack(dense)


def test_the_first_steps_gradients_go_up_at_rank_one(adapted):
    first, dense_MD = linear_gradients(adapted, 3)
    weights = ServerWeights({WEIGHTS: np.array([0.2, 0.3, 0.5], np.float32)}, 3, adapted)
    assert weights.to_send() == {}
    np.testing.assert_array_equal(weights.of(first), np.array([0.2, 0.3, 0.5], np.float32))
    weights.of(linear_gradients(adapted, 3, seed=1)[0])
    sent = weights.to_send()
    names = list(adapted.parameters_by_name())
    vector_D = np.concatenate([sent[GRADIENT + name].ravel() for name in names])
    left, values, right = np.linalg.svd(dense_MD, full_matrices=False)
    leading = values[0] * np.outer(left[:, 0], right[0])
    np.testing.assert_allclose(np.outer(sent[SHARES], vector_D), leading, atol=1e-4)
    assert sum(array.size for array in sent.values()) == dense_MD.shape[1] + 3
    assert all(array.dtype == np.float32 for array in sent.values())


def test_before_the_first_round_objectives_count_alike(adapted):
    weights = ServerWeights({WEIGHTS: np.zeros(0, np.float32)}, 2, adapted)
    np.testing.assert_array_equal(weights.of(linear_gradients(adapted, 2)[0]), [0.5, 0.5])


def test_weights_of_other_objectives_are_refused(adapted):
    with pytest.raises(ValueError, match=r"weighs 3 objectives, method.rewards names 2"):
        ServerWeights({WEIGHTS: np.ones(3, np.float32) / 3}, 2, adapted)
