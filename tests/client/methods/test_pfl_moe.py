"""PFL-MoE at a site: FedAvg to the server, a mixture to its user."""

import pytest

from client.evaluation.held_out import held_out_loss
from client.mixed_prediction import fitted_gate, mixed_loss, predictions
from client.private import under
from client.text import encode
from conf.methods import PflMoeConfig, SftConfig
from tests.client.test_site import HELD_OUT, TRAIN, assert_same, first_global, make_site, noisy, settings_for
from tests.client.tiny_models import save_tiny_base


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


def test_what_is_sent_is_fedavgs(base_config, tmp_path):
    ours, plain = (
        make_site(settings_for(base_config, method), tmp_path / method.name) for method in (PflMoeConfig(), SftConfig())
    )
    update = ours.train(1, first_global(ours))
    assert_same(update.adapter, plain.train(1, first_global(plain)).adapter)
    assert update.extras == {}
    assert_same(under("pfl_moe/local/", ours.store.load()), update.adapter)


def test_before_it_has_trained_a_site_uses_the_global_model(base_config, tmp_path):
    site = make_site(settings_for(base_config, PflMoeConfig()), tmp_path)
    received = noisy(first_global(site), seed=0)
    sequences = encode(HELD_OUT, site.adapted.tokenizer, site.config.data)
    assert site.evaluate(received)["here"] == held_out_loss(site.adapted, received, sequences, 16)


def test_then_it_mixes_its_own_with_the_global_one_of_now(base_config, tmp_path):
    """By a gate fitted to as many training sequences as asked for, anew at each evaluation."""
    site = make_site(settings_for(base_config, PflMoeConfig(gate_examples=3)), tmp_path)
    local = site.train(1, first_global(site)).adapter
    received = noisy(local, seed=1)
    evaluated = site.evaluate(received)["here"]
    assert site.evaluate(received)["here"] == evaluated
    seen, held_out = (encode(texts, site.adapted.tokenizer, site.config.data) for texts in (TRAIN[:3], HELD_OUT))
    gate = fitted_gate(predictions(site.adapted, local, received, seen, 16))
    assert evaluated == mixed_loss(gate, predictions(site.adapted, local, received, held_out, 16), num_examples=2)


def test_a_gate_needs_examples():
    with pytest.raises(ValueError, match="method.gate_examples must be >= 1, got 0"):
        PflMoeConfig(gate_examples=0)
