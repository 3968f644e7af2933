"""The arithmetic of the overhead's table, on run folders written by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks.round_overhead import VALUES, add, spread, table


@pytest.fixture
def folder(tmp_path):
    """Three rounds of two sites on a host called fileserver; the numbers of the first are wild."""
    lines = [
        {"type": "round", "round": number, "seconds": seconds} for number, seconds in ((1, 99.0), (2, 5.0), (3, 7.0))
    ]
    for number, trained, started, delivered in ((1, 1.0, 80.0, 9.0), (2, 3.0, 0.5, 0.25), (3, 4.0, 1.0, 0.5)):
        # The second site takes half as long for everything but its message, which takes a second more.
        for site, part, more in (("bank", 1.0, 0.0), ("clinic", 0.5, 1.0)):
            lines.append({
                "type": "site", "round": number, "site": site, "train_seconds": trained * part,
                "startup_seconds": started * part, "delivery_seconds": delivered + more,
            })  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loads = {"fileserver:1 (server)": 1, "fileserver:2": 1, "fileserver:3": 3}
    (tmp_path / "summary.json").write_text(json.dumps({"base_model_loads": loads}))
    return tmp_path


def test_samples_are_of_the_slowest_site_in_all_rounds_but_the_first(folder):
    """A round's seconds less the longest training: 5 - 3 and 7 - 4; four loads by two sites, without the server's."""
    samples = {name: [] for name in (*VALUES, "loads")}
    add(samples, folder)
    assert samples == {
        "overhead_seconds": [2.0, 3.0],
        "startup_seconds": [0.5, 1.0],
        "since_request_seconds": [0.25 + 1 + 0.25, 0.5 + 1 + 0.5],
        "loads": [2.0],
    }


def test_cell_is_the_median_and_the_range():
    assert spread([3.0, 1.0, 2.5]) == "2.50 (1.00 to 3.00)"
    assert spread([1.0, 2.0], 0) == "2 (1 to 2)"


def test_table_has_a_line_for_each_mode_and_one_of_plain_flower():
    samples = {name: [1.0, 2.0, 4.0] for name in VALUES} | {"loads": [1.0]}
    found = table({"tiny": {"modes": {"on": samples, "off": samples}, "plain_flower_seconds": [3.0]}})
    cells = ["2.00 (1.00 to 4.00)"] * 3 + ["1 (1 to 1)"]
    assert found["rows"] == [
        ["tiny", "on", *cells],
        ["tiny", "off", *cells],
        ["none: plain Flower", "", "3.00 (3.00 to 3.00)", "", "", ""],
    ]
    assert {len(row) for row in found["rows"]} == {len(found["columns"])}
