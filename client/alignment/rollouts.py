"""Completions sampled from the current policy, and what a model says to their tokens.

The policy is the model with its adapter at a sampling temperature; the reference is the same model without it.
Shape suffixes: B sequences, T tokens (of several completions, or of the longest sequence), V vocabulary, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig

from client.evaluation.generation import generated, left_padded
from client.evaluation.held_out import reading_hidden_states, response_logits
from client.model import AdaptedModel
from client.prompts import PromptSequence
from client.text import IGNORED_LABEL, TokenSequence, response_sequence


@dataclass(frozen=True)
class Rollout:
    """Completions of some prompts, each prompt's one after the other."""

    sequences: list[TokenSequence]
    """Prompt and completion; the completion's tokens carry labels, its end-of-sequence token included if it came."""
    prompts: list[str]
    completions: list[str]


def sample(
    adapted: AdaptedModel,
    prompts: Sequence[PromptSequence],
    *,
    per_prompt: int,
    max_new_tokens: int,
    temperature: float,
) -> Rollout:
    """``per_prompt`` completions of each prompt, drawn token by token with torch's generator and a KV cache.

    Args:
        adapted: The model, with an adapter loaded; its mode is left as it was.
        prompts: At least one.
        per_prompt: Completions of each.
        max_new_tokens: A completion ends there, or with the tokenizer's end-of-sequence token.
        temperature: > 0; logits are divided by it.
    """
    repeated = [prompt for prompt in prompts for _ in range(per_prompt)]
    # All at a time, so that the draws do not depend on train.micro_batch.
    with adapted.evaluating():
        sequences = _sampled(adapted, repeated, max_new_tokens, temperature)
    texts = [_completion_text(adapted, sequence) for sequence in sequences]
    return Rollout(sequences, [prompt.prompt for prompt in repeated], texts)


def token_log_probabilities(adapted: AdaptedModel, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """(T,) log-probability of each response token of one pass, nats, float32, sequence after sequence.

    Args:
        adapted: The model; with its adapter or, inside ``adapted.without_adapter()``, without.
        batch: What ``collate`` returned for unpacked sequences.
        temperature: Logits are divided by it.
    """
    logits_TV, targets_T, _ = response_logits(adapted, batch)
    return -functional.cross_entropy(logits_TV.float() / temperature, targets_T, reduction="none")


def reference_log_probabilities(adapted: AdaptedModel, batch: Mapping[str, Tensor], temperature: float = 1.0) -> Tensor:
    """``token_log_probabilities`` under the base model, without gradients."""
    with adapted.without_adapter(), adapted.evaluating(), torch.no_grad():
        return token_log_probabilities(adapted, batch, temperature)


def sampled_log_probabilities(
    adapted: AdaptedModel, batch: Mapping[str, Tensor], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``token_log_probabilities`` without gradients, and (T, D) the hidden states they were read from, float32."""
    with adapted.evaluating(), torch.no_grad(), reading_hidden_states(adapted) as read:
        log_p_T = token_log_probabilities(adapted, batch, temperature)
        predicting = (batch["labels"][:, 1:] != IGNORED_LABEL).to(adapted.device)
        return log_p_T, read.pop()[:, :-1][predicting].float()


def _sampled(
    adapted: AdaptedModel, prompts: Sequence[PromptSequence], max_new_tokens: int, temperature: float
) -> list[TokenSequence]:
    padding, end = adapted.tokenizer.pad_token_id, adapted.tokenizer.eos_token_id
    batch = left_padded([prompt.prompt_ids for prompt in prompts], padding, adapted.device)
    config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=temperature,
        top_k=0,  # all: transformers' own is 50
        max_new_tokens=max_new_tokens,
        eos_token_id=end,
        pad_token_id=padding,
    )
    output_BT = generated(adapted, batch, config)
    completions = output_BT[:, batch["input_ids"].shape[1] :].tolist()
    return [
        response_sequence(prompt.prompt_ids, _until(completion, end))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _until(tokens: list[int], end: int) -> list[int]:
    """The tokens up to the first ``end``, and that one; what follows is padding."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _completion_text(adapted: AdaptedModel, sequence: TokenSequence) -> str:
    response = sequence.input_ids[len(sequence.input_ids) - sequence.num_targets :]
    return str(adapted.tokenizer.decode(response, skip_special_tokens=True))
