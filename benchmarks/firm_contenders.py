"""FIRM and its rivals on a language model: who is compared, on what, and the runs of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.firm_tables import ALL_SHARES, EQUAL, THREE_SHARES
from benchmarks.word_base import word_base_sha256
from benchmarks.workloads import ON_WORDS
from benchmarks.workloads import WORKLOADS as FC_MOE_WORKLOADS
from client.alignment.reward_models import HEAD_FILE

DPO = "dpo"
FSMGDA = "fsmgda"


@dataclass(frozen=True)
class Workload:
    """What everyone is trained on."""

    settings: tuple[str, ...]
    rewards: tuple[str, str]
    source: str | None
    """A file of the data folder, or the workload of ``benchmarks.fc_moe`` whose model and prompts these are; None: what
    the settings say."""
    base: tuple[str, ...] = ()
    """Settings of the base model, where they say where it lies on this machine: in no cell, but in their version."""
    has_sweeps: bool = True
    """Whether values of beta, local steps and sites are compared on it too, or methods alone."""

    @property
    def has_pairs(self) -> bool:
        """Whether its data are pairs of a preferred response and another."""
        return any(setting.startswith("data.rejected_column=") for setting in self.settings)

    def version(self, rewards: Sequence[str]) -> str:
        """Of prompts and base model, where they are those of ``benchmarks.fc_moe``, and of heads among the rewards."""
        heads = [folder / HEAD_FILE for folder in heads_among(rewards).values()]
        weights = b"".join(path.read_bytes() for path in heads if path.exists())
        of_heads = hashlib.sha256(weights).hexdigest()[:8] if weights else ""
        if self.source in FC_MOE_WORKLOADS:
            return FC_MOE_WORKLOADS[self.source].version + of_heads
        return (word_base_sha256()[:8] if self.base == ON_WORDS else "") + of_heads

    def compares(self, contender: Contender) -> bool:
        """Whether the contender is run on it."""
        return (self.has_pairs or not contender.of_pairs) and (self.has_sweeps or contender.is_main)


@dataclass(frozen=True)
class Contender:
    """A method under comparison."""

    title: str
    settings: tuple[str, ...]
    """The strategy first."""
    shares: tuple[float, ...] = ALL_SHARES
    """Preferences it is run with; equal ones alone for methods that take none."""
    is_main: bool = True
    """Whether it is a method by itself; else one value of a sweep, which waits for the methods."""
    of_pairs: bool = False
    """Whether it is trained on preference pairs."""
    adds_to: str | None = None
    """Name of the contender whose runs count as its own too."""


def heads_among(rewards: Sequence[str]) -> dict[str, Path]:
    """Objective -> folder of its linear head, of the rewards that have a source (``OBJECTIVE:FOLDER``)."""
    split = (spec.partition(":") for spec in rewards)
    return {objective: Path(folder) for objective, _, folder in split if folder}


BETA = 0.3
"""Of FIRM: between MGDA, which knows no preference, and linear scalarisation, which knows nothing else."""
RHO = 0.25
"""Of FIRM where weights are smoothed: a step's own count a quarter, since a rollout's are mostly noise."""
BETWEEN = (0.2, 0.35, 0.4, 0.45)
"""Preferences between the others, where linear scalarisation might have ends that those miss."""
_FIRM = ("strategy=firm", f"method.beta={BETA}")
_HALVES = "method.gram=halves"
_SMOOTH = f"method.rho={RHO}"

CONTENDERS: dict[str, Contender] = {
    "firm_smooth": Contender(f"FIRM, beta {BETA}, rho {RHO}, gram of halves (ours)", (*_FIRM, _HALVES, _SMOOTH)),
    "firm_halves": Contender(f"FIRM, beta {BETA}, gram of halves", (*_FIRM, _HALVES)),
    "scalarised": Contender("linear scalarisation", ("strategy=firm", "method.beta=inf")),
    "mgda": Contender("local MGDA (beta 0)", ("strategy=firm", "method.beta=0"), EQUAL),
    "firm": Contender(f"FIRM, beta {BETA}", _FIRM),
    "firm_rho": Contender(f"FIRM, beta {BETA}, rho {RHO}", (*_FIRM, _SMOOTH)),
    "mgda_halves": Contender("local MGDA, gram of halves", ("strategy=firm", "method.beta=0", _HALVES), EQUAL),
    "mgda_smooth": Contender(
        f"local MGDA, gram of halves, rho {RHO}", ("strategy=firm", "method.beta=0", _HALVES, _SMOOTH), EQUAL
    ),
    "fedcmoo": Contender("FedCMOO", ("strategy=fedcmoo",), EQUAL),
    FSMGDA: Contender("FSMGDA", ("strategy=firm", "method.beta=inf"), EQUAL),
    DPO: Contender("DPO on pairs, mixed by preference", ("strategy=firm",), of_pairs=True),
    "smooth_between": Contender(
        f"FIRM, beta {BETA}, rho {RHO}, halves, nine preferences", (*_FIRM, _HALVES, _SMOOTH), BETWEEN, False,
        adds_to="firm_smooth",
    ),
    "firm_between": Contender(
        f"FIRM, beta {BETA}, halves, nine preferences", (*_FIRM, _HALVES), BETWEEN, False, adds_to="firm_halves"
    ),
    "scalarised_between": Contender(
        "linear scalarisation, nine preferences", ("strategy=firm", "method.beta=inf"), BETWEEN, False,
        adds_to="scalarised",
    ),
    **{
        f"beta_{beta:g}": Contender(
            f"FIRM, halves, beta {beta:g}", ("strategy=firm", f"method.beta={beta:g}", _HALVES), THREE_SHARES,
            is_main=False,
        )
        for beta in (0.1, 1, 10)
    },
    **{
        f"{key}_{value}_{name}": Contender(
            f"{value} {words}, {title}", (*settings, f"{setting}={value}"), EQUAL, is_main=False
        )
        for key, setting, words, values in (
            ("steps", "train.max_steps", "local steps", (1, 8)), ("sites", "partition.num_sites", "sites", (2, 8)),
        )
        for value in values
        for name, title, settings in (
            ("firm", "FIRM, halves", (*_FIRM, _HALVES)), ("mgda", "local MGDA", ("strategy=firm", "method.beta=0")),
        )
    },
    "firm_weighted": Contender(
        f"FIRM, halves, weighted, beta {BETA}", (*_FIRM, _HALVES, "method.regulariser=weighted"), THREE_SHARES,
        is_main=False,
    ),
}  # fmt: skip

_PAIRS = (
    "data.split_column=split", "data.prompt_column=prompt", "data.response_column=chosen",
    "data.rejected_column=rejected", "data.objective_column=objective", "data.context_column=null",
    "partition=dirichlet", "partition.column=objective", "partition.alpha=0.3", "partition.num_sites=4",
)  # fmt: skip
WORKLOADS: dict[str, Workload] = {
    "tiny": Workload(
        (
            "partition=dirichlet", "partition.column=group", "partition.alpha=0.3", "partition.num_sites=4", "rounds=8",
            "train.max_steps=4", "train.batch_size=8", "train.learning_rate=1e-2", "lora.rank=4", "lora.alpha=8",
            "data.max_length=64", "method.group_size=8", "method.max_new_tokens=16", "method.eval_prompts=64",
            "eval.max_examples=64", "method.kl=0.05",
        ),
        ("brevity", "sentiment"),
        "dolly",
    ),
    "heads": Workload(
        (
            *_PAIRS, "rounds=8", "train.max_steps=4", "train.batch_size=8", "train.learning_rate=1e-2",
            "lora.rank=4", "lora.alpha=8", "data.max_length=96", "method.group_size=8", "method.max_new_tokens=16",
            "method.eval_prompts=64", "eval.max_examples=64", "method.kl=0.3",
        ),
        ("helpful:benchmarks/heads/words/helpful", "harmless:benchmarks/heads/words/harmless"),
        "preferences.parquet",
        base=ON_WORDS,
        has_sweeps=False,
    ),
    "smollm2": Workload(
        (
            "model=smollm2_moe", *_PAIRS, "rounds=30", "train.max_steps=8", "train.batch_size=8",
            "train.learning_rate=2e-4", "method.group_size=4", "method.max_new_tokens=64", "method.eval_prompts=64",
            "eval.max_examples=64", "method.kl=0.3",
        ),
        ("helpful:benchmarks/heads/smollm2/helpful", "harmless:benchmarks/heads/smollm2/harmless"),
        "preferences.parquet",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: equal cells are the same computation."""

    workload: str
    contender: str
    share: float
    """Preference for the first objective; the second has the rest."""
    seed: int
    settings: tuple[str, ...]
    """All that is set but the place of the data."""
    version: str
    """``Workload.version``"""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Cell:
        """The cell of a stored row."""
        settings = tuple(row["settings"])
        return cls(row["workload"], row["contender"], row["share"], row["seed"], settings, row["version"])

    def overrides(self, data: Path) -> list[str]:
        """The settings of its run, with the data in the folder ``data``; FedCMOO takes no preference."""
        of = WORKLOADS[self.workload]
        source = of.source
        if source in FC_MOE_WORKLOADS:
            place = FC_MOE_WORKLOADS[source].source(data, self.seed, "test")
        else:
            place = [*of.base, *([f"data.path={data / source}"] if source else [])]
        preference = [f"method.preference=[{self.share},{round(1 - self.share, 9)}]"]
        none = self.contender in {"fedcmoo", FSMGDA}
        return [*self.settings, *place, f"seed={self.seed}", *([] if none else preference)]


def contenders_of(workload: str) -> list[str]:
    """Names of all that are compared on it."""
    return [name for name, contender in CONTENDERS.items() if WORKLOADS[workload].compares(contender)]


def cells(names: Sequence[str], workload: str, rewards: Sequence[str], seeds: Sequence[int], device: str) -> list[Cell]:
    """Every contender's runs on the workload: first the methods, then the sweeps, each seed by seed."""
    of = WORKLOADS[workload]
    version = of.version(rewards)
    common = (*of.settings, f"method.rewards=[{','.join(rewards)}]", f"device={device}")
    chosen = [(name, CONTENDERS[name]) for name in names if of.compares(CONTENDERS[name])]
    return [
        Cell(workload, name, share, seed, (*contender.settings[:1], *common, *contender.settings[1:]), version)
        for is_main in (True, False)
        for seed in seeds
        for name, contender in chosen
        if contender.is_main is is_main
        for share in contender.shares
    ]
