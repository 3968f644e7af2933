"""Texts of the workloads of FC-MoE's benchmark: who holds them, and what is kept apart."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from benchmarks import workload_texts
from benchmarks.workload_texts import CLINC_WORDS, MAKERS, Rows, _drawn, in_roles, sources


def test_one_of_ten_sites_holds_half_of_the_same_texts(tmp_path, monkeypatch):
    found: Rows = {"train": [], "validation": [], "test": []}
    for index in range(2000):
        label = sorted(CLINC_WORDS.values())[index % 10]
        found[("train", "train", "validation", "test")[index // 500]].append({"text": f"{index}", "label": label})
    monkeypatch.setattr(workload_texts, "_clinc", lambda _data, _seed: found)
    drawn = [MAKERS["clinc_unequal"](tmp_path, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for split, rows in drawn[0].items():
        assert sorted(row["text"] for row in rows) == sorted(row["text"] for row in found[split])
        sites = Counter(row["group"] for row in rows)
        assert len(sites) == 10
        assert sites.most_common(1)[0] == ("site-00", pytest.approx(len(rows) / 2, rel=0.12))
        shares = [
            {key: count / total for key, count in Counter((row["group"], row["label"]) for row in part).items()}
            for part, total in ((rows, len(rows)), (drawn[0]["train"], 1000))
        ]
        assert shares[0] == pytest.approx({key: shares[1].get(key, 0) for key in shares[0]}, abs=0.003)
    everywhere = Counter(row["group"] for rows in drawn[0].values() for row in rows)
    assert min(everywhere.values()) >= 39


def test_what_is_tuned_on_is_never_tested_on():
    """Over seeds, and over rows that say the same; each seed still draws its own."""
    rows = [{"text": f"text {index // 2}", "label": "", "group": str(index % 3)} for index in range(800)]
    sizes = {"train": 60, "validation": 30, "test": 30}
    found = {seed: in_roles(rows, sizes, seed, _drawn) for seed in (0, 1)}
    texts = {(seed, split): {row["text"] for row in found[seed][split]} for seed in found for split in sizes}
    assert [{split: len(rows) for split, rows in splits.items()} for splits in found.values()] == [sizes, sizes]
    for split, other in itertools.permutations(sizes, 2):
        assert not (texts[0, split] | texts[1, split]) & (texts[0, other] | texts[1, other])
    assert all(texts[0, split] != texts[1, split] for split in sizes)


def test_sources_are_those_of_what_makes_the_texts():
    """Each maker's own, those of the draws that all share, and of what else it calls."""
    shared = ["def _drawn(", "def cut("]
    used = {
        "clinc": [], "clinc_few": ["def _clinc("], "clinc_unequal": ["def _clinc("], "banking": [],
        "ag_news": ["def in_roles("], "mcq": ["def in_roles("], "dolly": ["def in_roles("],
        "dolly_published": ["def in_roles(", "def _sampled("],
    }  # fmt: skip
    assert used.keys() == MAKERS.keys()
    for name, parts in used.items():
        expected = [f"def _{name}(", *shared, *parts]
        assert [source[: len(start)] for source, start in zip(sources(MAKERS[name]), expected, strict=True)] == expected
    assert [source.partition("(")[0] for source in sources(None)] == ["def _drawn", "def cut"]
