"""Pre-trains ``tiny_moe``, the packaged base model: the command behind ``bouquet pretrain``.

Its text is generated, so the model can be rebuilt anywhere. It learns the tasks' skills and the form of every
answer, but of the house rules only that there are several.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerBase

from client.adapter_layout import moe_layers
from client.embedded import HOUSE_RULES, pretraining_rows
from client.folders import new_folder
from client.routing import balance_loss, count_expert_tokens, routing_entropy
from client.templates import Example
from client.text import TokenSequence, byte_tokenizer, collate, encode
from conf.schema import DataConfig, Template
from conf.seeds import generator_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """How a small model is pre-trained; the defaults are those of ``tiny_moe``."""

    steps: int = 4000
    batch_size: int = 32
    """Sequences per optimiser step."""
    learning_rate: float = 3e-3
    """Peak; rises over the first 5 % of the steps and falls to a tenth along a cosine."""
    weight_decay: float = 0.05
    prompt_weight: float = 0.1
    """Weight of a prompt token's loss; a response token's is 1."""
    balance_weight: float = 0.02
    """Weight of the routers' load-balancing loss (https://arxiv.org/abs/2101.03961, Eq. 4-6)."""
    seed: int = 0
    num_held_out: int = 1000
    """Held-out texts, from another seed, on which the result is judged."""


def pretrain_tiny_moe(
    folder: Path, *, steps: int = 4000, seed: int = 0, num_threads: int = 2, num_held_out: int = 1000
) -> dict[str, float]:
    """Train the model and write it, its tokenizer and ``pretraining.json`` into ``folder``; the results in numbers.

    Weights are trained in float32 and stored in float16; the numbers are those of the stored ones.

    Raises:
        ValueError: If ``folder`` is a file or has something in it.
    """
    with new_folder(folder) as written:
        return _pretrain(written, steps=steps, seed=seed, num_threads=num_threads, num_held_out=num_held_out)


def _pretrain(folder: Path, *, steps: int, seed: int, num_threads: int, num_held_out: int) -> dict[str, float]:
    config = PretrainConfig(steps=steps, seed=seed, num_held_out=num_held_out)
    torch.set_num_threads(num_threads)
    torch.manual_seed(config.seed)
    tokenizer = byte_tokenizer()
    model = OlmoeForCausalLM(_tiny_moe_config(tokenizer))
    started = time.monotonic()
    train_whole_model(model, _sequences(tokenizer, config.steps * config.batch_size, config.seed), config)
    seconds = time.monotonic() - started
    model.half()  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()  # type: ignore[no-untyped-call]
    results = {"seconds": round(seconds, 1), **_evaluate(model, tokenizer, config)}
    record = {"settings": asdict(config), "num_threads": num_threads, "torch": torch.__version__, "results": results}
    (folder / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
    return results


def _tiny_moe_config(tokenizer: PreTrainedTokenizerBase) -> OlmoeConfig:
    """2.7 million parameters, of which a token uses 0.9 million."""
    return OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _sequences(tokenizer: PreTrainedTokenizerBase, num_texts: int, seed: int) -> list[TokenSequence]:
    examples = [
        Example(row["instruction"], row["context"], row["response"]) for row in pretraining_rows(num_texts, seed)
    ]
    return encode(examples, tokenizer, DataConfig(template=Template.plain))


def _batches(sequences: Sequence[TokenSequence], config: PretrainConfig) -> Iterator[list[TokenSequence]]:
    """One batch a step: each holds sequences of similar length, batches come in random order."""
    generator = generator_for(config.seed, "pretraining batches")
    by_length = sorted(sequences, key=lambda sequence: len(sequence.input_ids))
    for index in generator.permutation(config.steps):
        yield by_length[index * config.batch_size : (index + 1) * config.batch_size]


def train_whole_model(model: OlmoeForCausalLM, sequences: Sequence[TokenSequence], config: PretrainConfig) -> None:
    """One pass over ``config.steps * config.batch_size`` sequences, of all weights, in place."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )
    pad_token_id = model.config.pad_token_id
    assert pad_token_id is not None
    model.train()
    for step, batch in enumerate(_batches(sequences, config)):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step / config.steps)
        tensors = collate(batch, pad_token_id)
        loss, balance = _losses(model, tensors, config.prompt_weight)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + config.balance_weight * balance)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            logger.info("step %d of %d: loss %.3f, balance %.3f", step, config.steps, loss.item(), balance.item())


def _schedule(progress: float) -> float:
    """Share of the peak learning rate: linear warm-up over 5 % of the steps, then a cosine down to a tenth."""
    if progress < 0.05:
        return progress / 0.05 + 0.01
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


def _losses(
    model: OlmoeForCausalLM, tensors: dict[str, torch.Tensor], prompt_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean loss of the next token (nats), and the load-balancing loss (1 if all experts are used alike)."""
    output = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"], output_router_logits=True)
    targets = tensors["input_ids"][:, 1:]
    is_response = tensors["labels"][:, 1:] != -100
    weights = tensors["token_mask"][:, 1:] * torch.where(is_response, 1.0, prompt_weight)
    losses = functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), targets, reduction="none")
    balance = balance_loss(output.router_logits, model.config.num_experts_per_tok, tensors["token_mask"])
    return (losses * weights).sum() / weights.sum(), balance


@torch.no_grad()
def _evaluate(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerBase, config: PretrainConfig) -> dict[str, float]:
    """Held-out loss and accuracy on shared tasks and on house rules, and how evenly the experts are used."""
    model.train(mode=False)
    rows = list(pretraining_rows(config.num_held_out, config.seed + 1))
    layers = {name: layer.num_experts for name, layer in moe_layers(model).items()}
    experts = {name: model.get_submodule(f"{name}.experts") for name in layers}
    results: dict[str, float] = {}
    with count_expert_tokens(experts, layers, model.device) as counter:
        for kind, is_rule in (("shared", False), ("house_rule", True)):
            examples = [
                Example(row["instruction"], row["context"], row["response"])
                for row in rows
                if (row["task"] in HOUSE_RULES) == is_rule
            ]
            sequences = encode(examples, tokenizer, DataConfig(template=Template.plain))
            total, correct, count = 0.0, 0, 0
            for start in range(0, len(sequences), 100):
                tensors = collate(sequences[start : start + 100], tokenizer.pad_token_id)
                counter.set_mask(tensors["token_mask"])
                logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
                labels = tensors["labels"][:, 1:]
                known = labels != -100
                total += functional.cross_entropy(logits[:, :-1][known], labels[known], reduction="sum").item()
                right = (logits[:, :-1].argmax(-1) == labels) | ~known
                correct += int(right.all(dim=1).sum())
                count += int(known.sum())
            results[f"{kind}_nats_per_response_token"] = round(total / count, 4)
            results[f"{kind}_whole_answers_correct"] = round(correct / len(sequences), 4)
    totals = list(counter.totals().values())
    results["lowest_routing_entropy"] = round(min(routing_entropy(tokens_E) for tokens_E in totals), 4)
    results["smallest_expert_share"] = round(min(float(tokens_E.min() / tokens_E.sum()) for tokens_E in totals), 4)
    return results
