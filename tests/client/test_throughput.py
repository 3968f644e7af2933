"""Tokens a second, peak memory and FLOP utilization, against hand and against torch's own counter."""

import mmap
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from client.base_model import load_base
from client.evaluation.held_out import response_nll
from client.model import AdaptedModel
from client.text import TokenSequence, collate
from client.throughput import Lengths, ThroughputMeter, matmul_flops_per_second, peak_memory_bytes, training_flops
from conf.model import LoraConfig
from tests.client.local_training import eight_sequences, noisy, run
from tests.client.tiny_models import NUM_LAYERS, TOP_K, VOCAB_SIZE, save_tiny_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))


def test_flops_of_a_mixture_by_hand(olmoe):
    """Width 16, four experts of width 24 of which two a token, vocabulary 272, rank 2, one example of 10 tokens.

    Frozen a layer and token: attention 4 * 16 * 16, router 4 * 16, two experts of 3 * 16 * 24. Head: 272 * 16, for
    the 3 with a loss alone.
    Trained: on four attention projections 2 * (16 + 16); an expert's gate_up 2 * (16 + 48), its down 2 * (24 + 16).
    """
    frozen = NUM_LAYERS * (4 * 16 * 16 + 4 * 16 + TOP_K * 3 * 16 * 24)
    trained = NUM_LAYERS * (4 * 2 * 32 + TOP_K * (2 * 64 + 2 * 40))
    attention = 12 * NUM_LAYERS * 16 * 10 * 10
    routed = dict.fromkeys(olmoe.layers, 10.0 * TOP_K)
    expected = 10 * (4 * frozen + 6 * trained) + 3 * 4 * VOCAB_SIZE * 16 + attention
    assert training_flops(olmoe, Lengths(10, 3, 100), routed) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_flops_of_a_dense_model_are_those_that_torch_counts(tmp_path, family):
    """Within 3 %: the embeddings need no gradient. Eager attention, since torch does not count the CPU's fused one."""
    config = save_tiny_base(tmp_path, family, hidden_size=64, num_hidden_layers=6)
    adapted = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=4))
    adapted.model.get_base_model().set_attn_implementation("eager")
    adapted.load_adapter(noisy(adapted.initial_adapter(0)))
    sequence = TokenSequence([5] * 32, [-100] * 20 + [5] * 12, [32])
    batch = collate([sequence] * 4, 256)
    with FlopCounterMode(display=False) as counter:
        nll, _ = response_nll(adapted, batch)
        nll.backward()
    assert training_flops(adapted, Lengths(4 * 32, 4 * 12, 4 * 32**2), {}) == pytest.approx(
        counter.get_total_flops(), rel=0.03
    )


def test_meter_counts_tokens_without_padding_and_examples_of_a_pack_apart(olmoe):
    """Utilization is FLOPs over time and peak, so its ratio to tokens a second is free of the clock."""
    pack = TokenSequence([1] * 7, [1] * 7, [3, 4])
    meter = ThroughputMeter(olmoe)
    meter.add([pack, pack])
    reached = meter.result({layer: np.array([28.0, 0, 0, 0]) for layer in olmoe.layers})
    flops = training_flops(olmoe, Lengths(14, 12, 2 * (9 + 16)), dict.fromkeys(olmoe.layers, 28.0))
    peak = matmul_flops_per_second("cpu", torch.float32, torch.get_num_threads())
    per_token = reached.flop_utilization / reached.tokens_per_second * 14
    assert per_token == pytest.approx(flops / peak, rel=1e-6)


def test_a_round_reports_what_it_reached(olmoe):
    result = run(olmoe, eight_sequences(), olmoe.initial_adapter(0))
    num_tokens = sum(len(sequence.input_ids) for sequence in eight_sequences())
    assert result.throughput.tokens_per_second >= num_tokens / result.seconds
    assert 0 < result.throughput.flop_utilization < 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def take_and_free(num_bytes):
    """Pages of their own: the heap may have room enough from earlier."""
    with mmap.mmap(-1, num_bytes) as pages:
        pages[:: mmap.PAGESIZE] = bytes(num_bytes // mmap.PAGESIZE)


def test_peak_memory_is_that_of_the_round(olmoe):
    """64 MiB before the meter was made do not count, 64 MiB after it do, freed or not."""
    take_and_free(64 << 20)
    meter = ThroughputMeter(olmoe)
    low = peak_memory_bytes(CPU)
    take_and_free(64 << 20)
    high = meter.result({}).peak_memory_bytes
    assert 40 << 20 < high - low < 90 << 20  # the heap may give something back meanwhile


def test_measuring_the_peak_draws_no_random_number():
    state = torch.get_rng_state()
    matmul_flops_per_second.cache_clear()
    matmul_flops_per_second("cpu", torch.float32, torch.get_num_threads())
    assert torch.equal(torch.get_rng_state(), state)
