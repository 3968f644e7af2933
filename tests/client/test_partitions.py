"""Partitions: each row at one site, as skewed as asked, the same every time."""

import logging
import warnings

import numpy as np
import pytest

from client.partitions import assign_rows
from conf.partitions import Dirichlet, Files, Iid, Natural, Pathological, Shard

VALUES = [("red", "green", "blue", "grey")[index // 50] for index in range(200)]
"""Sorted, as files often are."""

PARTITIONS = [Iid(), Dirichlet(), Pathological(), Shard(), Natural()]


def shares(assigned):
    """Site -> share of each value among its rows, (num_sites, 4)."""
    counts = np.array(
        [[sum(VALUES[row] == value for row in rows) for value in set(VALUES)] for rows in assigned.values()]
    )
    return counts / counts.sum(axis=1, keepdims=True)


def skew(assigned):
    """Mean total variation distance between a site's mix of values and the whole's: 0 (alike) to 3/4 (one each)."""
    return float(np.abs(shares(assigned) - 0.25).sum(axis=1).mean() / 2)


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda partition: partition.name)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_row_is_at_exactly_one_site(partition, seed):
    assigned = assign_rows(len(VALUES), VALUES, partition, seed)
    assert sorted(row for rows in assigned.values() for row in rows) == list(range(len(VALUES)))
    assert list(assigned) == sorted(assigned)
    assert all(rows == sorted(rows) for rows in assigned.values())


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda partition: partition.name)
def test_partition_depends_on_the_seed_alone(partition):
    assert assign_rows(200, VALUES, partition, 3) == assign_rows(200, VALUES, partition, 3)
    changed = assign_rows(200, VALUES, partition, 3) != assign_rows(200, VALUES, partition, 4)
    assert changed == (partition.name != "natural")


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda partition: partition.name)
def test_partitioning_prints_nothing(partition, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign_rows(len(VALUES), VALUES, partition, 0)
    assert capfd.readouterr() == ("", "")


def test_natural_sites_are_the_values():
    assigned = assign_rows(len(VALUES), VALUES, Natural(), 0)
    assert {site: {VALUES[row] for row in rows} for site, rows in assigned.items()} == {v: {v} for v in set(VALUES)}


def test_iid_sites_are_equally_large_and_mixed_although_the_rows_are_sorted():
    assigned = assign_rows(len(VALUES), None, Iid(num_sites=4), 0)
    assert [len(rows) for rows in assigned.values()] == [50] * 4
    assert skew(assigned) < 0.2


def test_dirichlet_skew_grows_as_alpha_shrinks():
    means = [
        np.mean([skew(assign_rows(200, VALUES, Dirichlet(alpha=alpha, min_examples=2), seed)) for seed in range(12)])
        for alpha in (100.0, 1.0, 0.1)
    ]
    assert means[0] < 0.1 < means[1] < means[2]


@pytest.mark.parametrize("seed", range(10))
def test_dirichlet_holds_its_smallest_site_even_where_few_draws_do(seed):
    """Four values at six sites with alpha = 0.1: the eleven draws of flwr-datasets fail for 27 of its seeds 0 to 59."""
    assigned = assign_rows(len(VALUES), VALUES, Dirichlet(num_sites=6, alpha=0.1, min_examples=10), seed)
    assert min(map(len, assigned.values())) >= 10


def test_pathological_sites_see_just_their_number_of_values_and_all_values_are_used():
    assigned = assign_rows(len(VALUES), VALUES, Pathological(num_sites=4, classes_per_site=2), 1)
    assert [int((site > 0).sum()) for site in shares(assigned)] == [2] * 4


def test_shards_cut_the_sorted_rows():
    """8 shards of 25 rows, each within one value of 50: a site of two shards sees at most two values."""
    assigned = assign_rows(len(VALUES), VALUES, Shard(num_sites=4, shards_per_site=2), 1)
    assert [len(rows) for rows in assigned.values()] == [50] * 4
    assert max(int((site > 0).sum()) for site in shares(assigned)) <= 2


def test_rows_that_no_site_gets_are_counted_in_the_log(caplog):
    """203 rows in 8 shards of 25 leave 3."""
    with caplog.at_level(logging.WARNING):
        assign_rows(203, [*VALUES, "red", "red", "red"], Shard(), 0)
    assert "partition=shard leaves 3 of 203 rows unused" in caplog.text


def test_names_of_many_sites_sort_like_their_numbers():
    names = list(assign_rows(240, None, Iid(num_sites=120), 0))
    assert (names[0], names[9], names[119]) == ("site-000", "site-009", "site-119")
    assert list(assign_rows(200, None, Iid(num_sites=3), 0)) == ["site-00", "site-01", "site-02"]


@pytest.mark.parametrize(
    ("num_rows", "partition", "message"),
    [
        (7, Iid(num_sites=4), r"partition\.num_sites=4 needs at least 8 rows .* there are 7"),
        (39, Dirichlet(num_sites=4, min_examples=10), r"partition\.num_sites=4 needs at least 40 rows .* there are 39"),
        (20, Shard(num_sites=4, shards_per_site=6), r"partition\.shards_per_site=6 makes 24 shards, .* 20 rows"),
        (200, Pathological(classes_per_site=5), r"partition\.classes_per_site=5 must be at most .* which is 4"),
        (200, Pathological(num_sites=60, classes_per_site=4), r"partition=pathological of 200 rows is not possible"),
        (200, Dirichlet(num_sites=20, alpha=0.001), r"partition\.num_sites=20 .* partition\.alpha=0\.001"),
        (200, Files(), r"partition=files is not a way"),
    ],
)
def test_impossible_partitions_are_refused_naming_setting_and_numbers(num_rows, partition, message):
    with pytest.raises(ValueError, match=message):
        assign_rows(num_rows, VALUES[:num_rows], partition, 0)


def test_site_with_one_row_is_refused_by_name():
    with pytest.raises(ValueError, match=r"partition=natural leaves .* \{'violet': 1\}.*data\.filter"):
        assign_rows(201, [*VALUES, "violet"], Natural(), 0)
