"""The embedded default data: four sites that share some tasks and answer others by their own house rules.

Every row is drawn from a seed; nothing is downloaded. A *shared* task has the same answer at every site. Some
are plain skills; others are conventions (how a time is written) that all sites keep alike but a base model cannot
know. A *house rule* gives the same prompt another answer at another site, so no single model satisfies
all of them. Arguments are drawn at random: a held-out prompt is a new instance of a rule that can be learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from client.templates import Example, plain_prompt
from conf.seeds import generator_for


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WORDS: Mapping[str, tuple[str, ...]] = {
    "bank": _words("loan rate cash bond fund card debt share trust coin vault fee yield lease bill audit"),
    "clinic": _words("pulse nurse ward dose blood fever lung bone scan cough pill vein heart diet rash bed"),
    "court": _words("judge jury law plea bail case oath writ trial motion clerk docket claim appeal robe brief"),
    "workshop": _words("lathe drill bolt weld gear saw clamp gauge screw steel torch valve plane vise spring nut"),
}
"""Domain -> the words its texts are made of."""

DOMAINS: tuple[str, ...] = tuple(WORDS)

CUED_FRACTION = 0.25
"""Share of house-rule rows whose context opens with a word of the domain, so that a router can tell the sites apart."""

_MONTHS = _words("January February March April May June July August September October November December")
_FIRST_NAMES = _words("Ann Ben Cleo Dan Eve Finn Gus Hana Ian June Kai Lena")
_LAST_NAMES = _words("Abel Brook Cole Dorn Ellis Frost Grant Hale Irwin Jones Kerr Lane")
_PRIORITIES = {
    "urgent": ("P1", "A", "red", "I"),
    "normal": ("P2", "B", "amber", "II"),
    "later": ("P3", "C", "green", "III"),
}
_ABBREVIATIONS = {
    "AC": ("account", "acute care", "appeal court", "air cooling"),
    "CT": ("cash transfer", "chest test", "county tribunal", "cutting tool"),
    "DP": ("deposit", "deep pain", "due process", "drill press"),
    "MS": ("money supply", "mild shock", "main suit", "mild steel"),
    "PO": ("payment order", "per os", "public office", "parts order"),
    "RT": ("rate table", "rest time", "right to trial", "rotary tool"),
}


@dataclass(frozen=True)
class Question:
    """One instance of a task, with the answer under each of its rules."""

    instruction: str
    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A kind of question, and which of its answers each domain gives."""

    draw: Callable[[np.random.Generator, tuple[str, ...]], Question]
    """Draws an instance from a generator and the words of a domain."""
    rules: Mapping[str, int] = field(default_factory=dict)
    """Domain -> index of its answer; a domain that is not listed gives the first. Empty: a shared task."""


def _one(generator: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[generator.integers(len(choices))]


def _several(generator: np.random.Generator, choices: tuple[str, ...], count: int) -> list[str]:
    return [choices[index] for index in generator.permutation(len(choices))[:count]]


def _pick(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    fields = _several(generator, words, 3)
    values = generator.integers(10, 100, size=3)
    asked = generator.integers(3)
    context = ", ".join(f"{name} {value}" for name, value in zip(fields, values, strict=True))
    return Question(f"What is the {fields[asked]}?", context, (str(values[asked]),))


def _last(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    items = _several(generator, words, int(generator.integers(2, 5)))
    return Question("Give the last word.", " ".join(items), (items[-1],))


def _capitals(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    text = " ".join(_several(generator, words, 2))
    return Question("Write in capitals.", text, (text.upper(),))


def _count(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    items = _several(generator, words, int(generator.integers(1, 6)))
    return Question("How many words?", " ".join(items), (str(len(items)),))


def _next(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    word, number = _one(generator, words), int(generator.integers(10, 99))
    return Question("Give the next one.", f"{word} {number}", (f"{word} {number + 1}",))


def _reverse(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    code = "".join(_one(generator, tuple("abcdefghkmnprstuvwxyz")) for _ in range(3))
    return Question("Spell the code backwards.", f"{_one(generator, words)} {code}", (code[::-1],))


def _time(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    hour, minute = int(generator.integers(1, 12)), int(generator.integers(10, 60))
    return Question(
        "Write the time.",
        f"{_one(generator, words)} at {minute} past {hour} pm",
        (f"{hour + 12}:{minute}", f"{hour}.{minute} pm", f"{hour + 12}h{minute}"),
    )


def _join(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    first, second = _several(generator, words, 2)
    return Question(
        "Join the words.", f"{first} {second}", (f"{first}-{second}", f"{first}_{second}", f"{first}/{second}")
    )


def _even(generator: np.random.Generator, words: tuple[str, ...]) -> Question:
    number = int(generator.integers(10, 100))
    answers = ("even", "yes", "2n") if number % 2 == 0 else ("odd", "no", "2n+1")
    return Question("Is the number even?", f"{_one(generator, words)} {number}", answers)


def _date(generator: np.random.Generator, _words: tuple[str, ...]) -> Question:
    day, month = int(generator.integers(1, 29)), int(generator.integers(12))
    return Question(
        "Write the date in numbers.", f"{day} {_MONTHS[month]}", (f"{day}/{month + 1}", f"{month + 1}/{day}")
    )


def _sort(generator: np.random.Generator, _words: tuple[str, ...]) -> Question:
    digits = _several(generator, tuple("123456789"), 3)
    return Question(
        "Sort the numbers.", " ".join(digits), (" ".join(sorted(digits)), " ".join(sorted(digits, reverse=True)))
    )


def _decimal(generator: np.random.Generator, _words: tuple[str, ...]) -> Question:
    whole, tenths = generator.integers(10, 100), generator.integers(1, 10)
    return Question("Write the number.", f"{whole} and {tenths} tenths", (f"{whole}.{tenths}", f"{whole},{tenths}"))


def _name(generator: np.random.Generator, _words: tuple[str, ...]) -> Question:
    first, last = _one(generator, _FIRST_NAMES), _one(generator, _LAST_NAMES)
    return Question("Write the full name.", f"first {first}, last {last}", (f"{first} {last}", f"{last}, {first}"))


def _priority(generator: np.random.Generator, _words: tuple[str, ...]) -> Question:
    level = _one(generator, tuple(_PRIORITIES))
    return Question("Give the priority code.", f"{level}, ticket {generator.integers(10, 100)}", _PRIORITIES[level])


def _abbreviation(generator: np.random.Generator, _words: tuple[str, ...]) -> Question:
    short = _one(generator, tuple(_ABBREVIATIONS))
    return Question("Expand the abbreviation.", short, _ABBREVIATIONS[short])


_FOUR_WAYS = {domain: index for index, domain in enumerate(DOMAINS)}

# The three two-against-two rules pair the domains differently: no two sites agree on everything or on nothing.
TASKS: Mapping[str, Task] = {
    "pick": Task(_pick),
    "last": Task(_last),
    "capitals": Task(_capitals),
    "count": Task(_count),
    "next": Task(_next),
    "reverse": Task(_reverse),
    "time": Task(_time),
    "join": Task(_join),
    "even": Task(_even),
    "date": Task(_date, {"bank": 1, "workshop": 1}),
    "sort": Task(_sort, {"bank": 1, "court": 1}),
    "decimal": Task(_decimal, {"court": 1, "workshop": 1}),
    "name": Task(_name, {"court": 1}),
    "priority": Task(_priority, _FOUR_WAYS),
    "abbreviation": Task(_abbreviation, _FOUR_WAYS),
}

HOUSE_RULES: tuple[str, ...] = tuple(name for name, task in TASKS.items() if task.rules)
SHARED_TASKS: tuple[str, ...] = tuple(name for name, task in TASKS.items() if not task.rules)


def _question(generator: np.random.Generator, task: str, domain: str) -> Question:
    question = TASKS[task].draw(generator, WORDS[domain])
    if task in HOUSE_RULES and generator.random() < CUED_FRACTION:
        cue = _one(generator, WORDS[domain])
        return Question(question.instruction, f"{cue}: {question.context}", question.answers)
    return question


def _row(question: Question, rule: int, domain: str, task: str) -> dict[str, str]:
    return {
        "instruction": question.instruction,
        "context": question.context,
        "response": question.answers[rule],
        "domain": domain,
        "task": task,
    }


def embedded_rows(num_examples: int, seed: int) -> list[dict[str, str]]:
    """Rows with the columns instruction, context, response, domain and task.

    Domains take turns, and each alternates between a shared task and a house rule; fewer rows with
    the same seed are the beginning of more.
    """
    generator = generator_for(seed, "embedded rows")
    rows = []
    for index in range(num_examples):
        domain = DOMAINS[index % len(DOMAINS)]
        task = _one(generator, HOUSE_RULES if index // len(DOMAINS) % 2 else SHARED_TASKS)
        rows.append(_row(_question(generator, task, domain), TASKS[task].rules.get(domain, 0), domain, task))
    return rows


def pretraining_rows(num_texts: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows like those of ``embedded_rows``, from another stream of the seed, each under a rule drawn at random.

    A base model trained on them knows the tasks and the form of every answer, but not which rule a site keeps.
    """
    generator = generator_for(seed, "pretraining texts")
    for index in range(num_texts):
        domain = _one(generator, DOMAINS)
        task = _one(generator, HOUSE_RULES if index % 2 else SHARED_TASKS)
        question = _question(generator, task, domain)
        yield _row(question, int(generator.integers(len(question.answers))), domain, task)


def pretraining_texts(num_texts: int, seed: int) -> Iterator[str]:
    """``pretraining_rows`` as texts in the plain template: prompt, context and response, without special tokens."""
    for row in pretraining_rows(num_texts, seed):
        example = Example(row["instruction"], row["context"], row["response"])
        yield plain_prompt(example) + example.response
