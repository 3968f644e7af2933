"""How long a SuperNode's loop sleeps, and that Flower's loop does sleep by what we put in its way."""

import inspect
import time

import pytest
from flwr.supernode import start_client_internal

from server.supernode import EAGER_SECONDS, POLL_SECONDS, EagerTime


@pytest.fixture
def slept(monkeypatch):
    """Seconds of each sleep, which advance a clock of our own."""
    found = []
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 + sum(found))
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def test_a_site_nobody_asks_keeps_to_flowers_pace(slept):
    eager = EagerTime()
    eager.sleep(3)
    eager.sleep(3)
    assert slept == [3, 3]


def test_looks_are_frequent_for_a_minute_after_a_message(slept):
    eager = EagerTime()
    eager.sleep(0.5)  # a reply is not there yet
    while sum(slept) < EAGER_SECONDS:
        eager.sleep(3)
    assert set(slept) == {0.5, POLL_SECONDS}
    eager.sleep(3)
    assert slept[-1] == 3


def test_all_else_is_the_clock():
    assert EagerTime().perf_counter() == pytest.approx(time.perf_counter(), abs=1)


def test_flowers_loop_is_the_one_we_know():
    """A newer Flower may wait otherwise: then this module is to be looked at again."""
    source = inspect.getsource(start_client_internal)
    assert source.count("time.sleep(3)") == 1
    assert source.count("time.sleep(") == 3
