"""FedAlign-MoE at a site, round after round: what it sends, what it keeps, and when the alignment sets in."""

import numpy as np
import pytest

from client.methods import method_for
from conf.methods import FedAlignMoeConfig, RoutingProbability, SftConfig
from conf.model import RouterTraining
from strategies.fedalign_moe import MARGIN, MEAN, PROBABILITY, REFERENCE, SEMANTICS, FedAlignMoe
from tests.client.test_site import assert_same, differ, first_global, make_site, settings_for
from tests.client.tiny_models import save_tiny_base


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


def local_router(base_config, method):
    return settings_for(base_config, method, RouterTraining.local)


def rounds(config, folder, num_rounds, strategy=None):
    """Updates of one site that gets back what it sent, and what the strategy broadcasts."""
    strategy = strategy or FedAlignMoe()
    site = make_site(config, folder)
    adapter, state, updates = first_global(site), {}, []
    for server_round in range(1, num_rounds + 1):
        updates.append(site.train(server_round, adapter, strategy.broadcast(state)))
        result = strategy.aggregate(adapter, state, updates[-1:])
        adapter, state = result.adapter, result.state
    return site, updates


def test_routers_stay_and_statistics_of_every_layer_are_sent(base_config, tmp_path):
    site, (_, update) = rounds(local_router(base_config, FedAlignMoeConfig()), tmp_path, 2)
    layers = site.adapted.layers
    FedAlignMoe().check_update(first_global(site), update)
    assert not any("gate.weight" in name for name in update.adapter)
    assert update.extras.keys() == {kind + layer for kind in (PROBABILITY, MARGIN, SEMANTICS) for layer in layers}
    private = site.store.load()
    for layer in layers:
        assert f"own/{layer}.gate.weight" in private
        np.testing.assert_array_equal(private[f"fedalign_moe/probability/{layer}"], update.extras[PROBABILITY + layer])


def test_the_first_round_is_plain_fine_tuning_and_the_second_is_not(base_config, tmp_path):
    """A site's overlap with the others is known once it has told its routing, and so is the reference."""
    _, aligned = rounds(local_router(base_config, FedAlignMoeConfig(strength=10)), tmp_path / "aligned", 2)
    _, unaligned = rounds(local_router(base_config, FedAlignMoeConfig(strength=0)), tmp_path / "unaligned", 2)
    plain = make_site(local_router(base_config, SftConfig()), tmp_path / "plain")
    assert_same(aligned[0].adapter, plain.train(1, first_global(plain)).adapter)
    assert differ(aligned[1].adapter, unaligned[1].adapter)
    assert_same(unaligned[1].adapter, plain.train(2, unaligned[0].adapter).adapter)


def test_over_the_selected_experts_margins_are_wider_and_training_another(base_config, tmp_path):
    """Two of four: a token's probabilities are divided by their sum, so that p1 - p2 grows with them."""
    (first_all, second_all), (first_selected, second_selected) = (
        rounds(local_router(base_config, FedAlignMoeConfig(strength=10, probability=over)), tmp_path / over.name, 2)[1]
        for over in RoutingProbability
    )
    assert_same(first_all.adapter, first_selected.adapter)
    for name, margin in first_all.extras.items():
        if name.startswith(MARGIN):
            assert first_selected.extras[name].sum() > margin.sum() > 0
        elif name.startswith(PROBABILITY):
            assert first_selected.extras[name].sum() == pytest.approx(1, rel=1e-5)
    assert differ(second_all.adapter, second_selected.adapter)


def test_experts_count_by_the_sigmoid_of_their_overlap(base_config, tmp_path):
    """Eq. 9: alpha = 1 / (1 + exp(eta - own * mean))."""
    config = local_router(base_config, FedAlignMoeConfig())
    adapted = make_site(config, tmp_path).adapted
    (layer, *_), own, mean = adapted.layers, np.float32([0.1, 0.2, 0.3, 0.4]), np.float32([0.4, 0.3, 0.2, 0.1])
    broadcast = {REFERENCE + layer: np.float32([0.7, 0.1, 0.1, 0.1]), MEAN + layer: mean}
    private = {f"fedalign_moe/probability/{layer}": own}
    rule = method_for(FedAlignMoeConfig(overlap=0.25)).local_rule(adapted, broadcast, private)
    (found,) = rule._targets.values()
    np.testing.assert_allclose(found.weight_E, [1 / (1 + np.exp(0.25 - a * b)) for a, b in zip(own, mean, strict=True)])
    np.testing.assert_array_equal(found.reference_E, broadcast[REFERENCE + layer])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": -1}, "method.strength must be >= 0, got -1"),
        ({"overlap": 2}, r"method.overlap must be in \[0, 1\], got 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FedAlignMoeConfig(**settings)
