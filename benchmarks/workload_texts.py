"""Texts of a seed for each workload of FC-MoE's benchmark: in splits, with the label and what sites differ in.

How a workload's texts are made is part of its version: whoever changes the source of a function that makes them makes
another workload, whose runs are all to be done.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.word_base import WORD, table
from conf.seeds import generator_for

Rows = dict[str, list[dict[str, str]]]
"""Split -> rows."""
Maker = Callable[[Path, int], Rows]
"""From the folder of data sets and a seed to the rows."""


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


MAKERS: dict[str, Maker] = {
    "clinc": _clinc,
    "clinc_few": _clinc_few,
    "clinc_unequal": _clinc_unequal,
    "banking": _banking,
    "ag_news": _ag_news,
    "mcq": _mcq,
    "dolly": _dolly,
    "dolly_published": _dolly_published,
}


def sources(maker: Maker | None) -> list[str]:
    """What rows are made by, as source: the maker, if there is one, and what it is made with."""
    functions = [maker, _drawn, cut, *(part for part in (in_roles, _sampled, _clinc) if _uses(maker, part))]
    return [inspect.getsource(function) for function in functions if function is not None]


def _uses(maker: Maker | None, part: Callable[..., Rows] | Draw) -> bool:
    return maker is not None and part.__name__ in maker.__code__.co_names
