"""Folders that are there whole or not at all, and errors that name what cannot be written or read."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from client.folders import make_folder, new_folder, reading


def test_a_new_folder_is_there_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_folder(target) as folder:
        (folder / "a").write_text("a")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]
    assert list(target.parent.iterdir()) == [target]
    assert target.stat().st_mode == target.parent.stat().st_mode


def test_an_empty_folder_counts_as_new_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with new_folder(tmp_path / "link") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "empty" / "a").read_text() == "a"


def test_an_interrupted_folder_leaves_nothing_and_can_be_made_again(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), new_folder(tmp_path / "target") as folder:
        folder.write_text("no file")
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "target"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "target"]


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for name, reason in (("file", "File exists"), ("file/below", "Not a directory"), ("", "Directory not empty")):
        with pytest.raises(ValueError, match=rf"^{tmp_path / name} cannot be .*{reason}"), new_folder(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match=rf"^output={tmp_path}/file cannot be made a folder: File exists"):
        make_folder(tmp_path / "file", "output=")


@pytest.mark.parametrize("error", [OSError("x"), SafetensorError("x"), KeyError("x")])
def test_what_a_library_cannot_read_is_named(tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ValueError, match=rf"^{tmp_path} cannot be read: {type(error).__name__}: '?x"),
        reading(tmp_path),
    ):
        raise error
