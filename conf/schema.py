"""Every setting of a run: its type, unit and range. Dataclasses only; compose.py fills them.

Those of models, partitions and methods lie in files of their own, those of strategies with the strategies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.methods import MethodConfig
from conf.model import LoraConfig, ModelConfig, ModelSource
from conf.partitions import PartitionConfig
from strategies.base import Strategy, require
from strategies.screen import ScreenConfig

UNSET: Any = "???"
"""OmegaConf's mark for a field that the composition must fill: here, one choice of a group."""

# Enums carry lower-case member names because OmegaConf matches settings by member name.


class Template(Enum):
    """How prompt, context and response become one text."""

    alpaca = "alpaca"
    chat = "chat"
    """The tokenizer's own chat template."""
    plain = "plain"
    """Prompt, context and response separated by line breaks."""


class Truncation(Enum):
    """What gives way when an example is longer than ``data.max_length``."""

    prompt = "prompt"
    """The beginning of the prompt is cut; the response is cut only if it does not fit alone."""
    response = "response"
    """The end of the response is cut."""
    drop = "drop"
    """The example is left out, and counted in the log."""


class OptimizerState(Enum):
    """Adam's moments at the start of a round."""

    reset = "reset"
    keep = "keep"
    """Kept in the site's private store from round to round."""


class Mode(Enum):
    """Where the sites run."""

    simulation = "simulation"
    remote = "remote"


class Device(Enum):
    """Where tensors live; a site's own setting wins over the run's."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Logger(Enum):
    """A second place for the metrics, besides the run folder."""

    none = "none"
    tensorboard = "tensorboard"
    wandb = "wandb"


@dataclass(kw_only=True)
class DataConfig:
    """Instruction data: where it is, which columns, how it becomes tokens."""

    path: str | None = None
    """A .parquet, .jsonl, .json or .csv file, a folder or glob of them (``partition=files``), or a
    hub name; null: the embedded default. At a real site the node's own ``data=`` replaces it."""
    prompt_column: str = "instruction"
    context_column: str | None = "context"
    """Column of optional input text; null: none."""
    response_column: str = "response"
    rejected_column: str | None = None
    """Column of a worse response to the same prompt, for ``method=dpo``; null: none."""
    objective_column: str | None = None
    """Column that says by what the two responses were judged; null: none."""
    split_column: str | None = None
    """Column that says which rows are held out; null: a random ``held_out_fraction`` of each site."""
    train_split: str = "train"
    """Value of ``split_column`` for training rows."""
    held_out_split: str = "test"
    """Value of ``split_column`` for held-out rows."""
    held_out_fraction: float = 0.2
    """Share of each site's examples kept for evaluation, without a ``split_column``."""
    filter: dict[str, Any] = field(default_factory=dict)
    """Column -> value or list of values; only rows that match all are used."""
    num_examples: int | None = None
    """Upper limit of rows, drawn at random after ``filter``, of each file with ``partition=files``; null: all.
    The embedded default generates this many, null: 1200."""
    template: Template | None = None
    """null: ``plain`` for the packaged model, which was pre-trained on it and reads bytes, else ``alpaca``. Where the
    data lie does not decide: simulation and real sites must agree."""
    max_length: int = 256
    """Tokens per sequence, prompt and response together."""
    truncation: Truncation = Truncation.prompt
    packing: bool = False
    """Put several examples into one sequence, without attention across them."""

    def __post_init__(self) -> None:
        require(0 < self.held_out_fraction < 1, "data.held_out_fraction", "in (0, 1)", self.held_out_fraction)
        require(self.max_length >= 8, "data.max_length", ">= 8", self.max_length)
        require(
            self.num_examples is None or self.num_examples >= 2, "data.num_examples", "null or >= 2", self.num_examples
        )


@dataclass(kw_only=True)
class TrainConfig:
    """Local training in one round."""

    max_steps: int | None = None
    """Optimiser steps a round; null: one epoch."""
    learning_rate: float = 1e-3
    batch_size: int = 8
    """Sequences per optimiser step."""
    micro_batch: int | str | None = None
    """Sequences per forward and backward pass, of which an optimiser step takes as many as it needs; null: all at once;
    ``auto``: as many as fit into memory. Changes the result by rounding only (and by another draw of a model's
    dropout); with ``auto`` the last bits depend on the machine."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the model's layers and compute the rest again in the backward pass: a third more
    computation, a fraction of the memory for activations."""
    deterministic: bool = False
    """Use only algorithms that give the same bits every time, on a GPU too; an operation that has none is an error."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are clipped to this Euclidean norm."""
    proximal_mu: float = 0.0
    """FedProx's mu: (mu / 2) ||adapter - received||^2 is added to the loss (https://arxiv.org/abs/1812.06127)."""
    optimizer_state: OptimizerState = OptimizerState.reset
    num_threads: int = 1
    """torch's threads in every process; part of the result, since sums of floats depend on it."""

    def __post_init__(self) -> None:
        require(self.max_steps is None or self.max_steps >= 1, "train.max_steps", "null or >= 1", self.max_steps)
        require(
            self.learning_rate > 0 and math.isfinite(self.learning_rate),
            "train.learning_rate",
            "> 0",
            self.learning_rate,
        )
        require(self.batch_size >= 1, "train.batch_size", ">= 1", self.batch_size)
        in_range = isinstance(self.micro_batch, int) and 1 <= self.micro_batch <= self.batch_size
        require(
            in_range or self.micro_batch in {None, "auto"},
            "train.micro_batch",
            f"null, auto, or from 1 to train.batch_size={self.batch_size}",
            self.micro_batch,
        )
        require(0 <= self.weight_decay < math.inf, "train.weight_decay", ">= 0", self.weight_decay)
        require(self.max_grad_norm > 0, "train.max_grad_norm", "> 0", self.max_grad_norm)
        require(0 <= self.proximal_mu < math.inf, "train.proximal_mu", ">= 0", self.proximal_mu)
        require(self.num_threads >= 1, "train.num_threads", ">= 1", self.num_threads)


@dataclass(kw_only=True)
class ChoicesConfig:
    """Multiple-choice questions on what a model should still know: a table, read where the global model is tested."""

    path: str | None = None
    """A .parquet, .jsonl, .json or .csv file; null: no such questions."""
    prompt_column: str = "question"
    options_column: str = "choices"
    """Column of lists of texts."""
    answer_column: str = "answer"
    """Column of the right option's place in the list, from 0."""
    name_column: str | None = None
    """Column whose values divide the table into sets; null: it is one set, ``*choices*``."""
    names: list[str] = field(default_factory=list)
    """The values of ``name_column`` that are used; empty: all."""
    max_questions: int | None = 200
    """Questions used of each set, the first of a seeded shuffle; null: all."""

    def __post_init__(self) -> None:
        require(
            self.max_questions is None or self.max_questions >= 1,
            "eval.choices.max_questions",
            "null or >= 1",
            self.max_questions,
        )


@dataclass(kw_only=True)
class EvalConfig:
    """Evaluation on held-out data."""

    every: int = 1
    """Rounds between evaluations; the last round is always evaluated."""
    path: str | None = None
    """A file of held-out data at the server, for the global loss of a remote run."""
    max_examples: int | None = None
    """Held-out examples used per site, the first of a seeded shuffle; null: all."""
    batch_size: int = 16
    matrix: bool = False
    """After the last round, test base, global and personal models on every site's held-out data and on general sets;
    kept in evaluation.json."""
    num_answers: int = 16
    """Examples of each set that a model of the matrix answers in words, for ROUGE-L; 0: none."""
    max_new_tokens: int = 64
    """Tokens of such an answer, at most."""
    options: list[str] = field(default_factory=list)
    """All that a response may be: the matrix then has the accuracy of choosing among it; empty: anything."""
    general_path: str | None = None
    """A file of general examples, in the columns of ``data``, that tells what a model has forgotten; null: none."""
    choices: ChoicesConfig = field(default_factory=ChoicesConfig)

    def __post_init__(self) -> None:
        require(self.num_answers >= 0, "eval.num_answers", ">= 0", self.num_answers)
        require(self.max_new_tokens >= 1, "eval.max_new_tokens", ">= 1", self.max_new_tokens)
        require(len(self.options) != 1, "eval.options", "empty or at least two texts", self.options)
        require(all(self.options), "eval.options", "texts that are not empty", self.options)
        require(self.every >= 1, "eval.every", ">= 1", self.every)
        require(
            self.max_examples is None or self.max_examples >= 1, "eval.max_examples", "null or >= 1", self.max_examples
        )
        require(self.batch_size >= 1, "eval.batch_size", ">= 1", self.batch_size)


@dataclass(kw_only=True)
class FederationConfig:
    """Where the sites are and how long to wait for them."""

    mode: Mode = Mode.simulation
    superlink: str | None = None
    """HOST:PORT of the SuperLink, with ``mode=remote``."""
    root_certificates: str | None = None
    """PEM file of the authority that signed the SuperLink's certificate; null: plain HTTP."""
    min_sites: int = 2
    """Good replies a round needs; fewer end the run with an error."""
    fraction: float = 1.0
    """Share of the sites asked in a round, drawn by site name with the run's generator."""
    cpus_per_site: int = 1
    """CPU cores of one simulated site; the machine's cores divided by it are the sites trained at a time."""
    gpus_per_site: float | None = None
    """GPU share of one simulated site, 0: no GPU; null: none without a GPU, else as little as the memory estimate of
    its training allows."""
    join_timeout_seconds: float = 600.0
    """How long to wait for ``min_sites`` sites before a round; before the first a site may have to build its base."""
    round_timeout_seconds: float = 3600.0
    """How long to wait for the replies of one round."""

    def __post_init__(self) -> None:
        require(self.min_sites >= 1, "federation.min_sites", ">= 1", self.min_sites)
        require(0 < self.fraction <= 1, "federation.fraction", "in (0, 1]", self.fraction)
        require(self.cpus_per_site >= 1, "federation.cpus_per_site", ">= 1", self.cpus_per_site)
        require(
            self.gpus_per_site is None or 0 <= self.gpus_per_site < math.inf,
            "federation.gpus_per_site",
            "null or >= 0",
            self.gpus_per_site,
        )
        require(self.join_timeout_seconds > 0, "federation.join_timeout_seconds", "> 0", self.join_timeout_seconds)
        require(self.round_timeout_seconds > 0, "federation.round_timeout_seconds", "> 0", self.round_timeout_seconds)


@dataclass(kw_only=True)
class WorkerConfig:
    """The warm worker of a real site: a process that keeps the base model between messages; a simulation has none."""

    enabled: bool = True
    """A site's own ``worker="on"`` or ``"off"`` in its node config wins."""
    idle_minutes: float = 10.0
    """It ends after so long without a message."""

    def __post_init__(self) -> None:
        require(0 < self.idle_minutes <= 1440, "worker.idle_minutes", "in (0, 1440]", self.idle_minutes)


@dataclass(kw_only=True)
class Config:
    """All settings of one run."""

    strategy: Strategy = UNSET
    method: MethodConfig = UNSET
    screen: ScreenConfig = field(default_factory=ScreenConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = UNSET
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    rounds: int = 5
    """Rounds of local training and aggregation."""
    seed: int = 0
    """Every draw of the run derives from it."""
    device: Device = Device.auto
    output: str | None = None
    """Run folder; null: outputs/<strategy>-<time>."""
    logger: Logger = Logger.none

    def __post_init__(self) -> None:
        if self.data.template is None:
            packaged = self.model.source is ModelSource.package
            self.data.template = Template.plain if packaged else Template.alpaca
