"""``bouquet report`` and ``bouquet compare``: where the page goes, what it replaces, what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.launch import cli
from server.report.page import render, write_report
from server.report.runs import read_runs
from tests.server.report.folders import write_run


def test_commands_write_the_page_where_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    runner = CliRunner()
    alone = runner.invoke(cli, ["report", str(one)])
    assert alone.output.strip() == str(one / "report.html")
    assert runner.invoke(cli, ["report", str(one), str(other)]).exit_code == 0
    assert runner.invoke(cli, ["report", str(one), "--output", "x/y.html"]).exit_code == 0
    assert (one / "report.html").read_text() == (tmp_path / "x" / "y.html").read_text()
    assert "<title>a, b" in (tmp_path / "report.html").read_text()


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, page = write_run(tmp_path / "a", rounds=1), tmp_path / "a" / "report.html"
    write_report([folder], page)
    before = page.read_text()

    def full(self, text, **_):
        self.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RuntimeError, match=r"cannot write .*report.html: No space left on device"):
        write_report([folder], page)
    assert page.read_bytes().decode() == before
    assert [path.name for path in folder.iterdir() if ".tmp" in path.name] == []


def test_report_of_no_run_is_an_error_that_names_the_folder(tmp_path):
    assert f"{tmp_path}: no run in it" in str(CliRunner().invoke(cli, ["report", str(tmp_path)]).exception)


@pytest.mark.parametrize(
    ("words", "place"), [(["sweep"], "sweep/compare.html"), (["sweep/a", "sweep/b"], "compare.html"),
                         (["sweep", "--html", "x/y.html"], "x/y.html")],
)  # fmt: skip
def test_compare_writes_the_page_and_says_where_below_its_table(tmp_path, monkeypatch, words, place):
    """A folder of runs keeps it; several leave it here; what is named wins."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_run(Path("sweep", name), rounds=1, sites=["bank", "clinic"])
    (tmp_path / "sweep/b/summary.json").unlink()  # has not ended: in the table, and on the page
    table, _, told = compared(words).rpartition("\n")
    assert "held-out loss" in table
    assert "no summary" in table
    assert told == f"page: {place}"
    assert "<title>a, b " in Path(place).read_text()
    assert not list(Path().rglob("*report.html"))


def compared(words):
    result = CliRunner().invoke(cli, ["compare", *words])
    assert result.exit_code == 0, result.exception
    return result.output.strip()


@pytest.mark.parametrize("command", ["report", "compare"])
def test_page_replaces_an_earlier_page_and_nothing_else(tmp_path, command):
    folder, page = write_run(tmp_path / "a", rounds=1), tmp_path / "a" / f"{command}.html"
    page.write_text(render(read_runs([write_run(tmp_path / "other", rounds=0)])))
    assert CliRunner().invoke(cli, [command, str(folder)]).exit_code == 0
    assert "<title>a " in page.read_text()
    page.write_text("<title>My notes</title>")
    with pytest.raises(ValueError, match=rf"{command}.html is there already, and no page of Bouquet's"):
        CliRunner().invoke(cli, [command, str(folder)], catch_exceptions=False)
    assert page.read_text() == "<title>My notes</title>"


def test_page_that_cannot_be_written_is_an_error_that_says_where(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"cannot write .*file/report.html: .*; name another file"):
        write_report([write_run(tmp_path / "a", rounds=1)], tmp_path / "file" / "report.html")
