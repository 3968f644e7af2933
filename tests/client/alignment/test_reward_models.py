"""Learnt rewards: heads fitted to pairs, and classifiers of transformers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from client.alignment.reward_models import LinearHead, named_rewards, pair_features
from client.alignment.reward_training import Pairs, accuracy, bradley_terry_weights, train_head
from client.model import adapted_model
from client.text import Example, byte_tokenizer
from conf.model import LoraConfig
from conf.schema import DataConfig, Template
from tests.client.local_training import noisy
from tests.client.tiny_models import VOCAB_SIZE, save_tiny_base, tiny_config

DATA = DataConfig(template=Template.plain, max_length=48, rejected_column="rejected")
NOUNS = ["sun", "tree", "road", "door", "book", "cup", "hill", "boat", "lamp", "stone", "bird", "wheel"]
PAIRS = [Example(f"Say {noun}.", "", f"{noun}!!!", f"no {noun}") for noun in NOUNS]

TURNED = [replace(pair, response=pair.rejected, rejected=pair.response) for pair in PAIRS[8:]]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return adapted_model(config, LoraConfig(rank=2), torch.device("cpu"))


@pytest.fixture(scope="module")
def head(adapted):
    return train_head(
        adapted, PAIRS[:8], {"held_out": PAIRS[8:], "turned": TURNED}, objective="loud", data=DATA, penalty=1e-3
    )


def save_classifier(folder, num_labels=1, **settings):
    torch.manual_seed(0)
    config = tiny_config("llama", num_labels=num_labels, **settings)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_weights_are_where_the_gradient_vanishes():
    """Of mean log(1 + exp(-w d)) + penalty / 2 |s w|^2, written out in numpy; and nothing near is lower."""
    generator = np.random.default_rng(0)
    differences = generator.normal(0.3, [1.0, 5.0, 0.1], (40, 3))
    weights = bradley_terry_weights(torch.tensor(differences), 0.05).numpy()
    square = (differences**2).mean(axis=0)

    def loss(w):
        return np.log1p(np.exp(-differences @ w)).mean() + 0.025 * (square * w**2).sum()

    slope = -(differences / (1 + np.exp(differences @ weights))[:, None]).mean(axis=0) + 0.05 * square * weights
    np.testing.assert_allclose(slope, 0, atol=1e-6)
    assert all(loss(weights) < loss(weights + generator.normal(0, 0.01, 3)) for _ in range(10))


def test_accuracy_counts_ties_half():
    pairs = Pairs(torch.tensor([[1.0], [0.0], [2.0]]), torch.tensor([[0.0], [1.0], [2.0]]))
    assert accuracy(torch.tensor([1.0]), pairs) == pytest.approx(0.5)


def test_a_head_learns_what_pairs_say_and_scores_the_same_after_a_round_trip(adapted, head, tmp_path):
    assert head.facts.accuracy["training"] == 1.0
    assert head.facts.accuracy["held_out"] >= 0.75
    assert head.facts.accuracy["turned"] == pytest.approx(1 - head.facts.accuracy["held_out"])
    head.save(tmp_path / "loud")
    base = Path(adapted.base.identity.name)
    assert base.is_absolute()
    assert head.facts.base_name == base.name  # a way to it would be another machine's
    rewards = named_rewards([f"loud:{tmp_path / 'loud'}", "length"], adapted, {})
    assert rewards.names == ["loud", "length"]
    prompts, better = [pair.prompt for pair in PAIRS], [pair.response for pair in PAIRS]
    adapted.load_adapter(noisy(adapted.initial_adapter(0)))  # rewards read the base, whatever is loaded
    found = rewards.score(prompts, better)[:, 0]
    adapted.load_adapter(adapted.initial_adapter(0))
    features = pair_features(adapted, prompts, better, DATA)
    np.testing.assert_allclose(found, features @ head.weight_D, rtol=1e-4, atol=1e-5)
    assert (found > rewards.score(prompts, [pair.rejected for pair in PAIRS])[:, 0])[:8].all()


def test_features_are_the_bases_hidden_states_averaged_over_a_response(adapted):
    """Of one text by hand: places 'before the response' to 'before its end', from the model's own output layer."""
    (feature,) = pair_features(adapted, ["Say sun."], ["sun"], DATA)
    ids = torch.tensor([adapted.tokenizer("Say sun.\nsun")["input_ids"]])
    with torch.no_grad():
        hidden = adapted.base.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(feature, hidden[-4:].mean(dim=0), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(pair_features(adapted, ["Say sun."], [""], DATA)).all()


def test_a_head_of_another_base_is_refused(adapted, head, tmp_path):
    foreign = LinearHead(head.weight_D, replace(head.facts, base_sha256="0" * 64))
    foreign.save(tmp_path)
    with pytest.raises(ValueError, match="reward 'loud' reads hidden states of .* train it again with this model"):
        named_rewards([f"loud:{tmp_path}"], adapted, {})


def test_a_damaged_head_is_refused(adapted, head, tmp_path):
    head.save(tmp_path)
    facts = json.loads((tmp_path / "reward_head.json").read_text())
    (tmp_path / "reward_head.json").write_text(json.dumps({**facts, "colour": "red"}))
    with pytest.raises(ValueError, match="holds no reward head that can be read"):
        named_rewards([f"loud:{tmp_path}"], adapted, {})


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_classifier_scores_a_pair_of_texts_by_its_logits(adapted, tmp_path, num_labels):
    folder = save_classifier(tmp_path / "classifier", num_labels)
    rewards = named_rewards([f"kind:{folder}"], adapted, {})
    found = rewards.score(["Hi.", "What is it?"], ["yes", "a longer answer"])[:, 0]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = byte_tokenizer()
    for prompt, completion, score in zip(["Hi.", "What is it?"], ["yes", "a longer answer"], found, strict=True):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        ids = tokenizer.apply_chat_template(chat, return_dict=False, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        assert score == pytest.approx(
            float(logits[0] if num_labels == 1 else logits[1] - logits[0]), rel=1e-3, abs=1e-5
        )
    assert len(tokenizer) <= VOCAB_SIZE


def test_a_pair_keeps_what_its_tokenizer_says_of_the_second_text(adapted, tmp_path):
    """BERT's token types, in a batch of pairs of different lengths."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "yes", "no", "surely"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "bert")
    pairs = [("is it", "yes"), ("it", "no surely"), ("is it " * 9, "yes yes")]
    found = named_rewards([f"kind:{tmp_path / 'bert'}"], adapted, {}).score(*map(list, zip(*pairs, strict=True)))[:, 0]
    for score, (prompt, completion) in zip(found[:2], pairs, strict=False):
        inputs = tokenizer(prompt, completion, return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(float(model(**inputs).logits), rel=1e-4)
            of_one_type = dict(inputs) | {"token_type_ids": torch.zeros_like(inputs["token_type_ids"])}
            assert score != pytest.approx(float(model(**of_one_type).logits), rel=1e-2)
    assert np.isfinite(found[2])


def test_a_classifier_scores_the_text_that_it_was_trained_to_score(adapted, tmp_path):
    """Whatever its tokenizer has a template for; braces of prompts and responses are theirs."""
    folder = save_classifier(tmp_path / "classifier", max_position_embeddings=64)
    formats = {"kind": r"Human: {prompt}\n\nAssistant: {response}."}
    reward = named_rewards([f"kind:{folder}"], adapted, formats)
    answers = ["{prompt}", "{response}"]
    found = reward.score(["Say {response}.", "word " * 60], answers)[:, 0]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = "Human: Say {response}.\n\nAssistant: {prompt}."
    with torch.no_grad():
        (logit,) = model(**byte_tokenizer()(text, return_tensors="pt")).logits[0]
    assert found[0] == pytest.approx(float(logit), rel=1e-3, abs=1e-5)
    assert found[0] != pytest.approx(
        named_rewards([f"kind:{folder}"], adapted, {}).score(["Say {response}."], answers[:1])[0, 0]
    )
    assert found[1] != reward.score(["word " * 60], ["yes"])[0, 0]  # of a long prompt the answer is still there


@pytest.mark.parametrize("has_chat", [True, False])
def test_of_what_is_too_long_the_prompts_beginning_is_left_out(adapted, tmp_path, has_chat):
    """The classifier reads 64 places: completions of one long prompt still differ, and a cut prompt is its end."""
    folder = save_classifier(tmp_path / "classifier", max_position_embeddings=64)
    if not has_chat:
        (folder / "chat_template.jinja").unlink()
    reward = named_rewards([f"kind:{folder}"], adapted, {})
    long = "word " * 60
    one, other, same, at_end, answer = reward.score(
        [long, long, f"something else {long}", f"{long}, or?", "x"], ["yes", "no", "yes", "yes", "y" * 99]
    )[:, 0]
    assert one != other
    assert one == pytest.approx(same, rel=1e-5)
    assert one != pytest.approx(at_end, rel=1e-5)
    assert np.isfinite(answer)


def test_a_language_model_is_no_classifier(adapted, tmp_path):
    """transformers would give it a head of random numbers, other ones at every site."""
    AutoModelForCausalLM.from_config(tiny_config("llama")).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"reward 'kind': .* is no sequence classifier: it has no weights for score"):
        named_rewards([f"kind:{tmp_path}"], adapted, {})


def test_what_is_no_classifier_is_refused_by_name(adapted, tmp_path):
    folder = save_classifier(tmp_path / "classifier", num_labels=3)
    with pytest.raises(ValueError, match="reward 'kind': .* has 3 labels, a reward needs 1"):
        named_rewards([f"kind:{folder}"], adapted, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="reward 'kind': no reward head and no sequence classifier at"):
        named_rewards([f"kind:{tmp_path / 'empty'}"], adapted, {})
    with pytest.raises(ValueError, match="'kind' is none of"):
        named_rewards(["kind"], adapted, {})
