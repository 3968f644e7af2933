import numpy as np
import pytest

from strategies.base import ClientUpdate
from strategies.centralised import Centralised

ADAPTER = {"w": np.ones(2, np.float32)}


def trained(site):
    return ClientUpdate(site=site, adapter={"w": np.array([2, 3], np.float32)}, num_examples=3)


def test_the_one_sites_adapter_is_the_global_one():
    np.testing.assert_array_equal(Centralised().aggregate(ADAPTER, {}, [trained("all")]).adapter["w"], [2, 3])


def test_two_sites_are_refused():
    with pytest.raises(ValueError, match=r"exactly 1 site, got updates from \['a', 'b'\]"):
        Centralised().aggregate(ADAPTER, {}, [trained("a"), trained("b")])
