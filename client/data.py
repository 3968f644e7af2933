"""A site's examples: load them, find out which are whose, hold some out."""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets

from client.embedded import embedded_rows
from client.site_names import MIN_ROWS, check_site_name, site_names_from
from client.tables import READERS, Table, read_table
from client.templates import Example
from conf.partitions import Dirichlet, Files, Natural, Pathological, Shard
from conf.schema import Config, DataConfig
from conf.seeds import generator_for

logger = logging.getLogger(__name__)

NUM_EMBEDDED_EXAMPLES = 1200
"""Rows of the embedded default that are generated unless ``data.num_examples`` says otherwise."""


@dataclass(frozen=True)
class SiteData:
    """One site's examples, each part in the order of a seeded shuffle."""

    site: str
    train: list[Example]
    held_out: list[Example]


@dataclass(frozen=True)
class _Row:
    """One usable row."""

    example: Example
    owner: str
    """Value of the partition's column; empty without one."""
    split: str
    """Value of ``data.split_column``; empty without one."""


_loaded: dict[str, dict[str, SiteData]] = {}
"""The sites loaded last, under the settings that decide on them."""


CENTRALISED = "centralised"
"""Name of the one site of a centralised run."""


def site_names(config: Config) -> list[str]:
    """Names of the simulated sites of this run, sorted.

    Raises:
        ValueError: As ``simulated_sites``.
    """
    return [CENTRALISED] if config.strategy.name == CENTRALISED else list(simulated_sites(config))


def simulated_sites(config: Config) -> dict[str, SiteData]:
    """Every site's examples, sorted by name. Loaded once for all virtual clients of a process.

    Raises:
        ValueError: If the data cannot be loaded, lack a column, or cannot be divided as asked. The
            message names the setting to change.
    """
    deciding = [
        dataclasses.asdict(config.data),
        config.partition.name,
        dataclasses.asdict(config.partition),
        config.seed,
    ]
    key = json.dumps(deciding, sort_keys=True, default=str)
    if key not in _loaded:
        sites = _sites_of_files(config) if isinstance(config.partition, Files) else _sites_of_one_source(config)
        _loaded.clear()
        _loaded[key] = sites
    return dict(_loaded[key])


def label_counts(config: Config) -> dict[str, dict[str, int]]:
    """Site -> value of the partition's column -> rows of it; without such a column there are no values.

    Raises:
        ValueError: As ``simulated_sites``.
    """
    if isinstance(config.partition, Files):
        return {}
    rows = _assigned_rows(config)
    return {site: dict(Counter(row.owner for row in own if row.owner)) for site, own in rows.items()}


def own_site(config: Config, site: str, path: str) -> SiteData:
    """The examples of a real site in its own file.

    They are those that the simulation with ``partition=files`` gives to the site of this name: the split depends on
    the seed, the site's name and its rows alone.

    Raises:
        ValueError: As ``simulated_sites``, or if the site's name is not safe as a file name.
    """
    check_site_name(site, "site")
    rows = _limited(_usable_rows(read_table(Path(path).expanduser(), "data"), path, config.data, None), config, site)
    if len(rows) < MIN_ROWS:
        raise ValueError(f"site {site!r} needs at least {MIN_ROWS} usable rows, but {path} has {len(rows)}")
    return _split(site, rows, config)


def held_out_file(config: Config, path: str, setting: str = "eval.path") -> list[Example]:
    """All examples of a file that ``setting`` names, in its order; neither ``data.filter`` nor a split applies.

    Raises:
        ValueError: If it cannot be read, lacks a column, or has no usable row.
    """
    every_row = dataclasses.replace(config.data, filter={}, split_column=None)
    table = read_table(Path(path).expanduser(), setting)
    return [row.example for row in _usable_rows(table, path, every_row, None)]


def _sites_of_files(config: Config) -> dict[str, SiteData]:
    files = _site_files(config.data.path)
    return {site: own_site(config, site, str(files[site])) for site in sorted(files)}


def _site_files(path: str | None) -> dict[str, Path]:
    """Site -> its file, in a folder or among the matches of a glob.

    Raises:
        ValueError: If there is none, or if two files would name the same site.
    """
    if path is None:
        raise ValueError("partition=files needs data.path: a folder or a glob of files, one a site")
    place = Path(path).expanduser()
    # pathlib's glob takes no absolute pattern.
    found = place.iterdir() if place.is_dir() else map(Path, glob.glob(str(place)))  # noqa: PTH207
    files = sorted(file for file in found if file.suffix.lower() in READERS and not file.name.startswith("."))
    if not files:
        raise ValueError(f"data.path={path} holds no file that ends in one of {sorted(READERS)}")
    stems = [file.stem for file in files]
    repeated = {stem for stem in stems if stems.count(stem) > 1}
    if repeated:
        raise ValueError(f"data.path={path}: several files would name the same site: {sorted(repeated)}")
    names = site_names_from(stems, "data.path")
    return {names[file.stem]: file for file in files}


def _sites_of_one_source(config: Config) -> dict[str, SiteData]:
    return {site: _split(site, rows, config) for site, rows in _assigned_rows(config).items()}


def _assigned_rows(config: Config) -> dict[str, list[_Row]]:
    """Site -> its rows of the one table that the partition divides."""
    data = config.data
    origin = "the embedded data" if data.path is None else data.path
    table = _source(data, config.seed)
    column = _partition_column(config, table.column_names)
    rows = _limited(_usable_rows(table, origin, data, column), config)
    values = None if column is None else [row.owner for row in rows]
    if column is not None and "" in (values or ()):
        raise ValueError(f"partition.column={column!r} is empty in some rows of {origin}: choose rows with data.filter")
    from client.partitions import assign_rows  # noqa: PLC0415 - takes seconds to import, and a real site needs none

    assigned = assign_rows(len(rows), values, config.partition, config.seed)
    return {site: [rows[index] for index in indices] for site, indices in assigned.items()}


def _source(data: DataConfig, seed: int) -> Table:
    """The rows that ``data.path`` names: a file's, a hub data set's training split, or the embedded default."""
    if data.path is None:
        return Table.of_rows(embedded_rows(data.num_examples or NUM_EMBEDDED_EXAMPLES, seed))
    place = Path(data.path).expanduser()
    if place.is_dir() or glob.has_magic(data.path):
        raise ValueError(f"data.path={data.path} names several files: set partition=files, or name one of them")
    if place.is_file() or place.suffix.lower() in READERS:
        return read_table(place, "data.path")
    datasets.disable_progress_bars()
    try:
        return Table.of_arrow(datasets.load_dataset(data.path, split="train").with_format("arrow")[:])
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data.path={data.path} is no file here, and could not be loaded from the hub: {error}"
        ) from error


def _partition_column(config: Config, columns: Sequence[str]) -> str | None:
    """The column that the partition goes by; None for a partition without one."""
    if not isinstance(config.partition, Dirichlet | Pathological | Shard | Natural):
        return None
    if config.partition.column is not None:
        return config.partition.column
    if config.data.path is None:
        return "domain"
    raise ValueError(f"partition={config.partition.name} needs partition.column, one of {sorted(columns)}")


def _usable_rows(table: Table, origin: str, data: DataConfig, column: str | None) -> list[_Row]:
    """Rows that match ``data.filter`` and have a response, as text.

    Raises:
        ValueError: If a column is missing or holds what is no text, if no row matches the filter, or if none has a
            response.
    """
    _check_columns(table.column_names, origin, data, column)
    named = {name: setting for setting, name in _named_columns(data, column).items() if name is not None}
    texts = {name: table.texts(name, f"{setting}={name!r} of {origin}") for name, setting in named.items()}
    empty = [""] * len(table)
    wanted = {name: _as_strings(values) for name, values in data.filter.items()}
    chosen = [row for row in range(len(table)) if all(texts[name][row] in values for name, values in wanted.items())]
    if data.filter and not chosen:
        raise ValueError(f"data.filter={data.filter} matches none of {len(table)} rows of {origin}")
    optional = (data.context_column, data.rejected_column, data.objective_column, data.split_column, column)
    contexts, rejected, objectives, splits, owners = (empty if name is None else texts[name] for name in optional)
    prompts, responses = texts[data.prompt_column], texts[data.response_column]
    rows = [
        _Row(
            Example(prompts[row], contexts[row], responses[row], rejected[row], objectives[row]),
            owners[row],
            splits[row],
        )
        for row in chosen
        if responses[row].strip()
    ]
    if not rows:
        raise ValueError(f"data.response_column={data.response_column!r} is empty in every row of {origin}")
    _report_incomplete(rows, len(chosen), origin)
    return rows


def _report_incomplete(rows: Sequence[_Row], num_chosen: int, origin: str) -> None:
    """Log how many rows were dropped, and how many are used though nothing was asked."""
    if len(rows) < num_chosen:
        logger.warning("%s: %d of %d rows dropped: no response", origin, num_chosen - len(rows), num_chosen)
    num_unasked = sum(not row.example.prompt.strip() for row in rows)
    if num_unasked:
        logger.warning("%s: %d of %d rows used without a prompt: it is empty", origin, num_unasked, len(rows))


def _named_columns(data: DataConfig, column: str | None) -> dict[str, str | None]:
    """Setting -> the column it names."""
    return {
        "data.prompt_column": data.prompt_column,
        "data.context_column": data.context_column,
        "data.response_column": data.response_column,
        "data.rejected_column": data.rejected_column,
        "data.objective_column": data.objective_column,
        "data.split_column": data.split_column,
        "partition.column": column,
        **{f"data.filter.{name}": name for name in data.filter},
    }


def _check_columns(present: Sequence[str], origin: str, data: DataConfig, column: str | None) -> None:
    for setting, name in _named_columns(data, column).items():
        if name is not None and name not in present:
            hint = "; set data.context_column=null if there is none" if setting == "data.context_column" else ""
            raise ValueError(f"{setting}={name!r} is not a column of {origin}; it has {sorted(present)}{hint}")


def _as_strings(values: object) -> set[str]:
    return set(map(str, values)) if isinstance(values, list | tuple) else {str(values)}


def _limited(rows: list[_Row], config: Config, *purpose: str) -> list[_Row]:
    """At most ``data.num_examples`` of the rows, drawn at random and left in their order."""
    limit = config.data.num_examples
    if limit is None or limit >= len(rows):
        return rows
    drawn = generator_for(config.seed, "examples", *purpose).permutation(len(rows))[:limit]
    return [rows[index] for index in sorted(drawn)]


def _split(site: str, rows: Sequence[_Row], config: Config) -> SiteData:
    """At least one row on each side; rows of any other value of ``data.split_column`` are not used."""
    data = config.data
    shuffled = [rows[index] for index in generator_for(config.seed, "split", site).permutation(len(rows))]
    if data.split_column is None:
        num_held_out = min(max(1, round(len(rows) * data.held_out_fraction)), len(rows) - 1)
        train, held_out = shuffled[num_held_out:], shuffled[:num_held_out]
    else:
        train = [row for row in shuffled if row.split == data.train_split]
        held_out = [row for row in shuffled if row.split == data.held_out_split]
        if not train or not held_out:
            raise ValueError(
                f"data.split_column={data.split_column!r}: site {site!r} has {len(train)} rows of data.train_split="
                f"{data.train_split!r} and {len(held_out)} of data.held_out_split={data.held_out_split!r}; "
                f"its values are {sorted({row.split for row in rows})[:10]}"
            )
    return SiteData(site, [row.example for row in train], [row.example for row in held_out])
