"""Multiple choice: the option that the model finds likeliest is its answer."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from client.text import IGNORED_LABEL, Example, TokenSequence, encode_each
from conf.schema import DataConfig, Truncation

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Encoded:
    """A question whose options a model can tell apart."""

    options: Sequence[TokenSequence]
    answer: int


def encoded(
    name: str, questions: Sequence[Question], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[Encoded]:
    """The questions of the set ``name`` whose options are whole and differ; how many do not is logged.

    Two options that are the same tokens, such as words a small vocabulary lacks, cost a model the same whatever it
    knows, and of an option that ``data.max_length`` cuts it sees a part.
    """
    # Options must stay whole and apart.
    whole = replace(data, truncation=Truncation.prompt, packing=False)
    examples = [Example(asked.prompt, asked.context, option) for asked in questions for option in asked.options]
    sequences = iter(encode_each(examples, tokenizer, whole))
    found, faults = [], Counter[str]()
    for asked in questions:
        # What is cut has lost its end-of-sequence token.
        every = list(itertools.islice(sequences, len(asked.options)))
        options = [option for option in every if option is not None and option.labels[-1] == tokenizer.eos_token_id]
        tokens = {tuple(label for label in option.labels if label != IGNORED_LABEL) for option in options}
        if len(options) < len(every):
            faults[f"an option without tokens or cut by data.max_length={data.max_length}"] += 1
        elif len(tokens) < len(every):
            faults["two options of the same tokens"] += 1
        else:
            found.append(Encoded(options, asked.answer))
    if faults:
        why = ", ".join(f"{count} with {fault}" for fault, count in sorted(faults.items()))
        logger.warning("%s: %d of %d questions left out: %s", name, faults.total(), len(questions), why)
    return found


def accuracy(losses: Callable[[Sequence[TokenSequence]], Sequence[float]], questions: Sequence[Encoded]) -> float:
    """Share of the questions whose right option has the least loss, of several the first.

    An option's loss is that of a response: nats per token, its end-of-sequence token included, so long options are
    not at a disadvantage.

    Args:
        losses: Gives the loss of each of the sequences it is given.
        questions: What is asked.

    Raises:
        ValueError: If there is no question.
    """
    if not questions:
        raise ValueError("no questions to answer")
    found = iter(losses([option for question in questions for option in question.options]))
    right = 0
    for question in questions:
        of_options = list(itertools.islice(found, len(question.options)))
        right += of_options.index(min(of_options)) == question.answer
    return right / len(questions)


def questions_of(examples: Sequence[Example], options: Sequence[str]) -> list[Question]:
    """Examples as questions between the same options; those whose response is none of them are left out."""
    return [
        Question(example.prompt, example.context, tuple(options), list(options).index(example.response))
        for example in examples
        if example.response in options
    ]
