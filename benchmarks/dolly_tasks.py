"""Dolly's four tasks with a text to work on, divided over sites in three ways: what ``benchmarks.flex`` fine-tunes on.

The tasks are those of FLEx and of ClientMorpher (https://arxiv.org/abs/2608.15311), which publishes the protocol:
classification, closed question answering, information extraction and summarisation; loss on the response alone.
General text is Dolly's other categories, which no site trains on.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.word_base import table, word_base_sha256
from benchmarks.workload_texts import cut
from benchmarks.workloads import ON_WORDS, data_file

TASKS = ("classification", "closed_qa", "information_extraction", "summarization")
CHOICES = ("arc_easy", "piqa")
"""Sets of multiple-choice questions; MMLU is left out, where both bases guess."""


@dataclass(frozen=True)
class Size:
    """A base model, and how much it is trained and tested on."""

    settings: tuple[str, ...]
    splits: Mapping[str, int]
    """Split -> examples of all tasks together."""
    num_general: int
    on_words: bool = False
    """Whether the base is the one of ``benchmarks.word_base``."""


SIZES = {
    "words": Size(
        (
            "data.max_length=96", "lora.rank=4", "lora.alpha=8", "rounds=8",
            "train.max_steps=12", "train.batch_size=16", "train.num_threads=1", "eval.num_answers=16",
            "eval.max_new_tokens=32", "eval.choices.max_questions=50", "device=cpu",
        ),
        {"train": 2400, "validation": 400, "test": 400},
        num_general=100,
        on_words=True,
    ),
    "smollm2_moe": Size(
        (
            # Copies of one expert would make the choice of an expert to graft a tie.
            "model=smollm2_moe", "model.upcycle.differentiate=steps", "data.template=alpaca", "data.max_length=512",
            "data.packing=false", "rounds=10", "train.max_steps=20", "train.batch_size=16", "train.micro_batch=auto",
            "eval.num_answers=64", "eval.max_new_tokens=96", "eval.batch_size=64", "eval.choices.max_questions=200",
        ),
        {"train": 4000, "validation": 600, "test": 1000},
        num_general=200,
    ),
}  # fmt: skip
"""By ``--model``; the first is for a CPU: its base knows 2,000 words and has read instructions of all tasks."""


def _dirichlet(alpha: float) -> tuple[str, ...]:
    return (
        "partition=dirichlet", "partition.column=group", "partition.num_sites=8", f"partition.alpha={alpha}",
        "partition.min_examples=30",
    )  # fmt: skip


PARTITIONS = {
    "pathological": ("partition=natural", "partition.column=group"),
    "dirichlet_0.1": _dirichlet(0.1),
    "dirichlet_1.0": _dirichlet(1.0),
}
"""Four sites of one task each, or eight with shares of tasks drawn from Dirichlet(alpha)."""


def version_of(model: str, partition: str) -> str:
    """Changes with data, base and settings: results of another version are not used."""
    size = SIZES[model]
    base = word_base_sha256() if size.on_words else ""
    made_by = "".join(inspect.getsource(function) for function in (_rows, cut))
    return hashlib.sha256(f"{base}{made_by}{size}{PARTITIONS[partition]}".encode()).hexdigest()[:8]


def overrides(data: Path, model: str, partition: str, seed: int, split: str) -> list[str]:
    """Settings of a run that is judged on ``split``, with the whole evaluation matrix on test data.

    Args:
        data: Folder of the data sets.
        model: Key of ``SIZES``.
        partition: Key of ``PARTITIONS``.
        seed: Of the run and of the data's draw.
        split: ``validation`` or ``test``.

    Raises:
        ValueError: If a data set is not in the folder.
    """
    size = SIZES[model]
    version = version_of(model, partition)
    tasks = data_file(f"{version}/dolly-tasks-{model}-{seed}", lambda: cut(_rows(data), size.splits, seed))
    general = data_file(
        f"{version}/dolly-general-{model}-{seed}",
        lambda: cut(_rows(data, of_tasks=False), {"general": size.num_general}, seed),
    )
    return [
        *(ON_WORDS if size.on_words else ()), *size.settings, *PARTITIONS[partition],
        f"seed={seed}", f"data.path={tasks}", "data.split_column=split",
        f"data.held_out_split={split}", f"eval.matrix={str(split == 'test').lower()}",
        f"eval.general_path={general}", f"eval.choices.path={data / 'eval_mcq.parquet'}",
        "eval.choices.name_column=dataset", f"eval.choices.names=[{','.join(CHOICES)}]",
    ]  # fmt: skip


def _rows(data: Path, *, of_tasks: bool = True) -> list[dict[str, str]]:
    """Dolly's rows of the four tasks, or all others; ``group`` is the category."""
    columns = ("instruction", "context", "response", "category")
    found = table(data, "dolly15k", *columns)
    return [
        {**{name: row[name] for name in columns[:3]}, "group": row["category"]}
        for row in found
        if (row["category"] in TASKS) == of_tasks and row["response"].strip()
    ]
