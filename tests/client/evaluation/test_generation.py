"""Greedy answers against a loop without cache, padding or library; ROUGE-L against the longest common subsequence."""

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.evaluation.generation import greedy, rouge_l
from client.model import AdaptedModel
from conf.model import LoraConfig
from tests.client.local_training import noisy
from tests.client.tiny_models import save_tiny_base

PROMPTS = [[257, 5, 9, 80], [257, 7], [257, 1, 2, 3, 4, 5, 6, 7, 8], [257, 200, 100], [257, 44, 44, 44]]


@pytest.fixture(scope="module", params=["olmoe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def adapted(request, tmp_path_factory):
    # With dropout, so that training mode would show.
    config = save_tiny_base(tmp_path_factory.mktemp("base"), request.param, attention_dropout=0.5)
    return AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig(rank=2))


def likeliest(adapted, adapter, prompt, count):
    """The argmax of the whole text's last logits, again and again."""
    adapted.load_adapter(adapter)
    text = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(adapted.model.eval()(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


def test_answers_are_the_likeliest_tokens_whatever_the_batch(adapted):
    adapter = noisy(adapted.initial_adapter(0), deviation=0.3)
    expected = [likeliest(adapted, adapter, prompt, 4) for prompt in PROMPTS]
    adapted.load_adapter(adapted.initial_adapter(0))
    adapted.model.train()
    for batch_size in (2, 8):
        assert greedy(adapted, adapter, PROMPTS, 4, batch_size=batch_size) == expected


def test_answer_ends_before_the_end_of_sequence(adapted):
    adapter, tokenizer = noisy(adapted.initial_adapter(0), deviation=0.3), adapted.tokenizer
    expected, kept = likeliest(adapted, adapter, PROMPTS[0], 6), tokenizer.eos_token
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(expected[3])
    try:
        answers = greedy(adapted, adapter, PROMPTS[:2], 6, batch_size=2)
    finally:
        tokenizer.eos_token = kept
    assert answers[0] == expected[: expected.index(expected[3])]
    assert expected[3] not in answers[1]


def naive_f_measure(answer, reference):
    """2 P R / (P + R) of the longest common subsequence of words, by the table of all prefixes."""
    left, right = answer.lower().split(), reference.lower().split()
    table = np.zeros((len(left) + 1, len(right) + 1), int)
    for i, word in enumerate(left):
        for j, other in enumerate(right):
            table[i + 1, j + 1] = table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
    return 2 * table[-1, -1] / (len(left) + len(right))


def test_rouge_l_is_the_mean_f_measure():
    answers = ["the cat sat on the mat", "red", "one two three", "The Cat"]
    references = ["on the mat the cat lay down", "blue", "one three", "the cat"]
    expected = [naive_f_measure(*pair) for pair in zip(answers, references, strict=True)]
    assert expected[1] == 0
    assert expected[3] == 1
    assert rouge_l(answers, references) == pytest.approx(np.mean(expected))


def test_empty_answer_counts_as_nothing_and_no_answers_are_an_error():
    assert rouge_l(["", "a b"], ["a b", "a b"]) == 0.5
    with pytest.raises(ValueError, match="no answers to compare"):
        rouge_l([], [])
