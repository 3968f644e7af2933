import numpy as np
import pytest

from strategies.base import ClientUpdate
from strategies.local_only import LocalOnly

ADAPTER = {"w": np.ones(2, np.float32)}


def test_global_adapter_never_changes():
    updates = [ClientUpdate(site=site, adapter={}, num_examples=3) for site in "ab"]
    for update in updates:
        LocalOnly().check_update(ADAPTER, update)
    assert LocalOnly().aggregate(ADAPTER, {}, updates).adapter is ADAPTER


def test_site_that_sends_arrays_is_refused():
    update = ClientUpdate(site="a", adapter=ADAPTER, num_examples=3)
    with pytest.raises(ValueError, match=r"local_only sites send no arrays, got 1: \['w'\]"):
        LocalOnly().check_update(ADAPTER, update)


def test_counts_are_still_checked():
    with pytest.raises(ValueError, match=r"num_examples must be in \[1, 1e\+12\], got 0"):
        LocalOnly().check_update(ADAPTER, ClientUpdate(site="a", adapter={}, num_examples=0))
