"""Sets that are no site's: they tell what a model still knows. Read from files at the server, or in a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.data import held_out_file
from client.evaluation.choices import Question
from client.evaluation.examination import EvalSet
from client.tables import read_table
from conf.schema import ChoicesConfig, Config
from conf.seeds import generator_for

GENERAL, CHOICES = "*general*", "*choices*"
"""Names of the sets; those of ``eval.choices.name_column`` get stars too, which no site's name has."""


def general_sets(config: Config) -> dict[str, EvalSet]:
    """The sets that ``eval.general_path`` and ``eval.choices`` name, of a size that the settings limit.

    Raises:
        ValueError: If a file cannot be read, lacks a column, has no usable row or a row that is no question; the
            message names the setting.
    """
    found: dict[str, EvalSet] = {}
    if config.eval.general_path is not None:
        examples = held_out_file(config, config.eval.general_path, "eval.general_path")
        found[GENERAL] = EvalSet(_drawn(examples, config.eval.max_examples, config.seed, GENERAL))
    if config.eval.choices.path is not None:
        for name, questions in _questions(config.eval.choices, config.eval.choices.path).items():
            chosen = _drawn(questions, config.eval.choices.max_questions, config.seed, name)
            found[name] = EvalSet(questions=chosen)
    return found


def _questions(choices: ChoicesConfig, path: str) -> dict[str, list[Question]]:
    """Name of a set -> its questions, in the order of the file."""
    table = read_table(Path(path).expanduser(), "eval.choices.path")
    columns = {
        "eval.choices.prompt_column": choices.prompt_column,
        "eval.choices.options_column": choices.options_column,
        "eval.choices.answer_column": choices.answer_column,
        "eval.choices.name_column": choices.name_column,
    }
    for setting, column in columns.items():
        if column is not None and column not in table.column_names:
            raise ValueError(f"{setting}={column!r} is not a column of {path}; it has {sorted(table.column_names)}")
    found: dict[str, list[Question]] = {}
    for number, row in enumerate(table):
        name = CHOICES if choices.name_column is None else str(row[choices.name_column])
        if not choices.names or name in choices.names:
            starred = name if choices.name_column is None else f"*{name}*"
            found.setdefault(starred, []).append(_question(row, choices, f"row {number} of {path}"))
    missing = sorted(set(choices.names) - {name.strip("*") for name in found})
    if missing or not found:
        raise ValueError(f"eval.choices.names: {path} has no question of {missing or 'any name'}")
    return found


def _question(row: Mapping[str, Any], choices: ChoicesConfig, place: str) -> Question:
    options, answer = row[choices.options_column], row[choices.answer_column]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o.strip() for o in options):
        raise ValueError(
            f"eval.choices.options_column={choices.options_column!r}: {place} needs a list of at least two texts"
        )
    if not str(answer).isdigit() or int(answer) >= len(options):
        raise ValueError(
            f"eval.choices.answer_column={choices.answer_column!r}: {place} must tell the right option's place, 0 to "
            f"{len(options) - 1}, got {answer!r}"
        )
    return Question(str(row[choices.prompt_column]), "", tuple(options), int(answer))


def _drawn(items: list[Any], limit: int | None, seed: int, name: str) -> list[Any]:
    """At most ``limit`` items, drawn at random and left in their order."""
    if limit is None or limit >= len(items):
        return items
    order = generator_for(seed, "general set", name).permutation(len(items))[:limit]
    return [items[index] for index in sorted(order)]
