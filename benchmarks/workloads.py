"""What the benchmark of FC-MoE fine-tunes on: data of a seed, its division over sites, rounds, words that are scored.

A workload's data of a seed are a file with the columns text, label, group (what sites differ in) and split (train,
validation, test), so that ``bouquet run`` with the same settings does the same. Nothing is chosen by the test split.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from benchmarks.word_base import SPARSE_BASE, WORD, WORD_BASE, table, word_base_sha256
from client.bases import cache_root
from conf.compose import load_config
from conf.seeds import generator_for

Rows = dict[str, list[dict[str, str]]]
"""Split -> rows."""

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
AGREEMENTS = tuple(f"fc_moe_plus_as_shipped_agreement_{sites:g}" for sites in (0.3, 0.5, 2.0, 3.0))
"""FC-MoE plus with another agreement, where sites have much to learn from each other."""


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
    rows: Callable[[Path, int], Rows] | None = None
    """From the folder of data sets and a seed; None: the embedded default, new text with every seed."""
    base: Path = WORD_BASE
    """One of the base models of ``word_base``."""
    model: tuple[str, ...] = ()
    """Settings of another base model and its template."""
    contenders: tuple[str, ...] = KEY_CONTENDERS
    """Who is compared; empty: everyone."""

    @cached_property
    def version(self) -> str:
        """Changes with what the workload is made by: results of another version are not used."""
        functions = [self.rows, _drawn, cut, *(part for part in (in_roles, _sampled, _clinc) if self._uses(part))]
        made_by = [inspect.getsource(function) for function in functions if function is not None]
        settings = repr((self.rounds, self.settings, self.labels, self.model))
        return hashlib.sha256("".join([self._base(), *made_by, settings]).encode()).hexdigest()[:8]

    def _base(self) -> str:
        """What its base model is made of; the embedded default's is the project's own."""
        if self.model:
            return repr(load_config(self.model).model)
        return "" if self.rows is None else word_base_sha256(self.base)

    def _uses(self, part: Callable[..., Any]) -> bool:
        return self.rows is not None and part.__name__ in self.rows.__code__.co_names

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
        """This seed's data as this file makes them, written if the cache lacks them."""
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


def _drawn(rows: Sequence[dict[str, str]], count: int, seed: int, purpose: str) -> list[dict[str, str]]:
    """``count`` of the rows, the same number of each ``group`` as far as it goes."""
    order = generator_for(seed, "benchmark data", purpose).permutation(len(rows))
    by_group: dict[str, list[dict[str, str]]] = {}
    for index in order:
        by_group.setdefault(rows[index]["group"], []).append(rows[index])
    share = count // len(by_group)
    return [row for _, group in sorted(by_group.items()) for row in group[:share]]


def cut(rows: Sequence[dict[str, str]], sizes: Mapping[str, int], seed: int) -> Rows:
    """Disjoint splits of one pool of rows."""
    chosen = _drawn(rows, sum(sizes.values()), seed, "pool")
    order = generator_for(seed, "benchmark data", "cut").permutation(len(chosen))
    ends = np.cumsum(list(sizes.values()))
    parts = np.split(order, ends[:-1])
    return {split: [chosen[index] for index in part] for split, part in zip(sizes, parts, strict=True)}


Draw = Callable[[Sequence[dict[str, str]], int, int, str], list[dict[str, str]]]
"""Rows, how many of them, seed and purpose, to the chosen ones."""


def in_roles(rows: Sequence[dict[str, str]], sizes: Mapping[str, int], seed: int, draw: Draw) -> Rows:
    """Splits of one pool in which a text has the same role under every seed.

    So what one seed was tuned on is never what another is tested on: half of the texts are there to train on, a quarter
    to validate, a quarter to test.
    """
    roles = ("train", "train", "validation", "test")
    pools: Rows = {split: [] for split in sizes}
    for row in rows:
        pools[roles[hashlib.sha256(row["text"].encode()).digest()[0] % len(roles)]].append(row)
    return {split: draw(pools[split], count, seed, split) for split, count in sizes.items()}


def _sampled(rows: Sequence[dict[str, str]], count: int, seed: int, purpose: str) -> list[dict[str, str]]:
    """``count`` of the rows, whatever group they are of."""
    order = generator_for(seed, "benchmark data", purpose).permutation(len(rows))
    return [rows[index] for index in order[:count]]


CLINC_WORDS = {
    "auto_and_commute": "car",
    "banking": "bank",
    "credit_cards": "card",
    "home": "home",
    "kitchen_and_dining": "food",
    "meta": "language",
    "small_talk": "you",
    "travel": "travel",
    "utility": "time",
    "work": "work",
}
"""Domain of CLINC150 -> the common word that stands for it."""


def _clinc(data: Path, seed: int) -> Rows:
    found: Rows = {"train": [], "val": [], "test": []}
    for row in table(data, "intents_clinc_banking", "dataset", "split", "text", "domain"):
        if row["dataset"] == "clinc150" and row["domain"] != "oos":
            label = CLINC_WORDS[row["domain"]]
            found[row["split"]].append({"text": f"{WORD} {row['text']}", "label": label, "group": label})
    sizes = {"train": ("train", 1000), "validation": ("val", 500), "test": ("test", 500)}
    return {split: _drawn(found[name], count, seed, split) for split, (name, count) in sizes.items()}


def _clinc_few(data: Path, seed: int) -> Rows:
    """Those of ``_clinc``, and of what is judged on as many as a processor reads with a large model."""
    rows = _clinc(data, seed)
    judged = {split: _drawn(rows[split], count, seed, "few") for split, count in (("validation", 100), ("test", 200))}
    return {**rows, **judged}


def _clinc_unequal(data: Path, seed: int) -> Rows:
    """Those of ``_clinc`` at ten sites, of which the first holds half, give or take a twentieth.

    Each label is split over the sites by a draw from a Dirichlet distribution whose concentrations sum up to 1, as
    those of ten sites at 0.1, and are as the shares the sites are to hold; every site has forty texts. ``group`` is
    the site.
    """
    rows = _clinc(data, seed)
    generator = generator_for(seed, "benchmark data", "unequal sites")
    labels = sorted(CLINC_WORDS.values())
    total = sum(map(len, rows.values()))
    while True:
        share_LS = generator.dirichlet([1 / 2, *[1 / 18] * 9], size=len(labels))
        share_S = share_LS.mean(axis=0)
        if abs(share_S[0] - 1 / 2) <= 0.05 and share_S.min() * total >= 40:
            break
    found: Rows = {}
    for split, of_split in rows.items():
        found[split] = []
        for label, part_S in zip(labels, share_LS, strict=True):
            of_label = [row for row in of_split if row["label"] == label]
            ends = np.rint(np.cumsum(part_S) * len(of_label)).astype(int)
            for site, part in enumerate(np.split(np.arange(len(of_label)), ends[:-1])):
                found[split] += [{**of_label[index], "group": f"site-{site:02}"} for index in part]
    return found


BANKING_WORDS = {
    "top_up": "top",
    "topping_up": "top",
    "transfer": "transfer",
    "exchange": "exchange",
    "cash": "cash",
    "payment": "payment",
    "virtual": "virtual",
    "charge": "charge",
    "verify": "identity",
    "pin": "pin",
    "passcode": "pin",
    "card": "card",
}
"""What an intent's name holds -> the word of its topic; the first that fits. Intents that none fits are left out."""


def _banking(data: Path, seed: int) -> Rows:
    found: Rows = {"train": [], "test": []}
    for row in table(data, "intents_clinc_banking", "dataset", "split", "text", "intent"):
        topic = next((word for part, word in BANKING_WORDS.items() if part in row["intent"]), None)
        if row["dataset"] == "banking77" and topic:
            found[row["split"]].append({"text": f"{WORD} {row['text']}", "label": topic, "group": topic})
    rows = cut(found["train"], {"train": 1000, "validation": 500}, seed)
    return {**rows, "test": _drawn(found["test"], 500, seed, "test")}


AG_NEWS_WORDS = {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"}
"""Topic of AG News -> the word that stands for it."""


def _ag_news(data: Path, seed: int) -> Rows:
    rows = [
        {"text": f"{WORD} {row['title']} {row['text']}", "label": word, "group": word}
        for row in table(data, "agnews_test", "title", "text", "label")
        for word in (AG_NEWS_WORDS[row["label"]],)
    ]
    return in_roles(rows, {"train": 1000, "validation": 500, "test": 500}, seed, _drawn)


LETTERS = ("a", "b", "c", "d")


def _mcq(data: Path, seed: int) -> Rows:
    rows = []
    for row in table(data, "eval_mcq", "dataset", "split", "subject", "question", "choices", "answer"):
        if row["dataset"] == "mmlu" and row["split"] == "test":
            choices = " ".join(f"{letter}: {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
            answer = LETTERS[int(row["answer"])]
            rows.append({"text": f"{WORD} {row['question']} {choices}", "label": answer, "group": row["subject"]})
    return in_roles(rows, {"train": 1000, "validation": 500, "test": 500}, seed, _drawn)


def _dolly(data: Path, seed: int) -> Rows:
    # The question last: of a long prompt the beginning is cut.
    rows = [
        {"text": f"{row['context']} {row['instruction']}".strip(), "label": row["response"], "group": row["category"]}
        for row in table(data, "dolly15k", "instruction", "context", "response", "category")
    ]
    return in_roles(rows, {"train": 1200, "validation": 400, "test": 400}, seed, _drawn)


def _dolly_published(data: Path, seed: int) -> Rows:
    """FedIT's ten clients (https://arxiv.org/abs/2305.05644), each with the same share of its rows."""
    rows = [
        {
            "text": f"{row['context']} {row['instruction']}".strip(),
            "label": row["response"],
            "group": str(row["fedit_client"]),
        }
        for row in table(data, "dolly15k", "instruction", "context", "response", "fedit_client")
        if int(row["fedit_client"]) >= 0
    ]
    return in_roles(rows, {"train": 1200, "validation": 400, "test": 400}, seed, _sampled)


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
        _ag_news,
        contenders=contenders,
    )


_CLINC = Workload(
    "clinc",
    "CLINC150 domains, 10 sites, Dirichlet 0.1, 1,000 examples, 15 rounds",
    15,
    (*_TRAINING, *_dirichlet(0.1), "data.max_length=40"),
    tuple(CLINC_WORDS.values()),
    _clinc,
    contenders=(),
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
            rows=_clinc_unequal,
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
            _banking,
            contenders=(*ABLATED, *AGREEMENTS, "fedprox", "fedadam", "scaffold", "fedmoe"),
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
            _mcq,
            contenders=ABLATED,
        ),
        Workload(
            "dolly",
            "Dolly by category, 8 sites, 1,200 examples, 15 rounds",
            15,
            (*_TRAINING, *_BY_GROUP, "data.max_length=96", *_ANSWERS),
            rows=_dolly,
        ),
        Workload(
            "dolly_published",
            "Dolly as FedIT divides it, 10 sites, 1,200 examples, 15 rounds",
            15,
            (*_TRAINING, *_BY_GROUP, "data.max_length=96", *_ANSWERS),
            rows=_dolly_published,
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
            _clinc,
            model=_SMOLLM2,
        ),
        # Sized for a processor: a step of it takes seconds there.
        Workload(
            "clinc_smollm2_short",
            "CLINC150 domains, SmolLM2-135M as experts, 10 sites, Dirichlet 0.1, 6 rounds of 2 steps with 8 examples",
            6,
            ("train.batch_size=8", "train.max_steps=2", "train.num_threads=1", *_dirichlet(0.1), "data.max_length=40"),
            tuple(CLINC_WORDS.values()),
            _clinc_few,
            model=("model=smollm2_moe", "data.template=plain"),
        ),
        Workload(
            "dolly_smollm2",
            "Dolly as FedIT divides it, SmolLM2-135M as experts, 10 sites, 1,200 examples, 10 rounds",
            10,
            ("train.batch_size=16", *_BY_GROUP, "data.max_length=384", *_ANSWERS),
            rows=_dolly_published,
            model=_SMOLLM2,
        ),
    )
}
