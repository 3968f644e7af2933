"""What FC-MoE's benchmark fine-tunes on: texts of a seed, their division over sites, rounds, words that are scored.

A workload's data of a seed are a file with the columns text, label, group (what sites differ in) and split (train,
validation, test), so that ``bouquet run`` with the same settings does the same. Nothing is chosen by the test split.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import datasets

from benchmarks.contenders import CONTENDERS
from benchmarks.word_base import SPARSE_BASE, WORD_BASE, word_base_sha256
from benchmarks.workload_texts import AG_NEWS_WORDS, BANKING_WORDS, CLINC_WORDS, LETTERS, MAKERS, Maker, Rows, sources
from client.bases import cache_root
from conf.compose import load_config

KEY_CONTENDERS = (
    "fedavg", "noise", "fedavg_step", "fedavgm", "fedalign_moe", "fc_moe", "fc_moe_plus", "fc_moe_plus_as_shipped",
    "fc_moe_plus_whole", "fc_moe_plus_whole_as_shipped", "local_only", "centralised"
)  # fmt: skip
"""Who is compared where not everyone is."""
ABLATED = (
    *KEY_CONTENDERS, "fc_moe_no_projection", "fc_moe_no_retention", "fc_moe_no_importance", "fc_moe_uniform_rate"
)  # fmt: skip
"""Who is compared on the data of the paper's ablation."""
WEIGHTED = ("fedavg_uniform", "fedavg_tokens", "fedmoe")
"""Who is compared besides where it matters how much a site counts."""
_PASSED_BY = "fedavgm_momentum_0.3"
OTHER_VALUES = (*(f"fc_moe_plus_as_shipped_agreement_{sites:g}" for sites in (0.3, 0.5, 2.0, 3.0)), _PASSED_BY)
"""FC-MoE plus with another agreement, where sites have much to learn from each other; FedAvgM with another momentum."""
EVERYONE = tuple(name for name in CONTENDERS if name != _PASSED_BY)
"""Who is compared on CLINC, where FedAvgM is tuned to that momentum by LoRA, and to more with whole experts."""


def on_words(base: Path) -> tuple[str, ...]:
    """Settings of a base model of whole words, and its template."""
    return f"model.name={base}", "model.source=hub", "data.template=plain"


ON_WORDS = on_words(WORD_BASE)


@dataclass(frozen=True)
class Workload:
    """One task of the benchmark."""

    name: str
    title: str
    rounds: int
    settings: tuple[str, ...]
    """Of every run, beside method, model and data file."""
    labels: tuple[str, ...] = ()
    """Words of which the model chooses one; empty: judged by its loss."""
    rows: Maker | None = None
    """From the folder of data sets and a seed; None: the embedded default, new text with every seed."""
    base: Path = WORD_BASE
    """One of the base models of ``word_base``."""
    model: tuple[str, ...] = ()
    """Settings of another base model and its template."""
    contenders: tuple[str, ...] = KEY_CONTENDERS
    """Who is compared."""

    @cached_property
    def version(self) -> str:
        """Changes with what the workload is made by: results of another version are not used."""
        settings = repr((self.rounds, self.settings, self.labels, self.model))
        return hashlib.sha256("".join([self._base(), *sources(self.rows), settings]).encode()).hexdigest()[:8]

    def _base(self) -> str:
        """What its base model is made of; the embedded default's is the project's own."""
        if self.model:
            return repr(load_config(self.model).model)
        return "" if self.rows is None else word_base_sha256(self.base)

    def overrides(self, data: Path, seed: int, split: str, device: str = "cpu") -> list[str]:
        """Settings of a run that is judged on ``split``; data are made if the cache lacks them."""
        own = [*self.settings, f"rounds={self.rounds}", f"seed={seed}", f"device={device}"]
        return own if self.rows is None else [*own, *self.source(data, seed, split)]

    def source(self, data: Path, seed: int, split: str) -> list[str]:
        """Those of the ``overrides`` that say where model and data are."""
        return [
            *(self.model or on_words(self.base)), f"data.path={self.file(data, seed)}",
            "data.prompt_column=text", "data.context_column=null", "data.response_column=label",
            "data.split_column=split", f"data.held_out_split={split}",
        ]  # fmt: skip

    def file(self, data: Path, seed: int) -> Path:
        """This seed's data, written if the cache lacks them."""
        rows = self.rows
        assert rows is not None
        return data_file(f"{self.version}/{self.name}-{seed}", lambda: rows(data, seed))


def data_file(name: str, rows: Callable[[], Rows]) -> Path:
    """The file of that name, with the rows and a column ``split``; made if the cache lacks it."""
    path = cache_root() / "benchmarks" / f"{name}.parquet"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.stem}-{os.getpid()}.parquet")
        joined = [{**row, "split": split} for split, of_split in rows().items() for row in of_split]
        datasets.Dataset.from_list(joined).to_parquet(str(scratch))
        scratch.replace(path)
    return path


def _dirichlet(alpha: float, num_sites: int = 10) -> tuple[str, ...]:
    # As many rows as give every site some of each split.
    return (
        "partition=dirichlet", "partition.column=group", f"partition.num_sites={num_sites}",
        f"partition.alpha={alpha}", "partition.min_examples=40",
    )  # fmt: skip


_TRAINING = ("lora.rank=16", "lora.alpha=32", "train.batch_size=16", "train.num_threads=1")
_BY_GROUP = ("partition=natural", "partition.column=group")
_ANSWERS = ("eval.num_answers=16", "eval.max_new_tokens=48")
_SMOLLM2 = (
    "model=smollm2_moe", "model.upcycle.differentiate=steps", "data.template=alpaca", "train.micro_batch=auto",
)  # fmt: skip


def _ag_news_workload(name: str, alpha: float, contenders: tuple[str, ...] = KEY_CONTENDERS) -> Workload:
    return Workload(
        name,
        f"AG News topics, 10 sites, Dirichlet {alpha}, 1,000 examples, 25 rounds",
        25,
        (*_TRAINING, *_dirichlet(alpha), "data.max_length=48"),
        tuple(AG_NEWS_WORDS.values()),
        MAKERS["ag_news"],
        contenders=contenders,
    )


_CLINC = Workload(
    "clinc",
    "CLINC150 domains, 10 sites, Dirichlet 0.1, 1,000 examples, 15 rounds",
    15,
    (*_TRAINING, *_dirichlet(0.1), "data.max_length=40"),
    tuple(CLINC_WORDS.values()),
    MAKERS["clinc"],
    contenders=EVERYONE,
)
WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _CLINC,
        replace(
            _CLINC,
            name="clinc_rank_4",
            title=f"{_CLINC.title}, rank 4",
            settings=(*_CLINC.settings, "lora.rank=4", "lora.alpha=8"),
            contenders=KEY_CONTENDERS,
        ),
        replace(
            _CLINC,
            name="clinc_half",
            title=f"{_CLINC.title}, half of the sites in each",
            settings=(*_CLINC.settings, "federation.fraction=0.5"),
            contenders=KEY_CONTENDERS,
        ),
        replace(
            _CLINC,
            name="clinc_unequal",
            title="CLINC150 domains, 10 sites of which one holds half of 1,000 examples, 15 rounds",
            settings=(*_TRAINING, *_BY_GROUP, "data.max_length=40"),
            rows=MAKERS["clinc_unequal"],
            contenders=(*KEY_CONTENDERS, *WEIGHTED, "fc_moe_plus_mean"),
        ),
        replace(
            _CLINC,
            name="clinc_32_experts",
            title=f"{_CLINC.title}, 32 experts, one a token",
            base=SPARSE_BASE,
            contenders=(*KEY_CONTENDERS, *WEIGHTED),
        ),
        Workload(
            "banking",
            "BANKING77 by topic, 10 sites, Dirichlet 0.1, 1,000 examples, 15 rounds",
            15,
            (*_TRAINING, *_dirichlet(0.1), "data.max_length=40"),
            tuple(dict.fromkeys(BANKING_WORDS.values())),
            MAKERS["banking"],
            contenders=(*ABLATED, *OTHER_VALUES, "fedprox", "fedadam", "scaffold", "fedmoe"),
        ),
        _ag_news_workload("ag_news", 0.1, (*ABLATED, "fedmoe", "pfl_moe")),
        _ag_news_workload("ag_news_0.5", 0.5),
        _ag_news_workload("ag_news_1.0", 1.0),
        Workload(
            "mcq",
            "MMLU, 10 sites, Dirichlet 0.1 over subjects, 1,000 examples, 15 rounds",
            15,
            (*_TRAINING, *_dirichlet(0.1), "data.max_length=96"),
            LETTERS,
            MAKERS["mcq"],
            contenders=ABLATED,
        ),
        Workload(
            "dolly",
            "Dolly by category, 8 sites, 1,200 examples, 15 rounds",
            15,
            (*_TRAINING, *_BY_GROUP, "data.max_length=96", *_ANSWERS),
            rows=MAKERS["dolly"],
        ),
        Workload(
            "dolly_published",
            "Dolly as FedIT divides it, 10 sites, 1,200 examples, 15 rounds",
            15,
            (*_TRAINING, *_BY_GROUP, "data.max_length=96", *_ANSWERS),
            rows=MAKERS["dolly_published"],
        ),
        Workload(
            "embedded",
            "the embedded default, 4 sites, 1,200 examples, 10 rounds",
            10,
            _TRAINING,
        ),
        Workload(
            "clinc_smollm2",
            "CLINC150 domains, SmolLM2-135M as experts, 10 sites, Dirichlet 0.1, 1,000 examples, 15 rounds",
            15,
            ("train.batch_size=16", *_dirichlet(0.1), "data.max_length=96"),
            tuple(CLINC_WORDS.values()),
            MAKERS["clinc"],
            model=_SMOLLM2,
        ),
        # Sized for a processor: a step of it takes seconds there.
        Workload(
            "clinc_smollm2_short",
            "CLINC150 domains, SmolLM2-135M as experts, 10 sites, Dirichlet 0.1, 6 rounds of 2 steps with 8 examples",
            6,
            ("train.batch_size=8", "train.max_steps=2", "train.num_threads=1", *_dirichlet(0.1), "data.max_length=40"),
            tuple(CLINC_WORDS.values()),
            MAKERS["clinc_few"],
            model=("model=smollm2_moe", "data.template=plain"),
        ),
        Workload(
            "dolly_smollm2",
            "Dolly as FedIT divides it, SmolLM2-135M as experts, 10 sites, 1,200 examples, 10 rounds",
            10,
            ("train.batch_size=16", *_BY_GROUP, "data.max_length=384", *_ANSWERS),
            rows=MAKERS["dolly_published"],
            model=_SMOLLM2,
        ),
    )
}
