"""What of an error leaves a site."""

from __future__ import annotations

import json

import pytest

from client.failures import reason_of
from client.private import PrivateStore
from strategies.base import require


@pytest.mark.parametrize("folder", ["secret-place", "two words"])
def test_folders_of_a_site_stay_there(tmp_path, folder):
    store = PrivateStore(tmp_path / folder, "bank", "0" * 64)
    store.folder.mkdir(mode=0o700)
    store.path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="damaged") as caught:
        store.load()
    assert str(store.path) in str(caught.value)
    reason = reason_of(caught.value)
    assert "bank.safetensors" in reason
    assert not any(name in reason for name in store.folder.parts[1:])


def test_other_text_leaves_as_it_is():
    text = "preference of site a must be 2 numbers >= 0, 1 / 2 and reward/brevity of https://x.org/y/z"
    with pytest.raises(ValueError, match="preference") as caught:
        require(False, "preference of site a", text.partition("must be ")[2], 3)
    assert reason_of(caught.value) == f"{text}, got 3"


def test_library_tells_its_type_alone():
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("what the site holds")
    assert reason_of(caught.value) == "JSONDecodeError (details in the site's log)"
