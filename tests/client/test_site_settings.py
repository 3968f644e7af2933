"""What a site decides for itself of an alignment run."""

from dataclasses import replace

import pytest

from client.node import real_node
from client.site_settings import real_settings, simulated_settings
from conf.alignment import FirmConfig
from conf.methods import SftConfig
from conf.schema import Config

CONFIG = Config(
    method=FirmConfig(rewards=["helpful:org/helpful", "length"], site_preferences={"bank": [0.9, 0.1]}),
)


def test_a_simulated_site_has_its_own_preference_and_sends_its_weights():
    assert simulated_settings(CONFIG, "bank").method.preference == [0.9, 0.1]
    assert simulated_settings(CONFIG, "court").method.preference is None
    assert simulated_settings(CONFIG, "bank").method.send_weights
    silent = replace(CONFIG, method=replace(CONFIG.method, send_weights=False))
    assert simulated_settings(silent, "bank").method.send_weights is False


def test_a_real_site_brings_its_own_and_sends_no_weights():
    node = real_node({"site": "a", "data": "a.jsonl", "rewards": "helpful:/own/helpful", "preference": "0.2, 0.8"})
    method = real_settings(CONFIG, "a", node.rewards, node.preference).method
    assert method.rewards == ["helpful:/own/helpful", "length"]
    assert method.preference == [0.2, 0.8]
    assert not method.send_weights
    assert CONFIG.method.rewards[0] == "helpful:org/helpful"


def test_what_does_not_fit_the_run_is_refused():
    with pytest.raises(ValueError, match=r"rewards of site a must be among \['helpful', 'length'\], got \['kind'\]"):
        real_settings(CONFIG, "a", ["kind:/x"], [])
    with pytest.raises(ValueError, match="preference of site a must be null or 2 weights"):
        real_settings(CONFIG, "a", [], [1.0])
    with pytest.raises(ValueError, match="node config preference must be numbers, as in '0.7,0.3', got 'high'"):
        real_node({"site": "a", "data": "a.jsonl", "preference": "high"})


def test_other_methods_are_left_as_they_are():
    config = Config(method=SftConfig())
    assert simulated_settings(config, "a") is config
    assert real_settings(config, "a", ["kind:/x"], [1.0]) is config
