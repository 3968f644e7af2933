"""Which arrays leave a site, where it starts and what it remembers, for the methods with nothing to set."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from client.methods import METHODS, method_for
from conf.methods import FcMoeConfig, LocalOnlyConfig, MethodConfig, SftConfig

RECEIVED = {"model.layers.0.mlp.experts.up_proj.lora_A": np.ones((2, 1, 3), np.float32)}
TRAINED = {name: 2 * array for name, array in RECEIVED.items()}


@pytest.mark.parametrize(("config", "shared"), [(SftConfig(), True), (FcMoeConfig(), True), (LocalOnlyConfig(), False)])
def test_local_only_sends_nothing_and_the_others_everything(config, shared):
    assert method_for(config).shares("model.layers.0.mlp.experts.up_proj.lora_A") is shared
    assert method_for(config).shares("model.layers.0.self_attn.q_proj.lora_B") is shared


@pytest.mark.parametrize("config", [SftConfig(), LocalOnlyConfig()])
def test_sft_and_local_only_start_from_what_they_are_given_and_remember_nothing(config):
    method = method_for(config)
    assert method.start(RECEIVED, method.remember(RECEIVED, TRAINED)) is RECEIVED
    assert method.remember(RECEIVED, TRAINED) == {}


def test_only_local_only_has_no_global_model():
    assert {name for name, method in METHODS.items() if method.personal} == {"local_only"}


def test_a_method_without_a_client_half_is_refused_by_name():
    @dataclass(kw_only=True)
    class Unknown(MethodConfig):
        name: ClassVar[str] = "unknown"

    with pytest.raises(ValueError, match=r"method must be one of \['dpo', 'fc_moe', .*'sft'\], got 'unknown'"):
        method_for(Unknown())
