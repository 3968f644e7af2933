"""The seeds of FC-MoE's tables: the command without any makes the tables that are stored."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks.fc_moe import compared, stored, study_of
from benchmarks.fc_moe_seeds import table_seeds
from benchmarks.render import HERE
from benchmarks.workloads import WORKLOADS

TABLES = sorted((HERE / "results").glob("fc_moe_*.json"))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_test_that_a_table_shows_is_one_of_the_commands(path):
    """Of contenders as they stand; of values that were overtaken there is no more to run."""
    written = json.loads(path.read_text())
    of = written["workload"], written["experts"]
    known = stored(*of, None, written["tuning_seeds"])
    known_tests = {name: known.tested(name) for name in known.contenders}
    shown = {(result.settings, seed) for result in known_tests.values() for seed in result.rows}
    few, more = table_seeds(*of)
    made = {(result.settings, seed) for name, result in known_tests.items() for seed in [*few, *more.get(name, ())]}
    assert shown <= made
    assert known.all_seeds() == written["seeds"]


def test_who_is_tested_with_more_is_run_with_all_of_them():
    """On BANKING77 FedAvg with twenty, a site alone with five; of a large model three."""
    study = study_of("banking", "lora", None, [])
    assert [cell.seed for cell in study.needed("fedavg")] == list(range(20))
    assert [cell.seed for cell in study.needed("local_only")] == list(range(5))
    assert study.all_seeds() == list(range(20))
    assert [cell.seed for cell in study_of("clinc_smollm2", "lora", None, []).needed("fedavg")] == [0, 1, 2]


@pytest.mark.parametrize("of", itertools.product(WORKLOADS, ("lora", "full")), ids="_".join)
def test_who_is_tested_with_more_is_compared_there(of):
    _, more = table_seeds(*of)
    assert more.keys() <= {*compared(*of)}


def test_seeds_that_are_asked_for_are_all():
    assert [cell.seed for cell in study_of("banking", "lora", [3], []).needed("fedavg")] == [3]
