"""By what a result was made."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks import provenance
from benchmarks.provenance import made_by, makers


@pytest.fixture
def asked_anew():
    made_by.cache_clear()
    yield
    made_by.cache_clear()


def checkout(folder: Path) -> str:
    """A git repository with one committed file of code; its commit."""
    (folder / "code.py").write_text("")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_and_versions_are_told_and_code_that_has_changed(tmp_path, monkeypatch, asked_anew):
    commit = checkout(tmp_path)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "code.py"))
    assert made_by()["commit"] == commit[:12]
    assert made_by()["versions"]["torch"] == version("torch")
    (tmp_path / "results.json").write_text("{}")
    made_by.cache_clear()
    assert made_by()["commit"] == commit[:12]  # results are no code
    (tmp_path / "code.py").write_text("changed")
    assert made_by()["commit"] == commit[:12]  # what runs is what was there first
    made_by.cache_clear()
    assert made_by()["commit"] == f"{commit[:12]}+"


def test_outside_a_checkout_no_commit_is_told(tmp_path, monkeypatch, asked_anew):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "code.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert made_by()["commit"] is None
    monkeypatch.setenv("PATH", "")
    made_by.cache_clear()
    assert made_by()["commit"] is None


def test_each_maker_is_told_once_with_its_runs():
    one, other = {"commit": "a", "versions": {}}, {"commit": "b", "versions": {}}
    rows = [{"made_by": one}, {"seed": 1}, {"made_by": other}, {"made_by": one}]
    assert makers(rows) == [{"made_by": one, "runs": 2}, {"made_by": other, "runs": 1}]
