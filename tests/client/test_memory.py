"""What training is said to take, against what it takes."""

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import client.memory
from client.alignment.rollouts import sample
from client.base_model import load_base
from client.live_bytes import LiveBytes, sampling_peak_bytes, step_peak_bytes
from client.memory import Passes, Shape, TrainingMemory, choose_micro_batch
from client.model import AdaptedModel
from client.prompts import PromptSequence
from client.text import TokenSequence
from client.throughput import matrix_weights
from conf.model import LoraConfig, Precision, Quantization
from conf.schema import TrainConfig
from tests.client.local_training import eight_sequences
from tests.client.tiny_models import save_tiny_base

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
SHAPE = Shape(num_tokens=64, num_targets=32, packed=False)


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


@pytest.fixture(scope="module")
def adapted(base_config):
    return AdaptedModel(load_base(base_config, CPU), base_config, LoraConfig(rank=2))


@pytest.fixture(scope="module")
def memory(adapted):
    return TrainingMemory(adapted, SHAPE, gradient_checkpointing=False)


def test_live_bytes_by_hand():
    """Two tensors of 400 bytes and their sum; views and what was there before cost nothing; what goes is let go."""
    given = torch.ones(100)
    with LiveBytes([given]) as live:
        given.view(10, 10)
        first, second = given + 1, given + 2
        both = first + second
        assert live.peak == 1200
        del first, second
        both.view(50, 2).add_(given[:2])
        torch.zeros(100, dtype=torch.float64)
        assert live.peak == 1200
        kept = both[:1]
        del both
        torch.zeros(250)
    assert live.peak == 1400
    assert kept.numel() == 1


def test_activations_of_a_linear_map_by_hand():
    """y = relu(x W), its sum backwards: y and relu(y) are kept while their gradients are made."""
    weight, inputs = torch.nn.Parameter(torch.ones(16, 1024)), torch.ones(4, 16)
    weight.grad = torch.zeros_like(weight)
    with LiveBytes([weight, weight.grad, inputs]) as live:
        (inputs @ weight).relu().sum().backward()
    product, gradient = 4 * 1024 * 4, weight.nbytes
    # At the end of the pass: the product's gradient and the weight's, before it is added to what is there.
    assert live.peak == pytest.approx(product + gradient, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_passes_tell_what_more_sequences_take(adapted, checkpointing):
    memory = TrainingMemory(adapted, SHAPE, gradient_checkpointing=checkpointing)
    counted = step_peak_bytes(adapted, [SHAPE.sequence()] * 7, gradient_checkpointing=checkpointing)
    headroom = 3.8 if checkpointing else 2.4
    assert memory.activation_bytes(7) == pytest.approx(headroom * counted, rel=0.05)


def test_checkpointing_needs_less(adapted):
    """One of two layers is kept instead of both, beside what the output layer takes."""
    plain, thrifty = (
        step_peak_bytes(adapted, [SHAPE.sequence()] * 4, gradient_checkpointing=flag) for flag in (False, True)
    )
    assert thrifty < 0.8 * plain


def test_base_adapter_gradients_and_moments_by_hand(base_config, adapted, memory):
    """Sums over the parameters: float32, except the base's when it is in bfloat16."""
    num_base = sum(parameter.numel() for parameter in adapted.base.model.parameters())
    num_trained = sum(parameter.numel() for parameter in adapted.parameters_by_name().values())
    buffers = sum(buffer.nbytes for buffer in adapted.base.model.buffers())
    assert memory.base_bytes == 4 * num_base + buffers
    assert memory.adapter_bytes == 4 * num_trained
    assert memory.optimizer_bytes == 3 * 4 * num_trained
    config = replace(base_config, dtype=Precision.bfloat16)
    halved = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
    assert TrainingMemory(halved, SHAPE, gradient_checkpointing=False).base_bytes < 0.6 * memory.base_bytes


def test_a_quantised_base_counts_by_its_integers_and_scales(base_config, memory):
    """Linear maps and experts at a byte a weight; embeddings, head and norms stay in float32."""
    pytest.importorskip("torchao")
    config = replace(base_config, quantization=Quantization.int8)
    quantised = AdaptedModel(load_base(config, CPU), config, LoraConfig(rank=2))
    model = quantised.base.model
    scales = sum(weight.shape[:-1].numel() for weight in matrix_weights(model).values()) * 4
    saved = memory.base_bytes - TrainingMemory(quantised, SHAPE, gradient_checkpointing=False).base_bytes
    narrowed = sum(weight.numel() for name, weight in matrix_weights(model).items() if is_narrow(name))
    assert 3 * narrowed - scales <= saved <= 3 * narrowed


def is_narrow(name):
    return ".experts." in name or name.endswith("_proj.weight")


def test_measuring_changes_nothing(adapted):
    before = adapted.read_adapter()
    adapted.model.eval()
    step_peak_bytes(adapted, eight_sequences(), gradient_checkpointing=True)
    assert not adapted.model.training
    assert all(parameter.grad is None for parameter in adapted.parameters_by_name().values())
    assert all((adapted.read_adapter()[name] == array).all() for name, array in before.items())


@pytest.mark.parametrize("num_free", [1, 3, 7])
def test_largest_micro_batch_fits_and_the_next_does_not(memory, num_free):
    free = memory.optimizer_bytes + memory.activation_bytes(num_free)
    assert memory.largest_fit(8, free) == num_free
    assert memory.largest_fit(2, free) == min(2, num_free)
    assert memory.largest_fit(8, free - 1) == num_free - 1


def packed_and_single():
    return [TokenSequence([1] * 30, [-100] * 20 + [1] * 10, [30]), TokenSequence([1] * 20, [1] * 20, [10, 10])]


def test_shape_bounds_every_sequence():
    """19 targets: nothing predicts the first token. Packed as soon as one is."""
    assert Shape.of(packed_and_single()) == Shape(30, 19, packed=True)
    assert Shape.of(packed_and_single()[:1]) == Shape(30, 10, packed=False)
    for shape in (Shape(30, 19, packed=True), Shape(30, 10, packed=False)):
        assert Shape.of([shape.sequence()]) == shape


def free_for(adapted, sequences, count):
    memory = TrainingMemory(adapted, Shape.of(sequences), gradient_checkpointing=False)
    return memory.optimizer_bytes + memory.activation_bytes(count)


def test_auto_takes_what_fits_and_never_more_than_the_step_has(adapted):
    sequences = eight_sequences()
    config = TrainConfig(batch_size=6, micro_batch="auto")
    for count, chosen in ((1, 1), (4, 4), (6, 6), (100, 6)):
        assert choose_micro_batch(adapted, Passes(sequences), config, free_for(adapted, sequences, count)) == chosen
    assert choose_micro_batch(adapted, Passes(sequences[:2]), config, 1 << 40) == 2


def test_what_does_not_fit_is_refused_with_numbers_and_a_way_out(adapted):
    sequences = eight_sequences()
    free = free_for(adapted, sequences, 3)
    whole = TrainConfig(batch_size=6)
    with pytest.raises(
        ValueError,
        match=r"training needs \d+\.\d MiB beside .* activations of 6 x 15 tokens; [\d.]+ MiB are free on cpu: "
        r"set train\.micro_batch=3 \(or auto\)",
    ):
        choose_micro_batch(adapted, Passes(sequences), whole, free)
    assert choose_micro_batch(adapted, Passes(sequences), replace(whole, micro_batch=3), free) == 3
    with pytest.raises(ValueError, match=r"activations of 6 x .* set train\.gradient_checkpointing=true"):
        choose_micro_batch(adapted, Passes(sequences), replace(whole, micro_batch="auto"), 0)


def test_gradients_that_a_step_keeps_apart_take_their_room(adapted):
    sequences = eight_sequences()
    config = TrainConfig(batch_size=6, micro_batch="auto")
    memory = TrainingMemory(adapted, Shape.of(sequences), gradient_checkpointing=False)
    apart, free = Passes(sequences, kept_gradients=5), free_for(adapted, sequences, 4)
    assert choose_micro_batch(adapted, apart, config, free + 5 * memory.adapter_bytes) == 4
    assert choose_micro_batch(adapted, apart, config, free + 5 * memory.adapter_bytes - 1) == 3
    with pytest.raises(ValueError, match=r"of 6 x 15 tokens, and [\d.]+ MiB for the objectives' gradients; [\d.]+ MiB"):
        choose_micro_batch(adapted, apart, replace(config, micro_batch=6), free)


def test_each_of_several_processes_keeps_to_its_part_of_the_machine(monkeypatch):
    monkeypatch.setattr(client.memory, "_processes", 1)
    alone, machine = client.memory.free_bytes(CPU), psutil.virtual_memory().total
    client.memory.divide_among(1000)
    assert client.memory.free_bytes(CPU) == 0  # this process holds more than a thousandth of any machine
    client.memory.divide_among(2)
    assert client.memory.free_bytes(CPU) <= min(1.1 * alone, machine / 2)


def test_the_slow_count_of_memory_is_made_only_where_the_quick_one_does_not_find_enough(monkeypatch):
    counts = []
    slow = psutil.Process.memory_full_info
    monkeypatch.setattr(psutil.Process, "memory_full_info", lambda process: counts.append(process) or slow(process))
    monkeypatch.setattr(client.memory, "_processes", 2)
    assert client.memory.free_bytes(CPU, enough=1) > 0
    assert not counts
    assert client.memory.free_bytes(CPU, enough=psutil.virtual_memory().total) > 0
    assert counts


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory")
def test_what_was_freed_is_given_back_only_where_there_is_not_enough_without():
    blocks = [bytearray(1 << 16) for _ in range(2000)]
    del blocks[:-1]  # glibc gives back by itself what is free above all that is in use
    held = psutil.Process().memory_info().rss
    assert client.memory.free_bytes(CPU, enough=1) > 0
    assert psutil.Process().memory_info().rss > held - (1 << 20)
    client.memory.free_bytes(CPU)
    assert psutil.Process().memory_info().rss < held - (100 << 20)
    assert len(blocks) == 1


@pytest.mark.parametrize(("num_prompts", "per_prompt", "new_tokens"), [(1, 1, 8), (2, 3, 24), (3, 8, 40)])
def test_sampling_takes_no_more_than_is_counted_and_not_much_less(adapted, num_prompts, per_prompt, new_tokens):
    """Less the shorter the prompt is: what is counted reads all tokens at a time, in a model of only two layers."""
    shape = Shape(num_tokens=48, num_targets=new_tokens, packed=False)
    prompt = PromptSequence(**vars(shape.sequence()), prompt="", prompt_ids=[5] * (48 - new_tokens))
    torch.manual_seed(0)
    with LiveBytes([*adapted.model.parameters(), *adapted.model.buffers()]) as live:
        sample(adapted, [prompt] * num_prompts, per_prompt=per_prompt, max_new_tokens=new_tokens, temperature=1.0)
    sequences = [shape.sequence()] * (num_prompts * per_prompt)
    assert live.peak <= sampling_peak_bytes(adapted, sequences) <= 5 * live.peak
    memory = TrainingMemory(adapted, shape, gradient_checkpointing=False)
    assert memory.sampling_bytes(len(sequences)) >= sampling_peak_bytes(adapted, sequences)


def test_a_rollout_that_does_not_fit_is_refused_with_numbers_though_its_passes_would(adapted):
    """The passes go over one sequence at a time, the rollout is written at once."""
    sequences = eight_sequences()
    memory = TrainingMemory(adapted, Shape.of(sequences), gradient_checkpointing=False)
    needed = memory.optimizer_bytes + memory.sampling_bytes(8)
    config = TrainConfig(batch_size=4, micro_batch=1)
    passes = Passes(sequences, per_example=2, are_sampled=True)
    assert memory.fits(1, needed - 1)
    assert choose_micro_batch(adapted, passes, config, needed) == 1
    with pytest.raises(
        ValueError,
        match=r"sampling needs \d+\.\d MiB beside base model .* for 8 x 15 tokens at a time; [\d.]+ MiB are free on "
        r"cpu: set a smaller train\.batch_size, method\.group_size",
    ):
        choose_micro_batch(adapted, passes, config, needed - 1)


def test_training_has_enough_with_what_is_never_less_than_it_takes(adapted, monkeypatch):
    sequences, asked = eight_sequences(), []
    monkeypatch.setattr(client.memory, "free_bytes", lambda device, enough: asked.append(enough) or enough)
    assert choose_micro_batch(adapted, Passes(sequences, kept_gradients=5), TrainConfig(batch_size=4)) == 4
    memory = TrainingMemory(adapted, Shape.of(sequences), gradient_checkpointing=False)
    assert asked == [memory.at_most(4) + 5 * memory.adapter_bytes]
    assert memory.at_most(4) > free_for(adapted, sequences, 4)


@pytest.mark.parametrize("room", [1, 2])
def test_where_measuring_itself_finds_no_room_a_second_sequence_counts_as_much_as_the_first(adapted, monkeypatch, room):
    """What four need is less than four times what one does, but nothing is known of that without room for two."""
    sequences = eight_sequences()
    whole = TrainingMemory(adapted, Shape.of(sequences), gradient_checkpointing=False)
    free = whole.optimizer_bytes + whole.activation_bytes(4)
    assert whole.activation_bytes(4) < 4 * whole.activation_bytes(1)
    monkeypatch.setattr(client.memory, "step_peak_bytes", out_of_memory_above(room))
    monkeypatch.setattr(client.memory, "_measured", weakref.WeakKeyDictionary())
    config = TrainConfig(batch_size=4, micro_batch="auto")
    taken = choose_micro_batch(adapted, Passes(sequences), config, free)
    assert (taken == 4) == (room == 2)


def test_a_single_sequence_without_room_is_refused_with_numbers(adapted, monkeypatch):
    monkeypatch.setattr(client.memory, "step_peak_bytes", out_of_memory_above(0))
    monkeypatch.setattr(client.memory, "_measured", weakref.WeakKeyDictionary())
    with pytest.raises(
        ValueError,
        match=r"not even 1 x 15 tokens can be trained on beside base model \([\d.]+ MiB\) and adapter .* free on cpu: "
        r"set train\.gradient_checkpointing=true",
    ):
        choose_micro_batch(adapted, Passes(eight_sequences()), TrainConfig(batch_size=4), 1 << 40)


def out_of_memory_above(count):
    """``step_peak_bytes`` of a device with room for so many sequences."""

    def measured(adapted, sequences, **settings):
        if len(sequences) > count:
            raise torch.OutOfMemoryError
        return step_peak_bytes(adapted, sequences, **settings)

    return measured


MEASURED = """
import re, tempfile
from pathlib import Path

import torch

from client.memory import Passes, Shape, TrainingMemory, free_bytes
from client.base_model import load_base
from client.model import AdaptedModel
from conf.model import LoraConfig
from tests.client.local_training import run
from tests.client.tiny_models import save_tiny_base

count, length = 16, 192
width = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4}
config = save_tiny_base(Path(tempfile.mkdtemp()), "olmoe", num_key_value_heads=4, num_experts=8, **width)
adapted = AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig())
shape = Shape(length, length // 2, packed=False)
start = adapted.initial_adapter(0)

def resident(kind):
    return 1024 * int(re.search(rf"{kind}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

for checkpointing in (True, False):
    settings = {"max_steps": 1, "batch_size": count, "gradient_checkpointing": checkpointing}
    run(adapted, [Shape(8, 4, packed=False).sequence()], start, **settings)  # loads what torch loads at first use
    free_bytes(torch.device("cpu"))  # gives back what was freed
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = resident("VmRSS")
    run(adapted, [shape.sequence()] * count, start, **settings)
    memory = TrainingMemory(adapted, shape, gradient_checkpointing=checkpointing)
    print(memory.optimizer_bytes + memory.activation_bytes(count), resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_estimate_is_above_the_growth_of_the_process_and_at_most_twice_it():
    """The factors stated in ``client.memory``; 16 sequences of 192 tokens through an OLMoE of width 128."""
    finished = subprocess.run([sys.executable, "-c", MEASURED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for line in finished.stdout.splitlines():
        estimated, grown = map(int, line.split())
        assert grown <= estimated
        assert estimated <= 2 * grown
