"""SCAFFOLD at a site: on quadratics, where every number can be computed otherwise, and in the real loop."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.methods.scaffold import GradientCorrection
from client.private import under
from conf.methods import ScaffoldConfig, SftConfig
from conf.model import RouterTraining
from strategies.base import ClientUpdate
from strategies.fedavg import FedAvg
from strategies.scaffold import CONTROL, Scaffold
from tests.client.test_site import assert_same, first_global, make_site, noisy, settings_for
from tests.client.tiny_models import save_tiny_base

# Sites of f_i(x) = 1/2 sum_d curvature_d (x_d - centre_d)^2: their mean is least at sum a b / sum a, which is not where
# the mean of their own minima is.
CURVATURE = np.array([[1.0, 4.0], [10.0, 0.5], [3.0, 2.0]])
CENTRE = np.array([[0.0, 2.0], [1.0, -1.0], [-2.0, 0.5]])
OPTIMUM = (CURVATURE * CENTRE).sum(axis=0) / CURVATURE.sum(axis=0)
NUM_STEPS, LEARNING_RATE = 10, 0.05


class Plain:
    """The layout of parameters that are the arrays themselves."""

    def from_canonical(self, name, array):
        return torch.tensor(array)

    def to_canonical(self, name, stored):
        return stored.numpy().copy()


def local_round(site, x, rule, make_optimizer):
    """``NUM_STEPS`` steps on a site's quadratic from ``x``."""
    parameter = torch.nn.Parameter(torch.tensor(x))
    optimizer = make_optimizer([parameter])
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        curvature, centre = torch.tensor(CURVATURE[site]), torch.tensor(CENTRE[site])
        (0.5 * curvature * (parameter - centre) ** 2).sum().backward()
        if rule is not None:
            rule.correct({"x": parameter})
        optimizer.step()
    return parameter.detach().numpy()


def scaffold_rounds(num_rounds, make_optimizer):
    """The server's rule and the sites' over whole rounds; yields x, c and the sites' own c_i."""
    strategy, adapter = Scaffold(), {"x": np.zeros(2)}
    state, own = strategy.init_state(adapter), [{"x": np.zeros(2)} for _ in CURVATURE]
    for _ in range(num_rounds):
        updates = []
        for site in range(len(CURVATURE)):
            rule = GradientCorrection(own[site], under(CONTROL, strategy.broadcast(state)), Plain())
            trained = local_round(site, adapter["x"].astype(float), rule, make_optimizer)
            own[site] = under("scaffold/control/", rule.to_keep())
            updates.append(
                ClientUpdate(site=f"site-{site}", adapter={"x": trained}, num_examples=1, extras=rule.to_send())
            )
        result = strategy.aggregate(adapter, state, updates)
        adapter, state = result.adapter, result.state
        yield adapter["x"], state[CONTROL + "x"], [c["x"] for c in own]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=LEARNING_RATE)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.0)


def test_rounds_of_sgd_are_the_papers_algorithm_with_option_2():
    """Algorithm 1 in plain numpy, with c_i <- c_i - c + (x - y) / (K lr) from the displacement alone."""
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((3, 2))
    for found_x, found_c, found_own in scaffold_rounds(4, sgd):
        trained, new = [], []
        for site in range(3):
            y = x.copy()
            for _ in range(NUM_STEPS):
                y = y - LEARNING_RATE * (CURVATURE[site] * (y - CENTRE[site]) - own[site] + c)
            trained.append(y)
            new.append(own[site] - c + (x - y) / (NUM_STEPS * LEARNING_RATE))
        x, c, own = np.mean(trained, axis=0), c + np.mean(np.array(new) - own, axis=0), np.array(new)
        np.testing.assert_allclose(found_x, x, atol=1e-5)
        np.testing.assert_allclose(found_c, c, atol=1e-5)
        np.testing.assert_allclose(found_own, own, atol=1e-5)


def fedavg_rounds(num_rounds, make_optimizer):
    x = np.zeros(2)
    for _ in range(num_rounds):
        x = np.mean([local_round(site, x, None, make_optimizer) for site in range(3)], axis=0)
    return x


def test_unequal_sites_meet_at_the_optimum_where_fedavg_is_biased():
    *_, (x, c, _) = scaffold_rounds(40, sgd)
    np.testing.assert_allclose(x, OPTIMUM, atol=1e-4)
    np.testing.assert_allclose(c, 0, atol=1e-3)
    assert np.abs(fedavg_rounds(40, sgd) - OPTIMUM).max() > 0.1


def test_with_adam_too_the_correction_takes_most_of_the_bias_away():
    *_, (x, _, _) = scaffold_rounds(40, adamw)
    assert np.linalg.norm(x - OPTIMUM) < 0.2 * np.linalg.norm(fedavg_rounds(40, adamw) - OPTIMUM)


def test_a_parameter_without_a_gradient_is_corrected_as_if_it_were_zero():
    rule = GradientCorrection({"x": np.float32([1, 2])}, {"x": np.float32([5, 1])}, Plain())
    parameter = torch.nn.Parameter(torch.zeros(2))
    rule.correct({"x": parameter})
    np.testing.assert_array_equal(parameter.grad, [4, -1])
    np.testing.assert_array_equal(rule.to_keep()["scaffold/control/x"], [0, 0])
    np.testing.assert_array_equal(rule.to_send()[CONTROL + "x"], [-1, -2])


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


def federation(config, method_strategy, folders):
    """Three rounds of sites that hold the same examples and see them in the same order."""
    sites = [make_site(config, folder) for folder in folders]
    adapter = noisy(first_global(sites[0]), seed=0)
    state = method_strategy.init_state(adapter)
    for server_round in (1, 2, 3):
        broadcast = method_strategy.broadcast(state)
        updates = [
            # Of one name when they train, since that decides on the order; of two when they are counted.
            replace(site.train(server_round, adapter, broadcast), site=f"site-{number}")
            for number, site in enumerate(sites)
        ]
        result = method_strategy.aggregate(adapter, state, updates)
        adapter, state = result.adapter, result.state
    return sites, adapter, state


def test_equal_sites_are_fedavg(base_config, tmp_path):
    """Then c_i = c in every round: nothing is corrected."""
    folders = [tmp_path / "a", tmp_path / "b"]
    _, corrected, state = federation(settings_for(base_config, ScaffoldConfig()), Scaffold(), folders)
    _, plain, _ = federation(settings_for(base_config, SftConfig()), FedAvg(), folders)
    for name in plain:
        np.testing.assert_allclose(corrected[name], plain[name], atol=1e-4, err_msg=name)
    assert any(array.any() for array in Scaffold().broadcast(state).values())


def test_control_variate_is_kept_by_the_site_and_its_change_is_sent(base_config, tmp_path):
    """The router stays at home, so nothing about it is sent or corrected."""
    config = settings_for(base_config, ScaffoldConfig(), RouterTraining.local)
    site = make_site(config, tmp_path)
    received = first_global(site)
    broadcast = Scaffold().broadcast(Scaffold().init_state(received))
    first = site.train(1, received, broadcast)
    assert first.extras.keys() == {CONTROL + name for name in received}
    kept = under("scaffold/control/", site.store.load())
    assert_same(kept, under(CONTROL, first.extras))
    second = site.train(2, received, first.extras)
    changed = {name: kept[name] + array for name, array in under(CONTROL, second.extras).items()}
    for name, array in under("scaffold/control/", site.store.load()).items():
        np.testing.assert_allclose(array, changed[name], atol=1e-6)


def test_a_server_that_sends_no_control_variate_is_refused(base_config, tmp_path):
    site = make_site(settings_for(base_config, ScaffoldConfig()), tmp_path)
    with pytest.raises(ValueError, match="method=scaffold needs the server's control variate"):
        site.train(1, first_global(site))
