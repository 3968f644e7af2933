"""Accuracy by label words, and the models it is measured on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.federation import simulated
from benchmarks.measures import Judge, expert_norm, label_scores
from benchmarks.word_base import most_frequent, word_tokenizer
from client.assemble import held_out_sets
from client.bases import BaseIdentity
from client.model import AdaptedModel, BaseModel
from client.text import Example, encode
from conf.compose import load_config
from conf.model import LoraConfig, ModelConfig
from conf.schema import DataConfig, Template
from tests.client.tiny_models import save_tiny_base, tiny_model

WORDS = ["red", "green", "blue", "a", "colour", "of", "sky", "grass", "?"]
PLAIN = DataConfig(template=Template.plain)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    tokenizer = word_tokenizer(WORDS)
    model = tiny_model("olmoe", vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    identity = BaseIdentity("tiny", "tiny", "0", tmp_path_factory.mktemp("base"))
    return AdaptedModel(BaseModel(model, tokenizer, identity), ModelConfig(), LoraConfig(rank=2))


EXAMPLES = {
    "north": [Example("colour of sky?", "", "blue"), Example("colour of grass, a colour?", "", "green")],
    "south": [Example("colour?", "", "red")],
}


def test_words_and_line_breaks_are_tokens_and_others_unknown():
    tokenizer = word_tokenizer(WORDS)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Red sky?\nplum", add_special_tokens=False)["input_ids"])
    assert tokens == ["red", "sky", "?", "\n", "<unk>"]


def test_every_source_of_words_counts_alike():
    """b is half of a short text, a most of a long one: a 0.9 and 0, b 0.1 and 0.5, c 0 and 0.5."""
    long, short = ["a " * 9 + "b"] * 50, ["b c"]
    assert most_frequent([long, short], ["z"], 3) == ["z", "a", "b"]


def test_label_scores_are_those_of_the_model_called_on_one_prompt_at_a_time(adapted):
    adapter = adapted.initial_adapter(0)
    examples = [example for site in EXAMPLES.values() for example in site]
    labels = torch.tensor(adapted.tokenizer.convert_tokens_to_ids(["red", "green", "blue"]))
    nll, is_right = label_scores(adapted, adapter, encode(examples, adapted.tokenizer, PLAIN), labels)
    for index, example in enumerate(examples):
        prompt = adapted.tokenizer(f"{example.prompt}\n", add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            log_V = adapted.base.model(prompt).logits[0, -1].log_softmax(-1)
        answer = adapted.tokenizer.convert_tokens_to_ids(example.response)
        assert nll[index] == pytest.approx(-log_V[answer].item(), rel=1e-4)
        assert is_right[index] == (int(log_V[labels].argmax()) == labels.tolist().index(answer))


def test_score_is_over_examples_and_sites_apart(adapted):
    judge = Judge(adapted, load_config("data.template=plain"), EXAMPLES, ["red", "green", "blue"])
    score = judge.score_of(adapted.initial_adapter(0))
    assert score.accuracy == pytest.approx((2 * score.sites["north"] + score.sites["south"]) / 3)


def test_a_label_of_two_tokens_is_refused(adapted):
    with pytest.raises(ValueError, match="'sky blue' must be one token"):
        Judge(adapted, load_config("data.template=plain"), EXAMPLES, ["sky blue"])


def test_without_a_global_model_each_site_is_judged_by_its_own(tmp_path):
    base = save_tiny_base(tmp_path / "base", "olmoe")
    config = load_config([
        "strategy=local_only", "data.num_examples=40", "train.max_steps=2", "train.learning_rate=0.1", "rounds=1",
        f"model.name={base.name}", "model.source=hub", "data.template=plain", "device=cpu",
    ])  # fmt: skip
    federation = simulated(config, tmp_path / "private")
    judge = Judge(federation.adapted, config, held_out_sets(config), [])
    before = judge.score(federation)
    federation.play()
    after = judge.score(federation)
    own = {name: site.adapter_in_use({}) for name, site in federation.sites.items()}
    assert after.sites == {name: judge.score_of(adapter).sites[name] for name, adapter in own.items()}
    assert after.loss == pytest.approx(np.mean([judge.score_of(adapter).loss for adapter in own.values()]))
    assert after != before


def test_expert_norm_is_the_mean_length():
    """Two experts of lengths 5 and 0: 2.5; attention is left out."""
    adapter = {"x.mlp.experts.down_proj": np.array([[3.0, 4.0], [0.0, 0.0]]), "x.attn.lora_A": np.ones((9, 9))}
    assert expert_norm(adapter) == 2.5
