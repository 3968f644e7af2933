"""Rewards of texts, and what is refused of them."""

import numpy as np
import pytest
import torch

from client.alignment.rewards import PROGRAMMATIC, Rewards
from conf.alignment import BUILT_IN_REWARDS

TEXTS = ["Good.", "", "a\nb", "x" * 200, "Ünïcode!"]


def scores(name, *texts):
    return PROGRAMMATIC[name]([""] * len(texts), list(texts)).tolist()


def test_settings_know_every_programmatic_reward():
    assert set(PROGRAMMATIC) == BUILT_IN_REWARDS


def test_length_and_brevity_can_only_be_traded():
    rewards = Rewards({name: PROGRAMMATIC[name] for name in ("length", "brevity")})
    found = rewards.score([""] * len(TEXTS), TEXTS)
    assert found.shape == (5, 2)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    assert found[1, 0] == 0.0
    assert found[3, 0] == 1.0


def test_format_counts_the_rules_that_are_kept():
    """Begins like a sentence, ends like one, one line: a lower-case word is one line only."""
    assert scores("format", "Good.", "good", "good\nday.") == pytest.approx([1.0, 1 / 3, 1 / 3])


def test_sentiment_is_of_the_sign_that_people_give_it():
    pytest.importorskip("vaderSentiment")
    good, bad, neither = scores("sentiment", "What a wonderful day, I love it.", "This is horrible.", "")
    assert good > 0.5
    assert bad < -0.3
    assert neither == 0


@pytest.mark.parametrize("name", sorted(PROGRAMMATIC))
def test_every_programmatic_reward_is_a_finite_number_a_text(name):
    if name == "sentiment":
        pytest.importorskip("vaderSentiment")
    assert Rewards({name: PROGRAMMATIC[name]}).score([""] * len(TEXTS), TEXTS).shape == (5, 1)


def test_a_reward_that_is_not_finite_is_named():
    rewards = Rewards({"kind": PROGRAMMATIC["length"], "clear": lambda _, texts: np.array([1.0, np.nan])})
    with pytest.raises(ValueError, match="reward 'clear' is nan for 1 of 2 completions; it must be finite"):
        rewards.score(["", ""], ["a", "b"])


def test_a_reward_of_another_shape_is_named():
    rewards = Rewards({"clear": lambda _, texts: np.ones((2, 1))})
    with pytest.raises(ValueError, match=r"reward 'clear' returned the shape \(2, 1\) for 2 completions, not \(2,\)"):
        rewards.score(["", ""], ["a", "b"])


@pytest.mark.parametrize("scores", [[[1.0], [1.0, 2.0]], ["good", "bad"], torch.ones(2, requires_grad=True)])
def test_a_reward_that_is_no_numbers_is_named(scores):
    rewards = Rewards({"clear": lambda prompts, texts: scores})
    with pytest.raises(ValueError, match=r"reward 'clear' returned a \w+ that is not 2 numbers"):
        rewards.score(["", ""], ["a", "b"])
