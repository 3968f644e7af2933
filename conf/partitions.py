"""Settings of how data are divided over simulated sites: one class for each choice of ``partition=``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from strategies.base import require


@dataclass(kw_only=True)
class PartitionConfig:
    """How one data set becomes the sites' data in simulation."""

    name: ClassVar[str]


@dataclass(kw_only=True)
class _CountedPartition(PartitionConfig):
    num_sites: int = 4
    """Number of sites, named site-00, site-01, ..."""

    def __post_init__(self) -> None:
        require(self.num_sites >= 1, "partition.num_sites", ">= 1", self.num_sites)


@dataclass(kw_only=True)
class Iid(_CountedPartition):
    """Rows dealt out at random."""

    name: ClassVar[str] = "iid"


@dataclass(kw_only=True)
class Dirichlet(_CountedPartition):
    """Each value of a column is split over the sites by a draw from Dirichlet(alpha)."""

    name: ClassVar[str] = "dirichlet"
    column: str | None = None
    """Column of labels or domains; null: the embedded data's ``domain``."""
    alpha: float = 0.5
    """Concentration; smaller is more skewed."""
    min_examples: int = 10
    """Smallest number of rows a site may get; draws are repeated until it holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0 and math.isfinite(self.alpha), "partition.alpha", "> 0", self.alpha)
        require(self.min_examples >= 2, "partition.min_examples", ">= 2", self.min_examples)


@dataclass(kw_only=True)
class Pathological(_CountedPartition):
    """Each site sees only a few values of a column."""

    name: ClassVar[str] = "pathological"
    column: str | None = None
    classes_per_site: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.classes_per_site >= 1, "partition.classes_per_site", ">= 1", self.classes_per_site)


@dataclass(kw_only=True)
class Shard(_CountedPartition):
    """Rows sorted by a column and cut into shards, a few to each site."""

    name: ClassVar[str] = "shard"
    column: str | None = None
    shards_per_site: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.shards_per_site >= 1, "partition.shards_per_site", ">= 1", self.shards_per_site)


@dataclass(kw_only=True)
class Natural(PartitionConfig):
    """One site for each value of a column, which names it and sets the number of sites."""

    name: ClassVar[str] = "natural"
    column: str | None = None
    """Column of owners or domains; null: the embedded data's ``domain``."""


@dataclass(kw_only=True)
class Files(PartitionConfig):
    """One site for each file of ``data.path`` (a folder or a glob), named after the file's stem."""

    name: ClassVar[str] = "files"
