"""The private store holds one complete version of a site's arrays, whatever happens to the process."""

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from client.private import PrivateStore

ROOT = Path(__file__).parents[2]
BASE = "ab" * 32

SAVE_FOREVER = """
import sys
from pathlib import Path
import numpy as np
from client.private import PrivateStore
store = PrivateStore(Path(sys.argv[1]), "site-00", sys.argv[2])
version = 0
while True:
    version += 1
    store.save({f"array-{i}": np.full((64, 256), version, np.float32) for i in range(4)}, version)
    if version == 1:
        print("saved", flush=True)
"""


@pytest.fixture
def store(tmp_path):
    return PrivateStore(tmp_path / "run", "site-00", BASE)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "own/model.layers.0.mlp.gate.weight": generator.normal(size=(4, 3)).astype(np.float32),
        "optimizer/step": np.array(7.0),
        "transposed": generator.normal(size=(5, 2)).T,
        "empty": np.zeros((0, 3), np.float32),
    }


def test_arrays_come_back_with_their_shapes_types_and_bits(store, arrays):
    store.save(arrays, 1)
    loaded = PrivateStore(store.folder, store.site, store.base_sha256).load()
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)


def test_a_site_that_never_saved_has_nothing(store):
    assert store.load() == {}
    assert not store.folder.exists()


def test_a_save_replaces_every_array_of_the_last_one(store, arrays):
    store.save(arrays, 1)
    store.save({"only": np.ones(2, np.float32)}, 1)
    assert store.load().keys() == {"only"}


def test_a_round_asked_for_again_starts_from_what_was_saved_before_it(store):
    """Rounds 1 and 2 save; the reply of round 2 is lost twice."""
    numbers = {attempt: {"number": np.array(attempt)} for attempt in (1, 2, 3)}
    assert store.load(before_round=1) == {}
    store.save(numbers[1], 1)
    assert store.load(before_round=1) == {}
    assert store.load(before_round=2) == numbers[1]
    for attempt in (2, 3):
        store.save(numbers[attempt], 2)
        assert store.load() == numbers[attempt]
        assert store.load(before_round=2) == numbers[1]
        assert store.load(before_round=3) == numbers[attempt]


def test_a_kill_between_the_two_steps_of_a_save_loses_nothing(store):
    """The earlier version has its second name already, the new one is not there yet."""
    store.save({"number": np.array(1)}, 1)
    os.link(store.path, store.previous_path)
    assert store.load(before_round=2) == {"number": np.array(1)}
    store.save({"number": np.array(2)}, 2)
    assert store.load(before_round=2) == {"number": np.array(1)}
    assert sorted(store.folder.iterdir()) == [store.path, store.previous_path]


def test_only_the_owner_may_read(store, arrays):
    """Folder 0700, file 0600, also where the folder was there with looser rights."""
    store.folder.mkdir(mode=0o755)
    store.save(arrays, 1)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600


def test_sites_of_one_run_do_not_share_a_file(store, arrays):
    names = ["a", "a/b", "a%2Fb", "..", "A b", "ä"]
    for number, site in enumerate(names):
        PrivateStore(store.folder, site, BASE).save({"number": np.array(number)}, 1)
    for number, site in enumerate(names):
        assert PrivateStore(store.folder, site, BASE).load()["number"] == number
    assert {path.parent for path in store.folder.rglob("*") if path.is_file()} == {store.folder}


def test_another_base_model_is_refused(store, arrays):
    store.save(arrays, 1)
    other = PrivateStore(store.folder, store.site, "cd" * 32)
    with pytest.raises(ValueError, match=r"'site-00'.*abababababab.*cdcdcdcdcdcd: use the same base, or move .*away"):
        other.load()


def test_another_sites_file_is_refused(store, arrays):
    store.save(arrays, 1)
    other = PrivateStore(store.folder, "site-01", BASE)
    store.path.rename(other.path)
    with pytest.raises(ValueError, match=r"belongs to site 'site-00', not to 'site-01'"):
        other.load()


@pytest.mark.parametrize("kept_fraction", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_an_error_that_names_it(store, arrays, kept_fraction):
    store.save(arrays, 1)
    content = store.path.read_bytes()
    store.path.write_bytes(content[: int(kept_fraction * len(content))])
    with pytest.raises(ValueError, match=r"site-00.*damaged: .*site-00\.safetensors"):
        store.load()


def test_a_flipped_bit_is_an_error_that_names_the_file(store, arrays):
    store.save(arrays, 1)
    content = bytearray(store.path.read_bytes())
    content[-5] ^= 1
    store.path.write_bytes(content)
    with pytest.raises(ValueError, match=r"site-00\.safetensors: its arrays differ"):
        store.load()


def test_a_safetensors_file_of_something_else_is_refused(store):
    store.folder.mkdir()
    safetensors.numpy.save_file({"weight": np.ones(2, np.float32)}, store.path)
    with pytest.raises(ValueError, match=r"format None, expected 'bouquet-private-2'"):
        store.load()


def test_a_failed_save_leaves_the_last_version_and_no_temporary_file(store, arrays, monkeypatch):
    store.save(arrays, 1)

    def full_disk(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        store.save({"only": np.ones(2, np.float32)}, 1)
    assert store.load().keys() == arrays.keys()
    assert list(store.folder.iterdir()) == [store.path]


def test_a_kill_at_any_moment_leaves_one_complete_version(store):
    """A process that saves in a loop is killed five times at random moments.

    Version v fills every array with v, so a mixture of two versions would show.
    """
    moments = random.Random(0)
    for _ in range(5):
        saver = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(store.folder), BASE], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        assert saver.stdout.readline() == "saved\n"
        time.sleep(moments.uniform(0, 0.1))
        saver.send_signal(signal.SIGKILL)
        saver.communicate()
        assert saver.returncode == -signal.SIGKILL
        loaded = store.load()
        assert len(loaded) == 4
        assert len({float(value) for array in loaded.values() for value in (array.min(), array.max())}) == 1


def test_what_a_kill_left_behind_is_ignored_and_then_removed(store, arrays):
    store.save(arrays, 1)
    leftover = store.folder / f".{store.path.name}.abc123.tmp"
    leftover.write_bytes(b"half a file")
    other_site = store.folder / ".site-01.safetensors.abc123.tmp"
    other_site.write_bytes(b"another site's save in progress")
    assert store.load().keys() == arrays.keys()
    store.save(arrays, 1)
    assert not leftover.exists()
    assert other_site.exists()
