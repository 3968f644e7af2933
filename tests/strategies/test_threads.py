"""Blocks shared out over threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from strategies.threads import each


def blas_threads():
    np.ones((2, 2)) @ np.ones((2, 2))  # NumPy's BLAS is there
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_findings_stand_in_the_order_of_the_items_whoever_ends_first():
    def work(item):
        time.sleep(0.02 if item == 0 else 0.0)
        return 10 * item

    assert each(work, range(20)) == list(range(0, 200, 10))


def test_nothing_comes_of_nothing():
    assert each(str, []) == []


def test_blas_starts_no_threads_within_and_has_its_own_again_afterwards():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        within = each(lambda _: blas_threads(), range(3))
        after = blas_threads()
    assert 2 in before
    assert within == 3 * [[1] * len(before)]
    assert after == before


def test_an_error_comes_out_and_what_was_not_begun_never_is():
    begun = []

    def work(item):
        begun.append(item)
        if item == 0:
            raise ValueError("the first is bad")
        time.sleep(0.01)

    with pytest.raises(ValueError, match="the first is bad"):
        each(work, range(1000))
    assert len(begun) < 1000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPool")]
