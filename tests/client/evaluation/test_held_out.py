"""Held-out loss is the mean over response tokens, however they are batched."""

import math

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.evaluation.held_out import held_out_loss, nll_of_each, response_logits
from client.model import AdaptedModel
from client.text import TokenSequence, collate
from conf.model import LoraConfig
from tests.client.tiny_models import DENSE_FAMILIES, MOE_FAMILIES, save_tiny_base


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    torch.set_num_threads(1)
    # With dropout, so that an evaluation in training mode would show.
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe", attention_dropout=0.5)
    return AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig(rank=2))


@pytest.fixture
def adapter(adapted):
    generator = np.random.default_rng(1)
    return {name: array + generator.normal(0, 0.2, array.shape) for name, array in adapted.initial_adapter(0).items()}


@pytest.fixture
def sequences():
    """Nine sequences of 4 to 20 tokens; the first token and at least two more are prompt."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(9):
        length = int(generator.integers(4, 21))
        prompt = int(generator.integers(3, length))
        input_ids = generator.integers(0, 256, length).tolist()
        made.append(TokenSequence(input_ids, [-100] * prompt + input_ids[prompt:], [length]))
    return made


def test_loss_equals_the_models_own_one_sequence_at_a_time(adapted, adapter, sequences):
    """transformers averages over a sequence's n response tokens, so the total is the sum of n times its loss."""
    evaluated = held_out_loss(adapted, adapter, sequences, batch_size=4)
    total, num_tokens = 0.0, 0
    adapted.load_adapter(adapter)
    with torch.no_grad():
        for sequence in sequences:
            num_labels = sum(label != -100 for label in sequence.labels)
            output = adapted.model(input_ids=torch.tensor([sequence.input_ids]), labels=torch.tensor([sequence.labels]))
            total += output.loss.item() * num_labels
            num_tokens += num_labels
    assert evaluated.loss == pytest.approx(total / num_tokens, rel=1e-5)
    assert evaluated.num_tokens == num_tokens
    assert evaluated.num_examples == 9


@pytest.mark.parametrize("family", [*MOE_FAMILIES, *DENSE_FAMILIES, "gpt2"])
def test_logits_and_gradients_are_those_of_the_whole_sequences(tmp_path, sequences, family):
    """Against transformers' logits of all positions, from which those before a response token are picked."""
    config = save_tiny_base(tmp_path, family)
    adapted = AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig(rank=2))
    adapted.model.eval()
    batch = collate(sequences, pad_token_id=0)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    whole_BTV = adapted.model(**inputs, use_cache=False).logits
    places = [(b, t) for b, row in enumerate(batch["labels"][:, 1:].tolist()) for t, x in enumerate(row) if x != -100]
    expected = torch.stack([whole_BTV[b, t] for b, t in places])
    found, targets, _ = response_logits(adapted, batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert targets.tolist() == [batch["labels"][b, t + 1].item() for b, t in places]
    trained = list(adapted.parameters_by_name().values())
    wanted, given = (
        torch.autograd.grad(logits.logsumexp(-1).sum(), trained, allow_unused=True) for logits in (expected, found)
    )
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_order_and_batch_size_change_nothing_but_rounding(adapted, adapter, sequences, batch_size):
    expected = held_out_loss(adapted, adapter, sequences, batch_size=3)
    shuffled = [sequences[index] for index in np.random.default_rng(2).permutation(len(sequences))]
    evaluated = held_out_loss(adapted, adapter, shuffled, batch_size)
    assert evaluated.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (evaluated.num_tokens, evaluated.num_examples) == (expected.num_tokens, expected.num_examples)


def test_each_sequence_has_its_own_sum_in_the_order_given(adapted, adapter, sequences):
    found = nll_of_each(adapted, adapter, sequences, batch_size=4)
    alone = [held_out_loss(adapted, adapter, [sequence], batch_size=1) for sequence in sequences]
    assert found == pytest.approx([loss.loss * loss.num_tokens for loss in alone], rel=1e-5)


def test_the_adapter_given_is_evaluated_and_not_the_one_loaded_before(adapted, adapter, sequences):
    expected = held_out_loss(adapted, adapter, sequences, batch_size=4)
    adapted.load_adapter(adapted.initial_adapter(0))
    adapted.model.train()
    assert held_out_loss(adapted, adapter, sequences, batch_size=4) == expected
    for name, array in adapted.read_adapter().items():
        np.testing.assert_array_equal(array, adapter[name].astype(np.float32))


def test_uniform_predictions_cost_the_logarithm_of_the_vocabulary(adapted, sequences):
    """With an output embedding of zeros every token has probability 1/272: ln 272 = 5.606 nats."""
    head = adapted.model.get_output_embeddings().weight
    kept = head.detach().clone()
    try:
        head.data.zero_()
        evaluated = held_out_loss(adapted, adapted.initial_adapter(0), sequences, batch_size=4)
    finally:
        head.data.copy_(kept)
    assert evaluated.loss == pytest.approx(math.log(272), rel=1e-6)


def test_nothing_to_evaluate_on_is_an_error(adapted):
    with pytest.raises(ValueError, match="no held-out sequences"):
        held_out_loss(adapted, adapted.initial_adapter(0), [], batch_size=4)
