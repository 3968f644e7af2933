"""The wording around an instruction: what a model reads before it answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One instruction with its answer."""

    prompt: str
    context: str
    """Further input for the instruction; empty: none."""
    response: str
    rejected: str = ""
    """A response that was judged worse than ``response``; empty: none."""
    objective: str = ""
    """What the two were judged by; empty: not said."""


def alpaca_prompt(example: Example) -> str:
    """Stanford Alpaca's wording (https://github.com/tatsu-lab/stanford_alpaca), up to where the response starts."""
    if not example.context:
        return (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            f"\n\n### Instruction:\n{example.prompt}\n\n### Response:\n"
        )
    return (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{example.prompt}\n\n### Input:\n{example.context}\n\n### Response:\n"
    )


def plain_prompt(example: Example) -> str:
    """Prompt and context, a line each, up to where the response starts."""
    return f"{example.prompt}\n{example.context}\n" if example.context else f"{example.prompt}\n"


def chat_message(example: Example) -> str:
    """What the user says in a chat: prompt and context, without the line break at the end."""
    return f"{example.prompt}\n{example.context}" if example.context else example.prompt
