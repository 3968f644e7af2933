"""The local loop: which steps it takes, on what, and what it gives back."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import client.training
from client.base_model import load_base
from client.evaluation.held_out import held_out_loss
from client.failures import reason_of
from client.local_rule import LocalRule
from client.model import AdaptedModel
from client.throughput import training_began
from conf.model import ExpertTraining, LoraConfig, Precision, RouterTraining
from conf.schema import OptimizerState
from tests.client.local_training import distance, eight_sequences, gradient, noisy, run
from tests.client.tiny_models import TOP_K, save_tiny_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


@pytest.fixture(scope="module")
def adapted(base_config):
    return AdaptedModel(load_base(base_config, CPU), base_config, LoraConfig(rank=2))


@pytest.fixture(scope="module")
def sequences():
    return eight_sequences()


@pytest.fixture
def start(adapted):
    """The initial adapter with noise on it, so that no LoRA B is zero."""
    return noisy(adapted.initial_adapter(0))


def test_proximal_terms_gradient_is_mu_times_the_distance_from_the_anchor(adapted, sequences, start):
    """d/dw (mu/2) ||w - a||^2 = mu (w - a), on top of the loss's gradient; here mu = 3."""
    anchor = noisy(start, seed=1)
    plain = gradient(adapted, sequences, start)
    pulled = gradient(adapted, sequences, start, anchor=anchor, proximal_mu=3.0)
    for name in start:
        np.testing.assert_allclose(pulled[name] - plain[name], 3.0 * (start[name] - anchor[name]), atol=1e-5)


def test_an_array_without_an_anchor_is_not_pulled(adapted, sequences, start):
    kept, *others = start
    anchor = {name: noisy(start, seed=1)[name] for name in others}
    plain = gradient(adapted, sequences, start)
    pulled = gradient(adapted, sequences, start, anchor=anchor, proximal_mu=3.0)
    np.testing.assert_array_equal(pulled[kept], plain[kept])
    assert not np.array_equal(pulled[others[0]], plain[others[0]])


def test_a_huge_mu_keeps_the_adapter_at_the_anchor_and_none_leaves_it(adapted, sequences, start):
    settings = {"anchor": start, "max_steps": 15}
    free = run(adapted, sequences, start, **settings)
    held = run(adapted, sequences, start, proximal_mu=1e6, **settings)
    assert distance(held.adapter, start) < 0.2 * distance(free.adapter, start)


def test_reported_loss_leaves_the_proximal_term_out(adapted, sequences, start):
    anchor = noisy(start, seed=1)
    plain = run(adapted, sequences, start, max_steps=1)
    pulled = run(adapted, sequences, start, max_steps=1, anchor=anchor, proximal_mu=100.0)
    assert pulled.loss == plain.loss


def test_loss_is_the_mean_over_response_tokens_whatever_their_batch(adapted, sequences, start):
    """At a vanishing learning rate the adapter stays, so the epoch's loss is the loss of ``start``."""
    result = run(adapted, sequences, start, learning_rate=1e-12)
    expected = held_out_loss(adapted, start, sequences, batch_size=8)
    assert result.loss == pytest.approx(expected.loss, rel=1e-5)
    assert result.num_tokens == expected.num_tokens


def test_gradient_is_clipped_to_the_norm_asked_for(adapted, sequences, start):
    assert distance(gradient(adapted, sequences, start), dict.fromkeys(start, 0)) > 0.01
    clipped = gradient(adapted, sequences, start, max_grad_norm=0.01)
    assert distance(clipped, dict.fromkeys(start, 0)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("max_steps", "num_steps", "epochs"), [(None, 3, 1), (3, 3, 1), (6, 6, 2), (12, 12, 4)])
def test_steps_run_through_whole_reshuffled_epochs(adapted, sequences, start, max_steps, num_steps, epochs):
    """Eight sequences in batches of three are three steps an epoch; each epoch sees every sequence once."""
    result = run(adapted, sequences, start, max_steps=max_steps)
    assert result.num_steps == num_steps
    assert result.num_tokens == epochs * held_out_loss(adapted, start, sequences, batch_size=8).num_tokens
    num_tokens = epochs * sum(len(sequence.input_ids) for sequence in sequences)
    for tokens_E in result.expert_tokens.values():
        assert tokens_E.sum() == num_tokens * TOP_K


def test_seconds_are_those_from_the_first_step_on(adapted, sequences, start, monkeypatch):
    """Whatever comes before it, here an estimate of memory that takes its time."""
    ready = []

    def slow(*arguments):
        time.sleep(1)
        ready.append(time.time())
        return 1

    monkeypatch.setattr(client.training, "choose_micro_batch", slow)
    result = run(adapted, sequences[:1], start, max_steps=1)
    assert result.seconds < 1
    assert ready[0] <= training_began() <= time.time() - result.seconds + 0.01


def test_memory_that_others_took_meanwhile_is_told_in_words_that_may_leave_the_site(adapted, sequences, start):
    class Greedy(LocalRule):
        def accumulate(self, step):
            raise torch.OutOfMemoryError

    with pytest.raises(
        ValueError, match=r"cpu ran out of memory in training step 1, 2 sequence\(s\) at a time"
    ) as caught:
        run(adapted, sequences, start, rule=Greedy(), micro_batch=2)
    assert reason_of(caught.value) == str(caught.value)


def test_fewer_steps_than_an_epoch_see_as_many_batches(adapted, sequences, start):
    result = run(adapted, [sequences[0]] * 8, start, max_steps=2)
    assert result.num_steps == 2
    assert {tokens_E.sum() for tokens_E in result.expert_tokens.values()} == {
        2 * 3 * len(sequences[0].input_ids) * TOP_K
    }


def test_same_generator_same_bits_and_another_one_another_order(adapted, sequences, start):
    first = run(adapted, sequences, start)
    again = run(adapted, sequences, start)
    other = run(adapted, sequences, start, generator=np.random.default_rng(1))
    for name in start:
        np.testing.assert_array_equal(again.adapter[name], first.adapter[name])
    assert distance(other.adapter, first.adapter) > 1e-4


def test_dropout_too_is_drawn_from_the_generator(tmp_path, sequences):
    config = save_tiny_base(tmp_path, "olmoe", attention_dropout=0.5)
    adapted = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
    start = noisy(adapted.initial_adapter(0))
    first, again = (run(adapted, sequences, start) for _ in range(2))
    for name in start:
        np.testing.assert_array_equal(again.adapter[name], first.adapter[name])


@pytest.mark.parametrize(
    ("experts", "router"),
    [(ExpertTraining.lora, RouterTraining.frozen), (ExpertTraining.full, RouterTraining.averaged)],
)
def test_kept_moments_make_two_rounds_one_long_round(base_config, sequences, experts, router):
    """Two rounds of one epoch with one generator see the batches of one round of two epochs."""
    config = replace(base_config, experts=experts, router=router)
    adapted = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
    start = noisy(adapted.initial_adapter(0))
    keep = {"optimizer_state": OptimizerState.keep, "max_steps": 3, "weight_decay": 0.01}
    long = run(adapted, sequences, start, **{**keep, "max_steps": 6})
    generator = np.random.default_rng(0)
    first = run(adapted, sequences, start, generator=generator, **keep)
    second = run(adapted, sequences, first.adapter, optimizer=first.optimizer, generator=generator, **keep)
    for name in start:
        np.testing.assert_array_equal(second.adapter[name], long.adapter[name])
        assert second.optimizer[f"exp_avg/{name}"].shape == start[name].shape
        assert second.optimizer[f"step/{name}"] == 6
    generator = np.random.default_rng(0)
    run(adapted, sequences, start, generator=generator, **keep)
    fresh = run(adapted, sequences, first.adapter, generator=generator, **keep)
    assert distance(fresh.adapter, long.adapter) > 1e-4


def test_moments_are_given_back_only_if_they_are_kept(adapted, sequences, start):
    assert run(adapted, sequences, start, max_steps=1).optimizer == {}


def test_training_lowers_the_loss_and_leaves_base_and_inputs_alone(adapted, sequences, start):
    before = {name: weight.clone() for name, weight in adapted.base.model.state_dict().items()}
    given = {name: array.copy() for name, array in start.items()}
    result = run(adapted, sequences, start, anchor=start, proximal_mu=0.01, max_steps=30)
    before_loss, after_loss = (held_out_loss(adapted, a, sequences, 8).loss for a in (start, result.adapter))
    assert after_loss < before_loss - 0.5
    for name, weight in adapted.base.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    for name, array in start.items():
        np.testing.assert_array_equal(array, given[name])


@pytest.mark.parametrize("experts", [ExpertTraining.lora, ExpertTraining.full])
@pytest.mark.parametrize("dtype", [Precision.bfloat16, Precision.float16])
def test_a_base_of_half_precision_trains_float32_adapters_in_the_same_direction(base_config, sequences, dtype, experts):
    """bfloat16 keeps 8 bits of a number, so the gradient's cosine with that of float32 stays near 1."""
    gradients = []
    for precision in (Precision.float32, dtype):
        config = replace(base_config, dtype=precision, experts=experts)
        adapted = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
        start = noisy(adapted.initial_adapter(0), deviation=0.05)
        found = gradient(adapted, sequences, start)
        assert {parameter.dtype for parameter in adapted.parameters_by_name().values()} == {torch.float32}
        gradients.append(np.concatenate([found[name].ravel() for name in sorted(found)]))
    exact, rounded = gradients
    assert exact @ rounded > 0.98 * np.linalg.norm(exact) * np.linalg.norm(rounded)
    assert np.linalg.norm(rounded) == pytest.approx(np.linalg.norm(exact), rel=0.05)


def test_a_loss_that_is_not_finite_names_the_step_and_what_to_lower(adapted, sequences, start):
    with pytest.raises(ValueError, match=r"training step 1: loss is nan.*lower train\.learning_rate=0\.01"):
        run(adapted, sequences, {name: array * np.float32(1e30) for name, array in start.items()})


def test_nothing_to_train_on_is_an_error(adapted, start):
    with pytest.raises(ValueError, match="no training sequences"):
        run(adapted, [], start)
