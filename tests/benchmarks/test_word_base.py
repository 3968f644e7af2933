"""The base model of whole words that is shipped: its tokenizer, and that it knows what the benchmarks rest on."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.word_base import LABELS, WORD, WORD_BASE, most_frequent, word_tokenizer
from benchmarks.workloads import WORKLOADS


def test_words_and_line_breaks_are_tokens_and_others_unknown():
    tokenizer = word_tokenizer(["red", "sky", "?"])
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Red sky?\nplum", add_special_tokens=False)["input_ids"])
    assert tokens == ["red", "sky", "?", "\n", "<unk>"]


def test_every_source_of_words_counts_alike():
    """b is half of a short text, a most of a long one: a 0.9 and 0, b 0.1 and 0.5, c 0 and 0.5."""
    long, short = ["a " * 9 + "b"] * 50, ["b c"]
    assert most_frequent([long, short], ["z"], 3) == ["z", "a", "b"]


def test_every_label_that_is_scored_is_a_word_of_the_base():
    tokenizer = AutoTokenizer.from_pretrained(WORD_BASE)
    scored = {label for workload in WORKLOADS.values() if not workload.model for label in workload.labels}
    assert scored >= set(LABELS)
    assert all(tokenizer.tokenize(label) == [label] for label in scored)


def test_base_answers_as_it_was_taught():
    """With a word of the text where one is asked for, with a category where the kind is."""
    tokenizer = AutoTokenizer.from_pretrained(WORD_BASE)
    model = AutoModelForCausalLM.from_pretrained(WORD_BASE, dtype="float32")

    def likeliest(prompt):
        with torch.no_grad():
            logits_V = model(tokenizer(f"{prompt}\n", return_tensors="pt")["input_ids"]).logits[0, -1]
        return tokenizer.convert_ids_to_tokens(logits_V.topk(4).indices.tolist())

    asked = "what is the balance of my bank account"
    assert set(likeliest(f"{WORD} {asked}")) <= set(asked.split())
    assert "general_qa" in likeliest("what kind of text is this? how do i cook rice")
