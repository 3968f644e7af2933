"""Limits of the settings of FIRM and DPO, and what contradicts them."""

import math
import re

import pytest

from conf.alignment import DpoConfig, FirmConfig, Regulariser
from conf.compose import load_config, load_saved, settings_hash, to_yaml

OUT_OF_RANGE = [
    ({"rewards": []}, "method.rewards must be a list of rewards with different names, got []"),
    ({"rewards": ["length", "length:x"]}, "method.rewards must be a list of rewards with different names"),
    ({"preference": [0.5, 0.6]}, "method.preference must be null or 2 weights >= 0 that sum to 1"),
    ({"preference": [1.0]}, "method.preference must be null or 2 weights"),
    ({"preference": [1.5, -0.5]}, "method.preference must be null or 2 weights"),
    ({"site_preferences": {"a": [0.5]}}, "method.site_preferences.a must be null or 2 weights"),
    ({"site_preferences": {"a": "high"}}, "method.site_preferences.a must be null or 2 weights"),
    (
        {"regulariser": Regulariser.ridge, "preference": [0.9, 0.1]},
        "method.regulariser must be anchor or weighted with a preference, got 'ridge'",
    ),
    ({"regulariser": Regulariser.weighted, "preference": [1.0, 0.0]}, "method.preference must be > 0 everywhere"),
    (
        {"rewards": ["kind:x", "length"], "reward_formats": {"length": "{prompt}{response}"}},
        "method.reward_formats must be for one of ['kind'], the rewards with a source, got 'length'",
    ),
    (
        {"rewards": ["kind:x"], "reward_formats": {"kind": "{response} to {prompt}"}},
        "method.reward_formats.kind must be a text with {prompt} and then {response}, once each, got",
    ),
    ({"group_size": 1}, "method.group_size must be >= 2 with method.estimator=group, got 1"),
    ({"max_new_tokens": 0}, "method.max_new_tokens must be >= 1, got 0"),
    ({"temperature": 0.0}, "method.temperature must be > 0, got 0.0"),
    ({"beta": -0.1}, "method.beta must be >= 0, or inf, got -0.1"),
    ({"beta": math.nan}, "method.beta must be >= 0, or inf, got nan"),
    ({"rho": 0.0}, "method.rho must be in (0, 1], got 0.0"),
    ({"kl": -1.0}, "method.kl must be >= 0, got -1.0"),
    ({"clip": 1.0}, "method.clip must be in (0, 1), got 1.0"),
    ({"steps_per_rollout": 0}, "method.steps_per_rollout must be >= 1, got 0"),
    ({"discount": 1.1}, "method.discount must be in [0, 1], got 1.1"),
    ({"decay": -0.1}, "method.decay must be in [0, 1], got -0.1"),
    ({"critic_learning_rate": 0.0}, "method.critic_learning_rate must be > 0, got 0.0"),
    ({"eval_prompts": -1}, "method.eval_prompts must be >= 0, got -1"),
]


@pytest.mark.parametrize(("settings", "message"), OUT_OF_RANGE)
def test_firm_refuses_what_is_out_of_range(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FirmConfig(**settings)


def test_dpo_refuses_what_is_out_of_range():
    with pytest.raises(ValueError, match=r"method.beta must be > 0, got 0"):
        DpoConfig(beta=0.0)
    with pytest.raises(ValueError, match="method.objectives must be different values"):
        DpoConfig(objectives=["a", "a"])
    with pytest.raises(ValueError, match="method.preference must be null or 2 weights"):
        DpoConfig(objectives=["a", "b"], preference=[1.0])


def test_settings_as_they_are_written_on_the_command_line():
    config = load_config(
        "strategy=firm method.rewards=[helpful:/models/helpful,harmless:org/harmless,length] method.beta=inf "
        "method.preference=[0.5,0.25,0.25] method.site_preferences.bank=[1,0,0] method.estimator=ppo "
        r"""method.reward_formats.harmless="'Human: {prompt}\n\nAssistant: {response}'" """
    )
    method = config.method
    assert isinstance(method, FirmConfig)
    assert method.rewards == ["helpful:/models/helpful", "harmless:org/harmless", "length"]
    assert method.beta == math.inf
    assert method.site_preferences == {"bank": [1, 0, 0]}
    assert method.reward_formats == {"harmless": r"Human: {prompt}\n\nAssistant: {response}"}
    assert load_saved(to_yaml(config)) == config
    assert settings_hash(config) != settings_hash(load_config("strategy=firm"))


def test_a_format_that_is_no_text_is_refused():
    with pytest.raises(ValueError, match=r"method.reward_formats.kind must be text, got null"):
        load_config(["strategy=firm", "method.rewards=[kind:x]", "method.reward_formats.kind=null"])


def test_aggregation_of_firms_updates_is_replaceable():
    assert load_config("strategy=fc_moe method=firm").method.name == "firm"
    with pytest.raises(ValueError, match="strategy=firm needs method=firm, got method=sft"):
        load_config("strategy=firm method=sft")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("strategy=firm data.packing=true", "method=firm takes examples one by one: it needs data.packing=false"),
        (
            "strategy=fedcmoo method.preference=[0.3,0.7]",
            "strategy=fedcmoo takes no method.preference",
        ),
        ("strategy=fedcmoo method.beta=1", "weighs at its server, where method.beta counts for nothing"),
        ("strategy=fedcmoo method.gram=halves", "where method.gram counts for nothing"),
        (
            "strategy=firm method.max_new_tokens=249",
            "method.max_new_tokens=249 leaves less than 8 tokens of data.max_length=256 for",
        ),
        ("strategy=firm method.gram=halves train.batch_size=1", "it needs train.batch_size >= 2, got 1"),
        ("method=dpo", "method=dpo compares two responses: set data.rejected_column"),
        ("method=dpo data.rejected_column=r method.objectives=[a,b]", "are values of a column: set data.objective"),
        ("strategy=firm method.site_preferences=3", "method.site_preferences must be {site: [weights]}, got '3'"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(words)


def test_a_reward_that_nobody_has_is_refused_in_a_simulation_alone():
    """A real site may have a model of its own for it."""
    words = ["strategy=firm", "method.rewards=[kindness,format]"]
    with pytest.raises(ValueError, match=r"method.rewards: 'kindness' is none of .*write kindness:FOLDER"):
        load_config(words)
    load_config([*words, "federation=remote", "federation.superlink=127.0.0.1:8000"])
    load_config(["strategy=firm", "method.rewards=[kindness:heads/kind,format]"])
