"""By what a result was made."""

from __future__ import annotations

import math
import os
import subprocess
from importlib.metadata import version
from pathlib import Path

from benchmarks.cells import finished
from benchmarks.provenance import MADE_BY, made_by, makers


def checkout(folder: Path) -> str:
    """A git repository with one committed file of code; its commit."""
    (folder / "code.py").write_text("")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_versions_and_processor_are_told_and_whether_code_has_changed(tmp_path):
    commit = checkout(tmp_path)
    (tmp_path / "results.json").write_text("{}")  # results are no code
    assert made_by(tmp_path)["commit"] == commit[:12]
    assert made_by(tmp_path)["versions"]["torch"] == version("torch")
    flags = Path("/proc/cpuinfo").read_text().split()
    assert [level in made_by(tmp_path)["cpu"] for level in ("V3", "V4")] == ["avx2" in flags, "avx512f" in flags]
    (tmp_path / "code.py").write_text("changed")
    assert made_by(tmp_path)["commit"] == f"{commit[:12]}+"


def test_outside_a_checkout_no_commit_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert made_by(tmp_path)["commit"] is None
    monkeypatch.setenv("PATH", "")
    assert made_by(tmp_path)["commit"] is None


def test_a_row_tells_of_the_process_that_computed_it():
    """With one job this one; with two, processes of their own."""
    for jobs in (1, 2):
        rows = list(finished([1, 2], _row, jobs, math.inf))
        assert sorted(row["cell"] for row in rows) == [1, 2]
        assert all(row["made_by"] == MADE_BY for row in rows)
        assert (os.getpid() in {row["process"] for row in rows}) is (jobs == 1)


def _row(cell):
    return {"cell": cell, "process": os.getpid()}


def test_each_maker_is_told_once_with_its_runs():
    one, other = {"commit": "a", "versions": {}}, {"commit": "b", "versions": {}}
    rows = [{"made_by": one}, {"seed": 1}, {"made_by": other}, {"made_by": one}]
    assert makers(rows) == [{"made_by": one, "runs": 2}, {"made_by": other, "runs": 1}]
