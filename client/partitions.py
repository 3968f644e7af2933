"""Which row of a data set belongs to which simulated site, by the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence

import datasets
from flwr_datasets.partitioner import (
    DirichletPartitioner,
    IidPartitioner,
    NaturalIdPartitioner,
    Partitioner,
    PathologicalPartitioner,
    ShardPartitioner,
)

from client.site_names import MIN_ROWS, site_names_from
from conf.partitions import Dirichlet, Iid, Natural, PartitionConfig, Pathological, Shard
from conf.seeds import generator_for

logger = logging.getLogger(__name__)

MAX_DIRICHLET_SEEDS = 50
"""Seeds tried for a Dirichlet partition; flwr-datasets draws eleven times from each."""


def assign_rows(
    num_rows: int, values: Sequence[str] | None, partition: PartitionConfig, seed: int
) -> dict[str, list[int]]:
    """Site -> indices of its rows, both sorted; no row is at two sites.

    Args:
        num_rows: Rows to deal out.
        values: Each row's value of ``partition.column``; None for a partition without one.
        partition: Any kind but ``files``.
        seed: The run's seed. A natural partition does not depend on it.

    Raises:
        ValueError: If the partition is not possible with these rows, or leaves a site with fewer than two.
    """
    _check_enough_rows(num_rows, values, partition)
    if isinstance(partition, Natural):
        assert values is not None
        sites = _natural(values)
    else:
        sites = _drawn(num_rows, values, partition, seed)
    too_small = {site: len(rows) for site, rows in sites.items() if len(rows) < MIN_ROWS}
    if too_small:
        raise ValueError(
            f"partition={partition.name} leaves sites with fewer than {MIN_ROWS} of {num_rows} rows: "
            f"{dict(list(too_small.items())[:5])}; change the partition's settings, or leave them out with data.filter"
        )
    num_unused = num_rows - sum(map(len, sites.values()))
    if num_unused:
        logger.warning("partition=%s leaves %d of %d rows unused", partition.name, num_unused, num_rows)
    return dict(sorted(sites.items()))


def _check_enough_rows(num_rows: int, values: Sequence[str] | None, partition: PartitionConfig) -> None:
    """Raise ``ValueError`` for what flwr-datasets would refuse, in the words of our settings."""
    if isinstance(partition, Iid | Dirichlet | Pathological | Shard):
        per_site = partition.min_examples if isinstance(partition, Dirichlet) else MIN_ROWS
        if num_rows < partition.num_sites * per_site:
            raise ValueError(
                f"partition.num_sites={partition.num_sites} needs at least {partition.num_sites * per_site} rows "
                f"({per_site} a site), but there are {num_rows}"
            )
    if isinstance(partition, Shard) and num_rows < partition.num_sites * partition.shards_per_site:
        raise ValueError(
            f"partition.shards_per_site={partition.shards_per_site} makes "
            f"{partition.num_sites * partition.shards_per_site} shards, but there are only {num_rows} rows"
        )
    if isinstance(partition, Pathological):
        assert values is not None
        num_values = len(set(values))
        if partition.classes_per_site > num_values:
            raise ValueError(
                f"partition.classes_per_site={partition.classes_per_site} must be at most the number of values "
                f"of partition.column={partition.column}, which is {num_values}"
            )


def _natural(values: Sequence[str]) -> dict[str, list[int]]:
    partitioner = NaturalIdPartitioner(partition_by="value")
    partitioner.dataset = _rows(range(len(values)), values)
    # flwr-datasets draws a tqdm bar on the standard error that nothing switches off.
    with contextlib.redirect_stderr(io.StringIO()):
        parts = [sorted(partitioner.load_partition(part)["row"]) for part in range(partitioner.num_partitions)]
    names = site_names_from((values[rows[0]] for rows in parts), "partition.column")
    return {names[values[rows[0]]]: rows for rows in parts}


def _drawn(num_rows: int, values: Sequence[str] | None, partition: PartitionConfig, seed: int) -> dict[str, list[int]]:
    """Sites site-00, site-01, ... of a partition that is drawn at random."""
    generator = generator_for(seed, "partition")
    # flwr-datasets cuts the rows of a class, or all for iid, in the order it finds them: a sorted file would be skewed.
    dataset = _rows(generator.permutation(num_rows).tolist(), values)
    seeds = generator.integers(2**31, size=MAX_DIRICHLET_SEEDS).tolist()
    if isinstance(partition, Dirichlet):
        parts = _dirichlet(dataset, partition, seeds)
    else:
        try:
            parts = _parts(_partitioner(partition, seeds[0]), dataset)
        except ValueError as error:
            raise ValueError(f"partition={partition.name} of {num_rows} rows is not possible: {error}") from error
    width = max(2, len(str(len(parts) - 1)))
    return {f"site-{index:0{width}}": rows for index, rows in enumerate(parts)}


def _partitioner(partition: PartitionConfig, seed: int) -> Partitioner:
    match partition:
        case Iid():
            return IidPartitioner(num_partitions=partition.num_sites)
        case Pathological():
            return PathologicalPartitioner(
                num_partitions=partition.num_sites,
                partition_by="value",
                num_classes_per_partition=partition.classes_per_site,
                # As in the paper it follows: with enough sites, every class is at one of them.
                class_assignment_mode="first-deterministic",
                seed=seed,
            )
        case Shard():
            return ShardPartitioner(
                num_partitions=partition.num_sites,
                partition_by="value",
                num_shards_per_partition=partition.shards_per_site,
                seed=seed,
            )
    raise ValueError(f"partition={partition.name} is not a way to deal out rows")


def _dirichlet(dataset: datasets.Dataset, partition: Dirichlet, seeds: Sequence[int]) -> list[list[int]]:
    """The first draw that gives every site ``partition.min_examples`` rows.

    With few classes and a small alpha most draws leave some site without rows, and flwr-datasets gives up early.
    """
    for seed in seeds:
        partitioner = DirichletPartitioner(
            num_partitions=partition.num_sites,
            partition_by="value",
            alpha=partition.alpha,
            min_partition_size=partition.min_examples,
            seed=seed,
        )
        try:
            return _parts(partitioner, dataset)
        except ValueError as error:
            if "max number of attempts" not in str(error):
                raise
    raise ValueError(
        f"no Dirichlet draw gave each of partition.num_sites={partition.num_sites} sites "
        f"partition.min_examples={partition.min_examples} of {len(dataset)} rows at partition.alpha={partition.alpha}: "
        f"raise partition.alpha, or lower partition.min_examples or partition.num_sites"
    )


def _parts(partitioner: Partitioner, dataset: datasets.Dataset) -> list[list[int]]:
    """Each partition's rows.

    Raises:
        ValueError: As the partitioner does.
    """
    partitioner.dataset = dataset
    with warnings.catch_warnings():
        # Warnings of each repeated draw, of unused classes and from its libraries; we report the outcome.
        warnings.simplefilter("ignore")
        return [sorted(partitioner.load_partition(part)["row"]) for part in range(partitioner.num_partitions)]


def _rows(order: Sequence[int], values: Sequence[str] | None) -> datasets.Dataset:
    """The rows' numbers and values: all that a partitioner looks at."""
    columns: dict[str, list[int] | list[str]] = {"row": list(order)}
    if values is not None:
        columns["value"] = [values[row] for row in order]
    return datasets.Dataset.from_dict(columns)
