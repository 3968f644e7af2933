"""The training core on a CUDA device; needs no more than torch, transformers, peft, numpy, safetensors and pytest."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.grafting.selection import select_experts
from client.live_bytes import step_peak_bytes
from client.memory import Passes, Shape, TrainingMemory, choose_micro_batch, free_bytes
from client.model import AdaptedModel
from client.runtime import configure_torch, gpu_is_lost, resolve_device
from conf.methods import GraftConfig
from conf.model import ExpertTraining, LoraConfig, Precision
from conf.schema import Device, OptimizerState, TrainConfig
from tests.client.local_training import distance, eight_sequences, gradient, length, noisy, run
from tests.client.tiny_models import save_tiny_base

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 8,
}


LOST = """
import torch
from client.runtime import gpu_is_lost
values = torch.zeros(2, device="cuda")
assert not gpu_is_lost()
try:
    values[torch.tensor([5], device="cuda")].cpu()
except RuntimeError:
    print(gpu_is_lost())
"""


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


@pytest.fixture(scope="module")
def wider_config(tmp_path_factory):
    """Wide enough that tensors outweigh what kernels keep for themselves."""
    return save_tiny_base(tmp_path_factory.mktemp("wider"), "olmoe", **SIZES)


@pytest.fixture(autouse=True)
def _switches_as_before():
    yield
    configure_torch(TrainConfig())


def adapted_on(device, config, rank=2, **changes):
    config = replace(config, **changes)
    return AdaptedModel(load_base(config, torch.device(device)), config, LoraConfig(rank=rank))


@pytest.mark.parametrize("experts", [ExpertTraining.lora, ExpertTraining.full])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(Precision.float32, 1e-3), (Precision.bfloat16, 0.25), (Precision.float16, 0.05)]
)
def test_gradient_is_that_of_float32_on_the_cpu(base_config, experts, dtype, tolerance):
    """A relative distance. bfloat16 keeps 8 bits of a number, so a token near a tie may go to another expert."""
    exact = adapted_on("cpu", base_config, experts=experts)
    start = noisy(exact.initial_adapter(0), deviation=0.05)
    expected = gradient(exact, eight_sequences(), start)
    found = gradient(adapted_on("cuda", base_config, dtype=dtype, experts=experts), eight_sequences(), start)
    assert distance(found, expected) < tolerance * length(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_deterministic_rounds_give_the_same_bits_twice(wider_config, checkpointing):
    adapted = adapted_on("cuda", wider_config, dtype=Precision.bfloat16)
    start = noisy(adapted.initial_adapter(0), deviation=0.02)
    settings = {"deterministic": True, "gradient_checkpointing": checkpointing, "max_steps": 8}
    first, again = (run(adapted, eight_sequences(), start, **settings) for _ in range(2))
    for name, array in first.adapter.items():
        np.testing.assert_array_equal(again.adapter[name], array)


def test_kept_moments_go_on_where_they_stopped(base_config):
    """Fused AdamW wants its step counts on the device."""
    adapted = adapted_on("cuda", base_config)
    start = noisy(adapted.initial_adapter(0))
    generator = np.random.default_rng(0)
    keep = {"optimizer_state": OptimizerState.keep, "max_steps": 3, "deterministic": True}
    first = run(adapted, eight_sequences(), start, generator=generator, **keep)
    second = run(adapted, eight_sequences(), first.adapter, optimizer=first.optimizer, generator=generator, **keep)
    long = run(adapted, eight_sequences(), start, **{**keep, "max_steps": 6})
    for name, array in long.adapter.items():
        np.testing.assert_allclose(second.adapter[name], array, atol=1e-6)


def test_micro_batches_and_checkpointing_change_no_gradient(base_config):
    adapted = adapted_on("cuda", base_config)
    start = noisy(adapted.initial_adapter(0))
    whole = gradient(adapted, eight_sequences(), start, batch_size=8)
    for settings in ({"micro_batch": 3}, {"gradient_checkpointing": True}):
        divided = gradient(adapted, eight_sequences(), start, batch_size=8, **settings)
        assert distance(divided, whole) < 1e-4 * length(whole)


@pytest.mark.parametrize("device", [Device.cpu, Device.cuda, Device.auto])
def test_a_sites_own_setting_chooses_the_device(device):
    """The node config's ``device`` replaces the run's before this is asked (``client.app``)."""
    assert resolve_device(device).type == ("cpu" if device is Device.cpu else "cuda")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [Precision.float32, Precision.bfloat16])
def test_estimate_is_close_above_what_cuda_allocates(wider_config, checkpointing, dtype):
    """Sixteen sequences of 512 tokens, from passes over one and two of them."""
    adapted = adapted_on("cuda", wider_config, rank=8, dtype=dtype)
    shape = Shape(512, 256, packed=False)
    memory = TrainingMemory(adapted, shape, gradient_checkpointing=checkpointing)
    estimated = memory.optimizer_bytes + memory.activation_bytes(16)
    sequences = [shape.sequence()] * 16
    settings = {"batch_size": 16, "max_steps": 2, "gradient_checkpointing": checkpointing}
    start = adapted.initial_adapter(0)
    run(adapted, sequences, start, **settings)
    before = torch.cuda.memory_allocated()
    grown = run(adapted, sequences, start, **settings).throughput.peak_memory_bytes - before
    assert 0.6 * estimated < grown <= estimated


def test_counted_peak_is_that_of_the_allocator(wider_config):
    adapted = adapted_on("cuda", wider_config, rank=8)
    sequences = [Shape(512, 256, packed=False).sequence()] * 8
    step_peak_bytes(adapted, sequences, gradient_checkpointing=False)
    gradients = sum(parameter.nbytes for parameter in adapted.parameters_by_name().values())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    counted = step_peak_bytes(adapted, sequences, gradient_checkpointing=False)
    allocated = torch.cuda.max_memory_allocated() - before - gradients
    assert counted == pytest.approx(allocated, rel=0.1)


def test_auto_stays_inside_the_share_of_a_process(wider_config):
    adapted = adapted_on("cuda", wider_config)
    device, shape = adapted.device, Shape(512, 256, packed=False)
    memory = TrainingMemory(adapted, shape, gradient_checkpointing=False)
    wanted = torch.cuda.memory_allocated() + memory.optimizer_bytes + memory.activation_bytes(5)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(wanted / torch.cuda.get_device_properties(device).total_memory)
    try:
        config = TrainConfig(batch_size=16, micro_batch="auto")
        chosen = choose_micro_batch(adapted, Passes([shape.sequence()] * 16), config, free_bytes(device))
        assert chosen in {4, 5}
        result = run(
            adapted, [shape.sequence()] * 16, adapted.initial_adapter(0), batch_size=16, max_steps=1, micro_batch="auto"
        )
        assert 1 <= result.micro_batch <= 5
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("dtype", [Precision.float32, Precision.bfloat16])
def test_a_graft_is_selected_as_on_the_cpu_and_starts_exactly(base_config, dtype):
    """Not a bit of a logit changes: the personal expert and its frozen twin go through the same kernels."""
    config = replace(base_config, experts=ExpertTraining.frozen, dtype=dtype)
    selected = {}
    for device in ("cpu", "cuda"):
        adapted = AdaptedModel(load_base(config, torch.device(device)), config, LoraConfig(rank=2), GraftConfig())
        initial = adapted.initial_adapter(0)
        adapted.load_adapter(initial)
        selected[device] = select_experts(adapted, eight_sequences(), 1, 4).layers
    choices = {layer: choice.experts for layer, choice in selected["cuda"].items()}
    if dtype is Precision.float32:
        assert choices == {layer: choice.experts for layer, choice in selected["cpu"].items()}
    tokens = torch.arange(40, 60, device="cuda")[None]
    with torch.no_grad():
        without = adapted.model(input_ids=tokens).logits
        adapted.load_adapter({**initial, **adapted.grafted(choices, np.random.default_rng(0))})
        assert torch.equal(adapted.model(input_ids=tokens).logits, without)


def test_a_failed_kernel_loses_the_gpu_for_its_process_alone():
    found = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=False, timeout=120)
    assert found.stdout.strip() == "True", found.stderr
    torch.zeros(2, device="cuda")
    assert not gpu_is_lost()
