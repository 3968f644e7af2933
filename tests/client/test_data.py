"""Loading and splitting, on real small files."""

import csv
import json
import logging
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from client import data as data_module
from client.data import SiteData, held_out_file, own_site, simulated_sites, site_names
from client.embedded import DOMAINS, embedded_rows
from client.text import Example
from conf.partitions import Dirichlet, Files, Iid, Natural
from conf.schema import Config, DataConfig
from strategies.fedavg import FedAvg

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


def rows_of(owner, count, **extra):
    return [
        {
            "instruction": f"do {index}",
            "context": f"at {owner}",
            "response": f"{owner} {index}",
            "owner": owner,
            **extra,
        }
        for index in range(count)
    ]


def write(path, rows):
    """Write ``rows`` in the format of the path's suffix."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def config_for(path, partition=None, seed=0, **changes):
    path = None if path is None else str(path)
    data = DataConfig(path=path, **changes)
    return Config(strategy=FedAvg(), data=data, partition=partition or Natural(column="owner"), seed=seed)


def everything(site):
    return sorted((*site.train, *site.held_out), key=str)


@pytest.fixture
def rows():
    return rows_of("north", 10) + rows_of("south", 15)


def expected_examples(rows):
    return sorted((Example(row["instruction"], row["context"], row["response"]) for row in rows), key=str)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_examples(suffix, rows, tmp_path):
    sites = simulated_sites(config_for(write(tmp_path / f"rows{suffix}", rows)))
    assert list(sites) == ["north", "south"]
    assert everything(sites["north"]) == expected_examples(rows[:10])
    assert everything(sites["south"]) == expected_examples(rows[10:])


def test_csv_fields_stay_as_they_are_written(tmp_path):
    """pandas would make these 7, 1.5, a missing value and True."""
    answers = ["007", "1.50", "None", "true"]
    path = write(tmp_path / "rows.csv", [{"instruction": "a", "response": answer} for answer in answers])
    found = held_out_file(config_for(None, context_column=None), str(path))
    assert [example.response for example in found] == answers


def test_values_of_other_types_become_text_and_missing_context_is_empty(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"instruction": 1, "context": None, "response": 2.5}] * 2)
    assert held_out_file(config_for(None), str(path)) == [Example("1", "", "2.5")] * 2


def test_rows_without_a_response_are_dropped_and_counted(rows, tmp_path, caplog):
    incomplete = [{**rows[0], "response": None}, {**rows[0], "response": "  "}]
    with caplog.at_level(logging.WARNING):
        sites = simulated_sites(config_for(write(tmp_path / "rows.jsonl", rows + incomplete)))
    assert everything(sites["north"]) == expected_examples(rows[:10])
    assert "2 of 27 rows dropped: no response" in caplog.text


def test_columns_are_named_by_settings(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"q": "one", "a": "two"}] * 4)
    config = config_for(path, Iid(num_sites=2), prompt_column="q", context_column=None, response_column="a")
    assert {example for site in simulated_sites(config).values() for example in site.train} == {
        Example("one", "", "two")
    }


def test_pairs_have_a_worse_response_and_what_they_were_judged_by(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"q": "one", "a": "two", "worse": "three", "by": "tact"}] * 4)
    columns = {"prompt_column": "q", "context_column": None, "response_column": "a"}
    config = config_for(path, Iid(num_sites=2), **columns, rejected_column="worse", objective_column="by")
    found = {example for site in simulated_sites(config).values() for example in site.train}
    assert found == {Example("one", "", "two", "three", "tact")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_column": "nope"}, r"data\.prompt_column='nope' .* \['context', 'instruction', 'owner', 'response'\]"),
        ({"context_column": "nope"}, r"data\.context_column='nope' .* set data\.context_column=null"),
        ({"response_column": "nope"}, r"data\.response_column='nope' is not a column"),
        ({"split_column": "nope"}, r"data\.split_column='nope' is not a column"),
        ({"filter": {"nope": 1}}, r"data\.filter\.nope='nope' is not a column"),
        ({"partition": Natural(column="nope")}, r"partition\.column='nope' is not a column"),
        ({"partition": Natural()}, r"partition=natural needs partition\.column, one of \['context', 'instr"),
        ({"partition": Dirichlet()}, r"partition=dirichlet needs partition\.column"),
        ({"filter": {"owner": "east"}}, r"data\.filter=\{'owner': 'east'\} matches none of 25 rows"),
        (
            {"split_column": "owner"},
            r"data\.split_column='owner': site 'north' has 0 rows of data\.train_split='train'",
        ),
    ],
)
def test_wrong_columns_are_refused_naming_the_setting_and_what_there_is(changes, message, rows, tmp_path):
    with pytest.raises(ValueError, match=message):
        simulated_sites(config_for(write(tmp_path / "rows.jsonl", rows), **changes))


def test_empty_owner_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=r"partition\.column='owner' is empty in some rows"):
        simulated_sites(config_for(write(tmp_path / "rows.jsonl", [*rows, {**rows[0], "owner": None}])))


@pytest.mark.parametrize("wanted", ["south", ["south", "east"]])
def test_filter_keeps_the_rows_that_match(wanted, rows, tmp_path):
    config = config_for(write(tmp_path / "rows.parquet", rows), filter={"owner": wanted})
    assert list(simulated_sites(config)) == ["south"]


def test_filter_compares_numbers_with_text_of_numbers(tmp_path):
    path = write(tmp_path / "rows.csv", rows_of("a", 4, fold=1) + rows_of("b", 4, fold=2))
    assert list(simulated_sites(config_for(path, filter={"fold": 2}))) == ["b"]


def test_num_examples_draws_a_seeded_part_after_the_filter(rows, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows)
    first, again, other = (
        everything(simulated_sites(config_for(path, seed=seed, num_examples=6, filter={"owner": "south"}))["south"])
        for seed in (0, 0, 1)
    )
    assert len(first) == 6
    assert first == again != other
    assert set(first) < set(expected_examples(rows[10:]))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "{broken"), ("a.parquet", "text"), ("a.csv", ""), ("a.jsonl", "\n")]
)
def test_unreadable_files_are_refused_naming_the_setting(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"data\.path=.*a\.\w+"):
        simulated_sites(config_for(tmp_path / name))


def test_paths_that_are_no_single_table_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path=.*gone\.csv: there is no such file"):
        simulated_sites(config_for(tmp_path / "gone.csv"))
    with pytest.raises(ValueError, match=r"names several files: set partition=files"):
        simulated_sites(config_for(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt must end in one of"):
        simulated_sites(config_for(tmp_path / "notes.txt"))


def test_unreachable_hub_is_an_error_of_data_path(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data\.path=nobody/no-such-set is no file here, and could not be loaded"):
        simulated_sites(config_for("nobody/no-such-set"))


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_split_is_disjoint_complete_and_has_a_row_on_each_side(fraction, rows, tmp_path):
    config = config_for(write(tmp_path / "rows.jsonl", rows), held_out_fraction=fraction)
    for site in simulated_sites(config).values():
        assert not set(site.train) & set(site.held_out)
        assert site.train
        assert len(site.held_out) == min(max(1, round(fraction * len(everything(site)))), len(everything(site)) - 1)


def test_split_column_decides_and_other_values_are_unused(tmp_path):
    rows = [row for split in ("train", "test", "spare") for row in rows_of(split, 3, split=split, site="a")]
    config = config_for(write(tmp_path / "rows.jsonl", rows), Natural(column="site"), split_column="split")
    site = simulated_sites(config)["a"]
    assert sorted(site.train, key=str) == expected_examples(rows[:3])
    assert sorted(site.held_out, key=str) == expected_examples(rows[3:6])


def test_split_depends_on_the_site_and_its_rows_alone(rows, tmp_path):
    together = simulated_sites(config_for(write(tmp_path / "rows.jsonl", rows)))
    fewer = simulated_sites(config_for(write(tmp_path / "north.jsonl", rows[:10])))
    assert together["north"] == fewer["north"]
    assert simulated_sites(config_for(tmp_path / "rows.jsonl", seed=1))["north"] != together["north"]
    renamed = [{**row, "owner": "east"} for row in rows[:10]]
    east = simulated_sites(config_for(write(tmp_path / "east.jsonl", renamed)))["east"]
    assert east.train != together["north"].train


@pytest.mark.parametrize("limit", [None, 7])
def test_real_site_holds_what_the_simulation_with_files_gives_it(limit, rows, tmp_path):
    folder = tmp_path / "sites"
    folder.mkdir()
    write(folder / "north.jsonl", rows[:10])
    write(folder / "south.csv", rows[10:])
    (folder / "readme.txt").write_text("not data")
    for path in (folder, folder / "*"):
        config = config_for(path, Files(), num_examples=limit)
        sites = simulated_sites(config)
        assert site_names(config) == ["north", "south"]
        assert sites["south"] == own_site(config, "south", str(folder / "south.csv"))
        assert len(everything(sites["south"])) == (limit or 15)
    by_column = simulated_sites(config_for(write(tmp_path / "rows.jsonl", rows)))
    assert limit or by_column == sites


def test_files_that_name_no_sites_are_refused(rows, tmp_path):
    with pytest.raises(ValueError, match=r"holds no file that ends in"):
        simulated_sites(config_for(tmp_path, Files()))
    write(tmp_path / "north.jsonl", rows)
    write(tmp_path / "north.csv", rows)
    with pytest.raises(ValueError, match=r"several files would name the same site: \['north'\]"):
        simulated_sites(config_for(tmp_path, Files()))
    with pytest.raises(ValueError, match=r"partition=files needs data\.path"):
        simulated_sites(config_for(None, Files()))


def test_own_site_needs_two_rows_and_a_safe_name(rows, tmp_path):
    path = write(tmp_path / "one.jsonl", rows[:1])
    with pytest.raises(ValueError, match=r"site 'one' needs at least 2 usable rows, but .* has 1"):
        own_site(config_for(None), "one", str(path))
    with pytest.raises(ValueError, match=r"site must be 1 to 100 letters .* got 'a/b'"):
        own_site(config_for(None), "a/b", str(path))


def test_held_out_file_gives_all_its_rows_in_order(rows, tmp_path):
    config = config_for(None, filter={"owner": "north"}, split_column="absent", num_examples=3)
    found = held_out_file(config, str(write(tmp_path / "rows.parquet", rows)))
    assert found == [Example(row["instruction"], row["context"], row["response"]) for row in rows]
    with pytest.raises(ValueError, match=r"eval\.path=.*: there is no such file"):
        held_out_file(config, str(tmp_path / "gone.jsonl"))


def test_embedded_default_has_a_site_for_each_domain():
    sites = simulated_sites(config_for(None, Natural()))
    assert list(sites) == sorted(DOMAINS)
    by_domain = {domain: [row for row in embedded_rows(1200, 0) if row["domain"] == domain] for domain in DOMAINS}
    for domain, site in sites.items():
        assert isinstance(site, SiteData)
        assert everything(site) == expected_examples(by_domain[domain])


def test_embedded_default_takes_every_partition_without_a_column():
    sites = simulated_sites(config_for(None, Dirichlet(alpha=0.1), num_examples=200))
    assert sum(len(everything(site)) for site in sites.values()) == 200


def test_sites_are_loaded_once_for_the_same_settings(rows, tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", rows)
    first = simulated_sites(config_for(path))
    path.unlink()
    again = config_for(path)
    again.rounds, again.train.learning_rate = 99, 0.5
    assert simulated_sites(again) == first
    monkeypatch.setattr(data_module, "_loaded", {})
    with pytest.raises(ValueError, match="no such file"):
        simulated_sites(config_for(path))


def test_loading_prints_nothing_and_leaves_nothing_in_the_shared_cache(rows, tmp_path, monkeypatch, capfd):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    simulated_sites(config_for(write(tmp_path / "quiet.csv", rows)))
    assert capfd.readouterr() == ("", "")
    assert not cache.exists()


def test_dolly_is_divided_by_its_categories():
    """Its card's row counts: https://huggingface.co/datasets/databricks/databricks-dolly-15k."""
    path = SHARED_DATA / "dolly15k.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not here; the set is not part of the project")
    sites = simulated_sites(config_for(path, Natural(column="category")))
    assert {name: len(everything(site)) for name, site in sites.items()} == {
        "brainstorming": 1766, "classification": 2136, "closed_qa": 1773, "creative_writing": 709,
        "general_qa": 2191, "information_extraction": 1506, "open_qa": 3742, "summarization": 1188,
    }  # fmt: skip
