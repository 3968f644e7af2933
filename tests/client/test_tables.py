"""Text comes out of real small files as it was written, and what is no text is refused."""

import csv
import json
import logging

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from client.data import held_out_file, simulated_sites
from client.tables import Table, read_table
from client.text import Example
from conf.partitions import Iid
from conf.schema import Config, DataConfig
from strategies.fedavg import FedAvg

LONG = "word " * 30_000
"""Longer than the csv module's own limit of 131,072 characters."""


def json_lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def read(tmp_path):
    def examples(name, content, **columns):
        path = tmp_path / name
        if isinstance(content, pa.Table):
            parquet.write_table(content, path)
        else:
            path.write_text(content, newline="")
        config = Config(strategy=FedAvg(), data=DataConfig(**{"context_column": None, **columns}))
        return held_out_file(config, str(path))

    return examples


def responses(examples):
    return [example.response for example in examples]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ("q1,yes, it is\nq2,a2\nq3,a3, too\nq4,a4, x\n", "line 2 has 3 fields, but the header names 2 columns"),
        ("q1,a1\nq2,a2, too\n", "line 3 has 3 fields, but the header names 2 columns"),
        ("q1,a1,\nq2,a2,\n", "line 2 has 3 fields.*no comma may follow the last field"),
        ("q1,a1\n\nq2\n", "line 4 has 1 fields, but the header names 2 columns"),
        ('q1,"a\n1"\nq2,a2,a2\n', "line 4 has 3 fields"),
        ('q1,a1\nq2,"a2\nq3,a3\n', "line 3: unexpected end of data; a quote is left open there"),
        ('q1,a1\nq2,"a" 2\n', "line 3: .* is not doubled within a quoted field"),
    ],
)
def test_csv_record_of_another_shape_than_the_header_is_refused_by_its_line(read, records, message):
    with pytest.raises(ValueError, match=rf"eval\.path=.*a\.csv could not be read as csv: {message}"):
        read("a.csv", "instruction,response\n" + records)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('instruction,"response', "line 1: unexpected end of data; a quote is left open there"),
        (f'instruction,"response{LONG}', "line 1: unexpected end of data; a quote is left open there"),
        ("instruction,response,response", r"its header names several columns \['response'\]"),
    ],
)
def test_csv_header_that_names_no_columns_is_refused(read, header, message):
    with pytest.raises(ValueError, match=rf"eval\.path=.*a\.csv could not be read as csv: {message}"):
        read("a.csv", header + "\nq1,a1\n")


def test_csv_keeps_quoted_commas_lines_and_quotes_and_fields_of_any_length(read):
    content = f'instruction,response\r\n"q, 1","a\r\n""1"""\r\n  \r\n\r\nq2, a 2 \r\nq3,{LONG}\r\n'
    found = read("a.csv", content)
    assert found == [Example("q, 1", "", 'a\r\n"1"'), Example("q2", "", " a 2 "), Example("q3", "", LONG)]


@pytest.mark.parametrize("rest", [[], ["hello"], [7], [None, 2.5]])
@pytest.mark.parametrize(
    "text", ["2020-01-01", "2020-01-01T00:00:00Z", "12:30", "007", "1.50", "true", "null", "nan", "None"]
)
def test_json_text_is_as_written_whatever_other_rows_hold(read, text, rest):
    rows = [{"instruction": "q", "response": response} for response in [text] * 3 + rest]
    for name, content in (("a.jsonl", json_lines(*rows)), ("a.json", json.dumps(rows, indent=1))):
        assert responses(read(name, content))[:3] == [text] * 3


def test_json_dates_may_be_followed_by_words_far_below(read):
    """pyarrow took the type of a column from the first 10 MiB."""
    rows = [{"instruction": "q" * 2000, "response": "2020-01-01"}] * 6000
    found = responses(read("a.jsonl", json_lines(*rows, {"instruction": "q", "response": "hello"})))
    assert found == ["2020-01-01"] * 6000 + ["hello"]


def test_json_numbers_are_as_written_too(read):
    written = ["123456789012345678901234", "1", "2.50", "1e5", '"word"']
    content = "".join(f'{{"instruction": "q", "response": {number}}}\n' for number in written)
    assert responses(read("a.jsonl", content)) == [number.strip('"') for number in written]


def test_filter_matches_a_date_as_it_is_written(tmp_path):
    rows = [{"instruction": "q", "response": day, "day": day} for day in ["2020-01-01"] * 3 + ["2020-01-02"] * 3]
    (tmp_path / "a.jsonl").write_text(json_lines(*rows))
    data = DataConfig(path=str(tmp_path / "a.jsonl"), context_column=None, filter={"day": "2020-01-01"})
    (site,) = simulated_sites(Config(strategy=FedAvg(), data=data, partition=Iid(num_sites=1))).values()
    assert {example.response for example in (*site.train, *site.held_out)} == {"2020-01-01"}


def test_json_objects_may_stand_in_a_list_or_span_lines_and_lack_columns(read):
    rows = [{"instruction": "q", "response": "a"}, {"response": "b"}]
    spread = "\ufeff" + "\n".join(json.dumps(row, indent=2) for row in rows)
    for content in (json.dumps(rows), json_lines(*rows), spread, spread.replace("\n", "\r\n")):
        assert read("a.jsonl", content) == [Example("q", "", "a"), Example("", "", "b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('\n"a"\n"b"\n', r"line 2: a row must be an object of columns and values, got \['str'\]"),
        ('{"response": "a"}\n3\n', r"line 2: a row must be an object .* got \['int'\]"),
        ('[{"response": "a"}, null, []]', r"line 1: a row must be an object .* got \['NoneType', 'list'\]"),
        ('{"response": "a"}\n{"response": b}\n', "Expecting value: line 2 column 14"),
    ],
)
def test_json_rows_that_are_no_objects_are_refused_by_their_line(read, content, message):
    with pytest.raises(ValueError, match=rf"eval\.path=.*a\.jsonl could not be read as jsonl: {message}"):
        read("a.jsonl", content)


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (CHAT, "holds a list, not text; of a chat, put what is asked and what is answered into columns of their own"),
        (["a"], "holds a list, not text$"),
        ({"a": 1}, "holds a struct, not text"),
        (b"a", "holds bytes, not text"),
    ],
)
def test_what_is_no_text_is_refused_by_setting_and_row(read, value, message):
    rows = [{"instruction": "q", "response": None}, {"instruction": "q", "response": value}]
    files = {"a.parquet": pa.Table.from_pylist(rows)}
    if not isinstance(value, bytes):
        files["a.jsonl"] = json_lines(*rows)
    for name, content in files.items():
        with pytest.raises(ValueError, match=rf"data\.response_column='response' of .*{name}: row 1 {message}"):
            read(name, content)


def test_half_a_character_is_refused(read):
    """A tokenizer would raise a TypeError."""
    with pytest.raises(ValueError, match="data.response_column='response' of .*: row 0 holds half a character"):
        read("a.jsonl", json_lines({"instruction": "q", "response": "\ud83d"}))
    assert responses(read("a.jsonl", json_lines({"instruction": "q", "response": "\U0001f600"}))) == ["\U0001f600"]


def test_not_a_number_is_missing(read, caplog):
    table = pa.table({"instruction": ["q", "q"], "response": [1.5, float("nan")]})
    for name, content in {"a.parquet": table, "a.jsonl": json_lines(*table.to_pylist())}.items():
        caplog.clear()
        assert responses(read(name, content)) == ["1.5"]
        assert "1 of 2 rows dropped: no response" in caplog.text


def test_rows_without_a_prompt_are_used_and_counted(read, caplog):
    rows = [{"response": "a"}, {"instruction": " ", "response": "b"}, {"instruction": "q", "response": "c"}]
    with caplog.at_level(logging.WARNING):
        assert responses(read("a.jsonl", json_lines(*rows))) == ["a", "b", "c"]
    assert "2 of 3 rows used without a prompt" in caplog.text
    caplog.clear()
    read("a.jsonl", json_lines(rows[2]))
    assert caplog.text == ""


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".json"])
def test_table_without_rows_is_refused(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    match suffix:
        case ".csv":
            path.write_text("instruction,response\n")
        case ".parquet":
            parquet.write_table(pa.table({"response": pa.array([], pa.string())}), path)
        case ".json":
            path.write_text("[]")
    with pytest.raises(ValueError, match=rf"eval\.path=.*a\{suffix} has no rows"):
        read_table(path, "eval.path")


def test_folder_of_a_parquet_file_adds_no_column(tmp_path):
    folder = tmp_path / "site=a"
    folder.mkdir()
    parquet.write_table(pa.table({"x": [1, 2], "y": [["a"], ["b", "c"]]}), folder / "a.parquet")
    table = read_table(folder / "a.parquet", "data.path")
    assert table.column_names == ["x", "y"]
    assert list(table) == [{"x": 1, "y": ["a"]}, {"x": 2, "y": ["b", "c"]}]


def test_table_of_rows_has_every_column_of_any_row():
    table = Table.of_rows([{"a": 1}, {"b": "x", "a": 2}])
    assert (len(table), table.column_names) == (2, ["a", "b"])
    assert list(table) == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


def test_hub_data_set_is_read_like_a_file(monkeypatch):
    rows = [{"instruction": f"q{number}", "response": f"a{number}"} for number in range(4)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    data = DataConfig(path="somebody/some-set", context_column=None)
    (site,) = simulated_sites(Config(strategy=FedAvg(), data=data, partition=Iid(num_sites=1))).values()
    expected = {Example(row["instruction"], "", row["response"]) for row in rows}
    assert {*site.train, *site.held_out} == expected


def test_every_csv_that_python_writes_comes_back(read):
    """Fields with every character that the format is made of."""
    fields = ["a,b", 'say "a"', "two\nlines", "", "'", " padded ", "é€\U0001f600", "#", "\t", "\\"]
    lines = []
    writer = csv.writer(type("Lines", (), {"write": lambda _, line: lines.append(line)})())
    writer.writerows([["instruction", "response"], *([field, f"{field}."] for field in fields)])
    assert responses(read("a.csv", "".join(lines))) == [f"{field}." for field in fields]
