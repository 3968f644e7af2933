"""Tables out of files: values as they are written, whatever other rows hold."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

_JSON_SPACE = re.compile(r"[ \t\n\r]*")
_NO_TEXTS: dict[type, str] = {list: "a list", dict: "a struct", bytes: "bytes"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Table:
    """Rows under named columns."""

    columns: Mapping[str, list[Any] | pa.ChunkedArray]
    """Name -> a value for each row; None where a row has none."""

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Table:
        """The table of rows that need not all have the same columns."""
        names = dict.fromkeys(name for row in rows for name in row)
        return cls({name: [row.get(name) for row in rows] for name in names})

    @classmethod
    def of_arrow(cls, table: pa.Table) -> Table:
        """The same table; a column becomes Python's values when it is used."""
        return cls(dict(zip(table.column_names, table.columns, strict=True)))

    @property
    def column_names(self) -> list[str]:
        """Their names, in the order of the file."""
        return list(self.columns)

    def values(self, name: str) -> list[Any]:
        """The values of a column."""
        column = self.columns[name]
        return column if isinstance(column, list) else list(column.to_pylist())

    def texts(self, name: str, place: str) -> list[str]:
        """The values of a column as text; empty where one is missing or not a number.

        Raises:
            ValueError: Starting with ``place`` and naming the row, counted from 0, if a value is a list, a struct or
                bytes, or holds half a character.
        """
        found = []
        for row, value in enumerate(self.values(name)):
            try:
                found.append(_text(value))
            except ValueError as error:
                raise ValueError(f"{place}: row {row} {error}") from error
        return found

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for values in zip(*map(self.values, self.columns), strict=True):
            yield dict(zip(self.columns, values, strict=True))


def read_table(path: Path, setting: str) -> Table:
    """A table, held in memory.

    Raises:
        ValueError: Naming ``setting``, if there is no such file, if it is not what its suffix says, or if it has no
            row.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise ValueError(f"{setting}={path} must end in one of {sorted(READERS)}")
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{setting}={path}: {'the file is empty' if path.is_file() else 'there is no such file'}")
    try:
        table = read(path)
    except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
        raise ValueError(f"{setting}={path} could not be read as {path.suffix.lower()[1:]}: {error}") from error
    if not len(table):
        raise ValueError(f"{setting}={path} has no rows")
    return table


def _parquet_table(path: Path) -> Table:
    # parquet.read_table would make a column of a folder that is named "site=a".
    with parquet.ParquetFile(path) as file:
        return Table.of_arrow(file.read())


def _json_table(path: Path) -> Table:
    """The objects of a file, one after the other or in a list.

    pyarrow reads 2020-01-01 in quotes as a time, and a large integer as a float, if enough rows around it agree.
    """
    text = path.read_text(encoding="utf-8-sig")
    decoder = json.JSONDecoder(parse_float=str)
    rows: list[dict[str, Any]] = []
    start = _after_space(text, 0)
    while start < len(text):
        value, end = decoder.raw_decode(text, start)
        found = value if isinstance(value, list) else [value]
        wrong = sorted({type(row).__name__ for row in found if not isinstance(row, dict)})
        if wrong:
            line = text.count("\n", 0, start) + 1
            raise ValueError(f"line {line}: a row must be an object of columns and values, got {wrong}")
        rows += found
        start = _after_space(text, end)
    return Table.of_rows(rows)


def _after_space(text: str, start: int) -> int:
    space = _JSON_SPACE.match(text, start)
    assert space is not None
    return space.end()


def _csv_table(path: Path) -> Table:
    """Fields as they are written: pandas would read ``007`` as 7, ``None`` as missing, a field too many as an index."""
    records = _csv_records(path)
    _, header = next(records, (0, []))
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(f"its header names several columns {repeated}")
    rows = []
    for line, fields in records:
        if len(fields) != len(header):
            raise ValueError(
                f"line {line} has {len(fields)} fields, but the header names {len(header)} columns: a field with a "
                "comma in it needs quotes, and no comma may follow the last field"
            )
        rows.append(dict(zip(header, fields, strict=True)))
    return Table.of_rows(rows)


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line a record starts in, counted from 1, and its fields; blank lines are no records."""
    # The module's own limit, 131,072 characters, is less than some documents have.
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        line = 1
        try:
            for fields in reader:
                if len(fields) > 1 or "".join(fields).strip():
                    yield line, fields
                line = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"line {line}: {error}; a quote is left open there, or is not doubled within a quoted field"
            ) from error


READERS = {".parquet": _parquet_table, ".jsonl": _json_table, ".json": _json_table, ".csv": _csv_table}
"""Suffix of a file -> what reads it."""


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if type(value) in _NO_TEXTS:
        is_chat = isinstance(value, list) and any(isinstance(part, dict) for part in value)
        hint = "; of a chat, put what is asked and what is answered into columns of their own" if is_chat else ""
        raise ValueError(f"holds {_NO_TEXTS[type(value)]}, not text{hint}")
    text = str(value)
    if _LONE_SURROGATE.search(text):
        raise ValueError("holds half a character: a UTF-16 surrogate without its other half")
    return text
