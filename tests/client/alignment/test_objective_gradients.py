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


def test_gram_matrix_of_two_parts_by_hand():
    """Parts ((1, 0), (0, 2), (3, 3)) and twice that: 2 * (2 + 2) times the products of the first."""
    parameters = two_parameters()
    gradients = ObjectiveGradients(parameters, 3, num_parts=2)
    for part, factor in ((0, 1), (1, 2)):
        gradients.add(factor * linear_losses(parameters), part=part)
    np.testing.assert_allclose(gradients.gram(), 8 * np.array([[1, 0, 3], [0, 4, 6], [3, 6, 18]]), atol=1e-12)
    assert [tensor.item() for tensor in gradients.combined(np.array([0.5, 0.25, 0.25]))] == [3.75, 3.75]


def gram_of(slopes_PMD):
    """The Gram matrix of losses with these slopes, part by part."""
    parameters = [torch.nn.Parameter(torch.zeros(slopes_PMD.shape[-1]))]
    gradients = ObjectiveGradients(parameters, slopes_PMD.shape[1], num_parts=len(slopes_PMD))
    for part, slopes_MD in enumerate(torch.tensor(slopes_PMD)):
        gradients.add(slopes_MD @ parameters[0], part=part)
    return gradients.gram()


def test_noise_counts_as_length_in_one_part_but_not_in_two():
    """Gradients (3, 0, ...) and (0, 1, ...) under noise of squared length 4 each, which the mean over steps shows."""
    rng = np.random.default_rng(0)
    signal_MD = np.eye(2, 400) * np.array([[3.0], [1.0]])
    noise_RPMD = rng.normal(scale=np.sqrt(4 / 2 / 400), size=(400, 2, 2, 400))
    halves_RPMD = (signal_MD / 2 + noise_RPMD).astype(np.float32)
    whole = np.mean([gram_of(halves_PMD.sum(axis=0, keepdims=True)) for halves_PMD in halves_RPMD], axis=0)
    halves = np.mean([gram_of(halves_PMD) for halves_PMD in halves_RPMD], axis=0)
    np.testing.assert_allclose(whole, np.diag([9 + 4, 1 + 4]), atol=0.15)
    np.testing.assert_allclose(halves, np.diag([9, 1]), atol=0.15)


def test_parts_that_contradict_each_other_have_nothing_in_common():
    slopes_MD = np.array([[1, 2], [2, -1]], np.float32)
    np.testing.assert_allclose(gram_of(np.stack([slopes_MD, -slopes_MD])), np.zeros((2, 2)), atol=1e-12)
