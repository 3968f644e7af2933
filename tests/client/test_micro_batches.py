"""How a step is divided and what it keeps: micro-batches, checkpointing, packing, and what a round leaves behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.model import AdaptedModel
from client.text import TokenSequence
from conf.model import ExpertTraining, LoraConfig, Precision
from conf.schema import OptimizerState
from tests.client.local_training import distance, eight_sequences, gradient, length, live_tensor_bytes, noisy, run
from tests.client.tiny_models import save_tiny_base

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
    return noisy(adapted.initial_adapter(0))


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8])
def test_gradient_of_a_split_step_is_that_of_the_whole_batch(adapted, sequences, start, micro_batch):
    """Sequences of unlike numbers of response tokens: a mean of the passes' means would be another gradient."""
    settings = {"batch_size": 8, "anchor": noisy(start, seed=1), "proximal_mu": 0.3}
    whole = gradient(adapted, sequences, start, **settings)
    split = gradient(adapted, sequences, start, micro_batch=micro_batch, **settings)
    assert distance(split, whole) < 1e-6 * length(whole)


def test_a_step_weighs_each_sequence_by_its_response_tokens(adapted, sequences, start):
    """The other oracle: the gradients of single sequences, averaged; equal weights, a mean of means, give another."""
    parts = [gradient(adapted, [sequence], start) for sequence in sequences]
    split = gradient(adapted, sequences, start, batch_size=8, micro_batch=1)

    def error(weights):
        mean = {name: np.average([part[name] for part in parts], axis=0, weights=weights) for name in start}
        return distance(split, mean) / length(split)

    assert error([sequence.num_targets for sequence in sequences]) < 1e-5
    assert error([1] * 8) > 0.01


@pytest.mark.parametrize("micro_batch", [1, 2, "auto"])
def test_micro_batch_changes_a_round_by_rounding_only(adapted, sequences, start, micro_batch):
    whole = run(adapted, sequences, start, optimizer_state=OptimizerState.keep)
    split = run(adapted, sequences, start, optimizer_state=OptimizerState.keep, micro_batch=micro_batch)
    assert split.micro_batch == (3 if micro_batch == "auto" else micro_batch)
    assert (split.num_tokens, split.num_steps) == (whole.num_tokens, whole.num_steps)
    assert split.loss == pytest.approx(whole.loss, rel=1e-6)
    assert distance(split.adapter, whole.adapter) < 1e-4 * distance(whole.adapter, start)
    for layer in whole.expert_tokens:
        np.testing.assert_array_equal(split.expert_tokens[layer], whole.expert_tokens[layer])


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [
        (ExpertTraining.lora, Precision.float32),
        (ExpertTraining.full, Precision.float32),
        (ExpertTraining.lora, Precision.bfloat16),
    ],
)
def test_checkpointing_changes_no_gradient_and_counts_no_token_twice(base_config, sequences, experts, dtype):
    config = replace(base_config, experts=experts, dtype=dtype)
    adapted = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
    start = noisy(adapted.initial_adapter(0))
    settings = {"max_steps": 1, "optimizer_state": OptimizerState.keep}
    plain = run(adapted, sequences, start, **settings)
    thrifty = run(adapted, sequences, start, gradient_checkpointing=True, **settings)
    assert distance(thrifty.optimizer, plain.optimizer) < 1e-6 * distance(
        plain.optimizer, dict.fromkeys(plain.optimizer, 0)
    )
    for layer, tokens_E in plain.expert_tokens.items():
        np.testing.assert_array_equal(thrifty.expert_tokens[layer], tokens_E)


def test_checkpointing_computes_layers_twice_and_ends_with_its_round(adapted, sequences, start):
    layer, calls = adapted.model.get_base_model().get_submodule("model.layers.0.mlp"), []
    for checkpointing, forwards in ((True, 2), (False, 1)):
        settings = {"max_steps": 1, "gradient_checkpointing": checkpointing}
        run(adapted, sequences, start, **settings)  # measures the memory of a step
        handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
        run(adapted, sequences, start, **settings)
        handle.remove()
        assert len(calls) == forwards
        calls.clear()


def test_packed_examples_train_the_same_tokens_as_single_ones(adapted, sequences, start):
    """Two and two sequences joined: the same response tokens, routed tokens and gradient as apart."""
    pairs = [
        TokenSequence(a.input_ids + b.input_ids, a.labels + b.labels, a.lengths + b.lengths)
        for a, b in zip(sequences[::2], sequences[1::2], strict=True)
    ]
    settings = {"max_steps": 1, "optimizer_state": OptimizerState.keep}
    apart = run(adapted, sequences, start, batch_size=8, **settings)
    packed = run(adapted, pairs, start, batch_size=4, **settings)
    assert packed.num_tokens == apart.num_tokens
    for layer, tokens_E in apart.expert_tokens.items():
        np.testing.assert_array_equal(packed.expert_tokens[layer], tokens_E)
    assert distance(packed.optimizer, apart.optimizer) < 1e-5 * length(apart.optimizer)


def test_a_round_leaves_no_gradient_and_no_moments_behind(adapted, sequences, start):
    """The next virtual client of the process needs the memory, also when this one failed."""

    run(adapted, sequences, start)
    before = live_tensor_bytes()
    run(adapted, sequences, start, optimizer_state=OptimizerState.keep)
    with pytest.raises(ValueError, match="training step 1"):
        run(adapted, sequences, {name: array * np.float32(1e30) for name, array in start.items()})
    assert live_tensor_bytes() <= before  # what other tests left may be collected meanwhile
    assert all(parameter.grad is None for parameter in adapted.parameters_by_name().values())


@pytest.mark.parametrize("experts", [ExpertTraining.lora, ExpertTraining.full])
def test_deterministic_rounds_give_the_same_bits_and_need_no_forbidden_operation(base_config, sequences, experts):
    config = replace(base_config, experts=experts)
    adapted = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
    start = noisy(adapted.initial_adapter(0))
    first, again = (run(adapted, sequences, start, deterministic=True) for _ in range(2))
    assert torch.are_deterministic_algorithms_enabled()
    for name in start:
        np.testing.assert_array_equal(again.adapter[name], first.adapter[name])
    run(adapted, sequences, start)
    assert not torch.are_deterministic_algorithms_enabled()
