"""What training LoRA experts costs: PEFT's way, ours, and the floor of no expert LoRA at all, side by side.

    python benchmarks/expert_lora.py --device cpu --json benchmarks/results/expert_lora_cpu.json
    python benchmarks/expert_lora.py --device cuda --size olmoe --json benchmarks/results/expert_lora_cuda.json

The three share one frozen base in one process and take turns step by step. Needs torch, transformers, peft,
numpy, safetensors and tokenizers; no Flower. On the CPU peak memory is that of a process of its own per variant.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import peft
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

from client.adapter_layout import adapter_slots, peft_config
from client.base_model import BaseModel, share_weights
from client.bases import BaseIdentity
from client.model import AdaptedModel
from client.text import byte_tokenizer
from conf.model import ExpertTraining, LoraConfig, ModelConfig

VARIANTS = ("peft", "ours", "floor")
MIN_STEPS = 5


@dataclass(frozen=True)
class Size:
    """Shape of the model and of a step."""

    layers: int
    hidden: int
    width: int
    """Inner width of an expert."""
    experts: int
    top_k: int
    batch: int
    length: int
    rank: int
    vocabulary: int
    dtype: str

    def model(self, device: str) -> PreTrainedModel:
        """An OLMoE of this shape with random weights, made on the device itself."""
        config = OlmoeConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            num_attention_heads=max(1, self.hidden // 128),
            num_key_value_heads=max(1, self.hidden // 128),
            vocab_size=self.vocabulary,
            max_position_embeddings=self.length,
        )
        torch.manual_seed(0)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=getattr(torch, self.dtype)
            )
        model.config._experts_implementation = "grouped_mm"
        frozen: PreTrainedModel = model.eval().requires_grad_(requires_grad=False)
        return frozen

    def tokens(self, device: str) -> Tensor:
        """One batch of random tokens, the same every time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, self.vocabulary, (self.batch, self.length), generator=generator).to(device)


SIZES = {
    "small": Size(4, 512, 512, 64, 8, 4, 128, 8, 1000, "float32"),
    "olmoe": Size(16, 2048, 1024, 64, 8, 8, 1024, 16, 50304, "bfloat16"),
}


class Variant:
    """A model that can be trained a step, and how much memory and time that took."""

    def __init__(self, name: str, base: PreTrainedModel, size: Size) -> None:
        lora = LoraConfig(rank=size.rank, alpha=2.0 * size.rank)
        self.name = name
        self.samples: list[float] = []
        self.peak_bytes = 0
        self.model, self.parameters = _adapted(name, base, lora)
        trained = list(self.parameters.values())
        self.adamw = torch.optim.AdamW(trained, lr=1e-4, fused=base.device.type == "cuda")

    def loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of a pass, and the logits."""
        logits = self.model(input_ids=tokens, use_cache=False).logits
        flat = logits[:, :-1].flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(flat, tokens[:, 1:].flatten()), logits

    def step(self, tokens: Tensor) -> float:
        """One optimiser step; its seconds."""
        _wait(tokens.device)
        began = time.perf_counter()
        self.adamw.zero_grad()
        torch.autograd.backward(self.loss(tokens)[0])
        self.adamw.step()
        _wait(tokens.device)
        return time.perf_counter() - began

    def measured_step(self, tokens: Tensor, base_bytes: int) -> None:
        """A step whose time is kept, and on CUDA its peak memory as if this variant were alone with the base."""
        if tokens.device.type != "cuda":
            self.samples.append(self.step(tokens))
            return
        self.adamw.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.samples.append(self.step(tokens))
        own = sum(3 * parameter.nbytes for parameter in self.parameters.values())  # itself and two moments
        self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated() - before + own + base_bytes)
        self.adamw.zero_grad()


def _adapted(name: str, base: PreTrainedModel, lora: LoraConfig) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    settings = ModelConfig(experts=ExpertTraining.frozen if name == "floor" else ExpertTraining.lora)
    if name == "ours":
        identity = BaseIdentity(name="random", path="random", sha256="0" * 64, folder=Path())
        adapted = AdaptedModel(BaseModel(base, byte_tokenizer(), identity), settings, lora)
        return adapted.model, dict(adapted.parameters_by_name())
    model = peft.get_peft_model(share_weights(base), peft_config(base, settings, lora))
    return model, {key: slot.parameter for key, slot in adapter_slots(model).items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def same_adapter(variants: list[Variant]) -> None:
    """Give every variant the same random factors, none of them zero."""
    generator = np.random.default_rng(2)
    values: dict[str, Tensor] = {}
    for variant in variants:
        for name, parameter in variant.parameters.items():
            if name not in values:
                values[name] = torch.from_numpy(0.02 * generator.standard_normal(tuple(parameter.shape), np.float32))
            with torch.no_grad():
                parameter.copy_(values[name])


def differences(ours: Variant, theirs: Variant, tokens: Tensor) -> dict[str, float]:
    """Largest relative difference (of norms, over arrays) of logits and of the adapter's gradients."""
    found = []
    for variant in (ours, theirs):
        loss, logits = variant.loss(tokens)
        gradients = torch.autograd.grad(loss, list(variant.parameters.values()))
        found.append((logits.detach().float(), dict(zip(variant.parameters, gradients, strict=True))))
    (our_logits, our_gradients), (logits, their_gradients) = found
    return {
        "outputs": _relative(our_logits, logits),
        "gradients": max(_relative(our_gradients[name], their_gradients[name]) for name in their_gradients),
    }


def _relative(left: Tensor, right: Tensor) -> float:
    return float((left.float() - right.float()).norm() / right.float().norm())


def measure(size: Size, device: str, num_steps: int) -> dict[str, Any]:
    """All three variants, interleaved; their order turns by one each time."""
    base, tokens = size.model(device), size.tokens(device)
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    variants = [Variant(name, base, size) for name in VARIANTS]
    same_adapter(variants)
    difference = differences(variants[1], variants[0], tokens)
    for variant in variants:
        variant.step(tokens)
    for turn in range(num_steps):
        for place in range(len(variants)):
            variants[(turn + place) % len(variants)].measured_step(tokens, base_bytes)
    memory = {variant.name: variant.peak_bytes for variant in variants}
    if device == "cpu":
        memory = {name: _peak_of_a_process(name, size) for name in VARIANTS}
    num_tokens = size.batch * size.length
    rows = {variant.name: _row(variant.samples, memory[variant.name], num_tokens) for variant in variants}
    return {"difference_from_peft": difference, "variants": rows, **_ratios(rows)}


def _row(samples: list[float], peak_bytes: int, num_tokens: int) -> dict[str, Any]:
    median = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4)
    return {
        "seconds_a_step": median,
        "quartiles": [quartiles[0], quartiles[2]],
        "tokens_per_second": num_tokens / median,
        "peak_memory_bytes": peak_bytes,
        "samples": samples,
    }


def _ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours to the others. Times are compared turn by turn, since machines are shared."""

    def turns(numerator: str, denominator: str) -> float:
        pairs = zip(rows[numerator]["samples"], rows[denominator]["samples"], strict=True)
        return float(statistics.median(left / right for left, right in pairs))

    return {
        "ratio_step_vs_peft": turns("peft", "ours"),
        "ratio_step_vs_floor": turns("ours", "floor"),
        "ratio_memory_vs_peft": rows["ours"]["peak_memory_bytes"] / rows["peft"]["peak_memory_bytes"],
        "ratio_memory_vs_floor": rows["ours"]["peak_memory_bytes"] / rows["floor"]["peak_memory_bytes"],
    }


def _peak_of_a_process(name: str, size: Size) -> int:
    """Peak resident memory of a fresh process that trains two steps, less that of one that has only imported."""
    words = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--peak-of"]
    peaks = [
        int(subprocess.run([*words, json.dumps([what, asdict(size)])], capture_output=True, check=True).stdout)  # noqa: S603
        for what in (name, "nothing")
    ]
    return peaks[0] - peaks[1]


def _print_peak(name: str, size: Size) -> None:
    if name != "nothing":
        variant, tokens = Variant(name, size.model("cpu"), size), size.tokens("cpu")
        for _ in range(2):
            variant.step(tokens)
    # Not ru_maxrss: a child begins with its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))


def machine(device: str) -> dict[str, Any]:
    """Where and with what it was measured."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    packages = {package: version(package) for package in ("torch", "transformers", "peft")}
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": packages}


def rows(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = ["| | s a step | quartiles | tokens/s | peak memory, MiB |", "|---|---|---|---|---|"]
    labels = {"peft": "PEFT `target_parameters`", "ours": "Bouquet", "floor": "no expert LoRA"}
    for name, label in labels.items():
        row = results["variants"][name]
        low, high = row["quartiles"]
        lines.append(
            f"| {label} | {row['seconds_a_step']:.3f} | {low:.3f} to {high:.3f} | {row['tokens_per_second']:.0f} "
            f"| {row['peak_memory_bytes'] / 2**20:.0f} |"
        )
    difference = results["difference_from_peft"]
    lines += [
        "",
        f"{results['ratio_step_vs_peft']:.2f} times as fast as PEFT, {results['ratio_step_vs_floor']:.2f} times the "
        f"floor's step, {results['ratio_memory_vs_peft']:.2f} of PEFT's memory; relative difference from PEFT: outputs "
        f"{difference['outputs']:.1e}, gradients {difference['gradients']:.1e}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    for field, kind in Size.__annotations__.items():
        parser.add_argument(f"--{field}", type=str if kind == "str" else int, help="default: that of --size")
    parser.add_argument("--steps", type=int, default=9, help=f"measured steps of each, at least {MIN_STEPS}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    words = parser.parse_args()
    torch.set_num_threads(words.threads)
    if words.peak_of is not None:
        name, fields = json.loads(words.peak_of)
        _print_peak(name, Size(**fields))
        return
    if words.steps < MIN_STEPS:
        parser.error(f"--steps={words.steps}: a median needs at least {MIN_STEPS}")
    chosen = {field: getattr(words, field) for field in Size.__annotations__ if getattr(words, field) is not None}
    size = Size(**{**asdict(SIZES[words.size]), **chosen})
    results = {
        "command": " ".join(["python -m benchmarks.expert_lora", *sys.argv[1:]]),
        "size": asdict(size),
        "machine": machine(words.device),
        **measure(size, words.device, words.steps),
    }
    print(rows(results))
    if words.json is not None:
        words.json.parent.mkdir(parents=True, exist_ok=True)
        words.json.write_text(json.dumps(results | {"markdown": rows(results)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
