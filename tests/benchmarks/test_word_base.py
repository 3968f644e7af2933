"""The base models of whole words that are shipped: their tokenizers, and that they know what the benchmarks rest on."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.word_base import EXPERTS, LABELS, WORD, most_frequent, word_tokenizer
from benchmarks.workloads import WORKLOADS


def test_words_and_line_breaks_are_tokens_and_others_unknown():
    tokenizer = word_tokenizer(["red", "sky", "?"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Red sky?\nplum", add_special_tokens=False)["input_ids"])
    assert tokens == ["red", "sky", "?", "\n", "<unk>"]


def test_every_source_of_words_counts_alike():
    """b is half of a short text, a most of a long one: a 0.9 and 0, b 0.1 and 0.5, c 0 and 0.5."""
    long, short = ["a " * 9 + "b"] * 50, ["b c"]
    assert most_frequent([long, short], ["z"], 3) == ["z", "a", "b"]


@pytest.mark.parametrize("base", EXPERTS, ids=lambda base: base.name)
def test_every_label_that_is_scored_is_a_word_of_the_base(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    scored = {label for workload in WORKLOADS.values() if not workload.model for label in workload.labels}
    assert scored >= set(LABELS)
    assert all(tokenizer.tokenize(label) == [label] for label in scored)


@pytest.mark.parametrize(("base", "shape"), EXPERTS.items(), ids=[base.name for base in EXPERTS])
def test_base_is_as_it_is_said_to_be_made_and_answers_as_it_was_taught(base, shape):
    """With a word of the text where one is asked for, with a category where the kind is."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    assert {key: getattr(model.config, key) for key in shape} == shape

    def likeliest(prompt):
        with torch.no_grad():
            logits_V = model(tokenizer(f"{prompt}\n", return_tensors="pt")["input_ids"]).logits[0, -1]
        return tokenizer.convert_ids_to_tokens(logits_V.topk(4).indices.tolist())

    asked = "what is the balance of my bank account"
    assert set(likeliest(f"{WORD} {asked}")) <= set(asked.split())
    assert "general_qa" in likeliest("what kind of text is this? how do i cook rice")
