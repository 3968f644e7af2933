"""What Flower sends to the sites: the code, the settings and the packaged base model, and nothing else."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundle():
    return build_fab_from_disk(ROOT)


def test_bundle_carries_the_packaged_weights_and_stays_under_flowers_limit(bundle):
    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert "client/bases.json/tiny_moe/model.safetensors" in names
    assert len(bundle) < 10_000_000


def test_bundle_carries_every_file_of_the_four_packages(bundle):
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    files = {
        path.relative_to(ROOT).as_posix()
        for package in ("strategies", "conf", "client", "server")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
        # Flower's bundle takes no HTML; only the command line needs it.
        if path.parent != ROOT / "server/report/page"
    }
    assert files <= names


def test_bundle_holds_neither_tests_nor_outputs(bundle):
    names = zipfile.ZipFile(io.BytesIO(bundle)).namelist()
    assert not [name for name in names if name.startswith(("tests/", "outputs/", ".venv/"))]
