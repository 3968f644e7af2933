"""Multiple choice: the option that the model finds likeliest is its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from client.evaluation.held_out import HeldOutLoss
from client.text import Example, TokenSequence, encode
from conf.schema import DataConfig, Truncation


@dataclass(frozen=True)
class Question:
    """One question with its options."""

    prompt: str
    context: str
    """Further input; empty: none."""
    options: tuple[str, ...]
    """At least two, none of them empty."""
    answer: int
    """Place of the right one, from 0."""


def accuracy(
    loss: Callable[[Sequence[TokenSequence]], HeldOutLoss],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
) -> float:
    """Share of the questions whose right option has the least loss, of several the first.

    An option's loss is that of a response: nats per token, its end-of-sequence token included, so long options are
    not at a disadvantage. One option is scored at a time, since a method's own ``loss`` tells the mean of what it gets.

    Raises:
        ValueError: If there is no question.
    """
    if not questions:
        raise ValueError("no questions to answer")
    # Options must stay whole and apart.
    whole = replace(data, truncation=Truncation.prompt, packing=False)
    right = 0
    for question in questions:
        examples = [Example(question.prompt, question.context, option) for option in question.options]
        losses = [loss([sequence]).loss for sequence in encode(examples, tokenizer, whole)]
        assert len(losses) == len(question.options)
        right += losses.index(min(losses)) == question.answer
    return right / len(questions)


def questions_of(examples: Sequence[Example], options: Sequence[str]) -> list[Question]:
    """Examples as questions between the same options; those whose response is none of them are left out."""
    return [
        Question(example.prompt, example.context, tuple(options), list(options).index(example.response))
        for example in examples
        if example.response in options
    ]
