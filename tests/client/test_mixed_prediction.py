"""The mixture of two models and its gate: against probabilities written out, and where the better expert is known."""

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.evaluation.generation import greedy
from client.evaluation.held_out import held_out_loss
from client.mixed_prediction import Gate, MixedTokens, Predictions, fitted_gate, mixed_loss, predictions
from client.model import AdaptedModel
from conf.model import LoraConfig
from tests.client.local_training import eight_sequences, noisy
from tests.client.tiny_models import save_tiny_base


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig(rank=2))


@pytest.fixture(scope="module")
def adapters(adapted):
    start = adapted.initial_adapter(0)
    return noisy(start, seed=1), noisy(start, seed=2)


def test_predictions_are_those_of_each_adapter_alone(adapted, adapters):
    """Their means are the held-out losses, whatever the batches."""
    sequences = eight_sequences()
    found = predictions(adapted, *adapters, sequences, batch_size=3)
    for log_p, adapter in zip((found.log_local_T, found.log_global_T), adapters, strict=True):
        expected = held_out_loss(adapted, adapter, sequences, batch_size=8)
        assert -log_p.mean().item() == pytest.approx(expected.loss, rel=1e-5)
        assert len(log_p) == expected.num_tokens


def test_hidden_states_are_what_the_global_models_logits_are_read_from(adapted, adapters):
    """The output embedding of the response's last position, of one sequence, by hand."""
    (sequence, *_) = eight_sequences()
    found = predictions(adapted, *adapters, [sequence], batch_size=1)
    adapted.load_adapter(adapters[1])
    with torch.no_grad():
        logits = adapted.model(input_ids=torch.tensor([sequence.input_ids])).logits[0, -2]
        ours = adapted.model.get_output_embeddings()(found.hidden_TD[-1])
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


def test_mixture_of_probabilities_by_hand():
    """At the start g = 1/2: tokens of .8 and .2 with .4 and .6 have .6 and .4."""
    found = Predictions(torch.tensor([0.8, 0.2]).log(), torch.tensor([0.4, 0.6]).log(), torch.randn(2, 3))
    gate = Gate(found.hidden_TD)
    np.testing.assert_allclose(gate.nll(found).detach(), -np.log([0.6, 0.4]), rtol=1e-6)
    loss = mixed_loss(gate, found, num_examples=1)
    assert (loss.loss, loss.num_tokens) == (pytest.approx(-np.log([0.6, 0.4]).mean()), 2)


def test_gate_learns_who_is_right_where():
    """The local model knows the tokens of one kind of hidden state, the global one those of the other.

    An even mixture is right by 0.5, at a loss of 0.69; the right one of the two by 0.9, at 0.11.
    """
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(400, 4, generator=generator)
    is_local_T = hidden_TD[:, 0] > 0
    right, wrong = torch.tensor(0.9).log(), torch.tensor(0.1).log()
    found = Predictions(torch.where(is_local_T, right, wrong), torch.where(is_local_T, wrong, right), hidden_TD)
    gate = fitted_gate(found)
    assert mixed_loss(gate, found, 1).loss < 0.35
    with torch.no_grad():
        g_T = gate(hidden_TD).sigmoid()
    assert g_T[is_local_T].mean() > 0.8
    assert g_T[~is_local_T].mean() < 0.2


def test_fitting_never_ends_above_either_model_alone_on_its_own_tokens(adapted, adapters):
    found = predictions(adapted, *adapters, eight_sequences(), batch_size=8)
    alone = min(-found.log_local_T.mean().item(), -found.log_global_T.mean().item())
    assert mixed_loss(fitted_gate(found), found, 8).loss < alone


def test_same_predictions_give_the_same_gate(adapted, adapters):
    found = predictions(adapted, *adapters, eight_sequences(), batch_size=8)
    first, again = fitted_gate(found), fitted_gate(found)
    assert torch.equal(first.weight_D, again.weight_D)


def test_nothing_to_predict_is_an_error(adapted, adapters):
    with pytest.raises(ValueError, match="no sequences to predict"):
        predictions(adapted, *adapters, [], batch_size=8)


def test_generated_tokens_are_the_mixtures_likeliest(adapted, adapters):
    """By plain passes of either adapter over the whole text and a mixture of probabilities; gates of both signs."""
    prompts, eos = [[257, 5, 9, 80, 3], [257, 7], [257, 44, 60]], adapted.tokenizer.eos_token_id
    local, shared = adapters
    gate = Gate(predictions(adapted, local, shared, eight_sequences(), batch_size=8).hidden_TD)
    with torch.no_grad():
        gate.weight_D.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    with MixedTokens(adapted, local, shared, gate) as processor:
        found = greedy(adapted, shared, prompts, 5, batch_size=3, processor=processor)
    for prompt, answer in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(5):
            outputs = []
            for adapter in adapters:
                adapted.load_adapter(adapter)
                with torch.no_grad():
                    outputs.append(adapted.model(input_ids=torch.tensor([text]), output_hidden_states=True))
            hidden = outputs[1].hidden_states[-1][0, -1]
            share = torch.sigmoid(gate(hidden))
            p_local, p_global = (output.logits[0, -1].softmax(dim=-1) for output in outputs)
            text.append(int((share * p_local + (1 - share) * p_global).argmax()))
        expected = text[len(prompt) :]
        assert answer == (expected[: expected.index(eos)] if eos in expected else expected)
    adapted.load_adapter(shared)  # nothing is watched any more
    assert greedy(adapted, shared, prompts, 5, batch_size=3) != found
