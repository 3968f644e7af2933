"""Examples whose responses the model is to write itself, or of which two responses are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from client.templates import chat_message
from client.text import Example, TokenSequence, encode_each, encode_prompts, report_dropped
from conf.schema import DataConfig


@dataclass(frozen=True)
class PromptSequence(TokenSequence):
    """A prompt with the response of the data, which is there for the held-out loss alone."""

    prompt: str
    """What the user wrote, context included, without the template's wording: what rewards are given."""
    prompt_ids: list[int]
    """Its tokens with the template, cut so that ``max_new_tokens`` fit behind it."""


@dataclass(frozen=True)
class PreferencePair(TokenSequence):
    """A prompt with the response that was preferred, and the same prompt with the one that was not."""

    rejected: TokenSequence
    objective: str
    """What they were judged by; empty: not said."""
    weight: float = 1.0
    """Of its loss in a mean over pairs."""


def prompt_sequences(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig, max_new_tokens: int
) -> list[PromptSequence]:
    """The examples as prompts, in their order, without those of whose response nothing is left.

    Raises:
        ValueError: As ``client.text.encode``.
    """
    encoded = encode_each(examples, tokenizer, data)
    ids = encode_prompts(examples, tokenizer, replace(data, max_length=data.max_length - max_new_tokens))
    prompts = [
        PromptSequence(
            sequence.input_ids,
            sequence.labels,
            sequence.lengths,
            prompt=chat_message(example),
            prompt_ids=prompt_ids,
        )
        for example, prompt_ids, sequence in zip(examples, ids, encoded, strict=True)
        if sequence is not None
    ]
    report_dropped(len(examples) - len(prompts), len(examples), data)
    return prompts


def encode_pairs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[PreferencePair]:
    """The examples as pairs, in their order, without those of whose responses nothing is left.

    Raises:
        ValueError: As ``client.text.encode``, or if an example has no rejected response.
    """
    lacking = sum(not example.rejected.strip() for example in examples)
    if lacking:
        raise ValueError(
            f"data.rejected_column={data.rejected_column!r} is empty in {lacking} of {len(examples)} examples"
        )
    worse = [replace(example, response=example.rejected) for example in examples]
    both = zip(encode_each(examples, tokenizer, data), encode_each(worse, tokenizer, data), strict=True)
    pairs = [
        PreferencePair(chosen.input_ids, chosen.labels, chosen.lengths, rejected=rejected, objective=example.objective)
        for example, (chosen, rejected) in zip(examples, both, strict=True)
        if chosen is not None and rejected is not None
    ]
    report_dropped(len(examples) - len(pairs), len(examples), data)
    return pairs
