"""What a model answers in words: greedy decoding, and how close the words are to the right ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from client.model import AdaptedModel
from strategies.adapters import Arrays

Generator = Callable[[Sequence[Sequence[int]], int], list[list[int]]]
"""Tokens of prompts and the most new tokens of an answer -> tokens of the answers, without end-of-sequence."""


def greedy(
    adapted: AdaptedModel,
    adapter: Arrays,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    batch_size: int,
    processor: LogitsProcessor | None = None,
) -> list[list[int]]:
    """The likeliest next token again and again, up to the end-of-sequence token or ``max_new_tokens``.

    ``adapter`` stays loaded. Whatever the model's own generation settings say, nothing is sampled or penalised.

    Args:
        adapted: The model.
        adapter: What to compute with.
        prompts: Tokens of each prompt, at least one.
        max_new_tokens: Of an answer, at most.
        batch_size: Prompts that are answered together; up to rounding it does not matter.
        processor: What changes the next token's log-probabilities before the choice; None: nothing.
    """
    adapted.load_adapter(adapter)
    adapted.model.eval()
    tokenizer = adapted.tokenizer
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    processors = LogitsProcessorList([] if processor is None else [processor])
    answers: list[list[int]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(by_length), batch_size):
        chosen = by_length[first : first + batch_size]
        batch = left_padded([prompts[index] for index in chosen], tokenizer.pad_token_id, adapted.device)
        new_BT = generated(adapted, batch, config, processors)[:, batch["input_ids"].shape[1] :].tolist()
        for index, new in zip(chosen, new_BT, strict=True):
            answers[index] = new[: new.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in new else new
    return answers


def generated(
    adapted: AdaptedModel,
    batch: Mapping[str, torch.Tensor],
    config: GenerationConfig,
    processors: LogitsProcessorList | None = None,
) -> torch.Tensor:
    """(B, T) tokens of prompts and of what the loaded adapter makes of them, with a KV cache.

    Whatever ``config`` leaves open is as transformers has it for every model: the base's own generation settings, which
    would shape what is written, do not count.
    """
    network: Any = adapted.model
    base, dtype = network.get_base_model(), adapted.base.model.dtype
    config.use_cache = True
    own, base.generation_config = base.generation_config, GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), torch.autocast(adapted.device.type, dtype=dtype, enabled=dtype != torch.float32):
            tokens_BT: torch.Tensor = network.generate(**batch, generation_config=config, logits_processor=processors)
    finally:
        base.generation_config = own
    return tokens_BT


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, int64 (batch, longest prompt): answers begin where all prompts end."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device),
    }


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure (Lin 2004, https://aclanthology.org/W04-1013), by Google's ``rouge-score``, unstemmed.

    Its words are runs of ``[a-z0-9]`` after lower-casing: texts in other scripts score 0.

    Raises:
        ValueError: If there is nothing to compare.
    """
    if not references:
        raise ValueError("no answers to compare")
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - training does without

    scorer = RougeScorer(["rougeL"])
    found = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return float(sum(found) / len(found))
