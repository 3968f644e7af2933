"""Several gradients kept apart: their Gram matrix, and their combination."""

import numpy as np
import torch

from client.alignment.objective_gradients import ObjectiveGradients


def linear_losses(parameters):
    """Three losses whose gradients on (a, b) are (1, 0), (0, 2) and (3, 3); the second does not depend on a."""
    a, b = parameters
    return torch.stack([a.sum(), 2 * b.sum(), 3 * a.sum() + 3 * b.sum()])


def two_parameters():
    return [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))]


def test_gram_matrix_by_hand():
    parameters = two_parameters()
    gradients = ObjectiveGradients(parameters, 3)
    gradients.add(linear_losses(parameters))
    np.testing.assert_allclose(gradients.gram(), [[1, 0, 3], [0, 4, 6], [3, 6, 18]])


def test_loss_scale_is_in_what_parameters_get_alone():
    """Gram and combination are the objectives' own: what a site sends of them does not depend on its precision."""
    parameters = two_parameters()
    gradients = ObjectiveGradients(parameters, 3)
    gradients.add(linear_losses(parameters), loss_scale=1024.0)
    np.testing.assert_allclose(gradients.gram(), [[1, 0, 3], [0, 4, 6], [3, 6, 18]])
    assert [tensor.item() for tensor in gradients.combined(np.array([0.5, 0.25, 0.25]))] == [1.25, 1.25]
    gradients.combine(np.array([0.5, 0.25, 0.25]), loss_scale=1024.0)
    assert [parameter.grad.item() for parameter in parameters] == [1280, 1280]


def test_passes_add_up_and_weights_combine():
    """Two passes double every gradient: 2 * (.5 * (1, 0) + .25 * (0, 2) + .25 * (3, 3)) = (2.5, 2.5)."""
    parameters = two_parameters()
    gradients = ObjectiveGradients(parameters, 3)
    for _ in range(2):
        gradients.add(linear_losses(parameters))
    parameters[0].grad = torch.ones(1)
    gradients.combine(np.array([0.5, 0.25, 0.25]))
    assert [parameter.grad.item() for parameter in parameters] == [3.5, 2.5]
