"""Threads that share out ranges of experts, or layers: NumPy lets others go on while it multiplies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_THREADS = min(os.cpu_count() or 1, 8)

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@contextmanager
def threads() -> Iterator[ThreadPoolExecutor]:
    """As many as there are cores, eight at most: each holds a block in float64. BLAS starts none of its own."""
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - sites, which read names here, do without

    # Threads of BLAS within these would only wait for each other, and their number may change last bits.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(_THREADS) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def each(work: Callable[[_Item], _Found], items: Iterable[_Item]) -> list[_Found]:
    """What ``work`` finds of each of the ``items``, in their order."""
    with threads() as pool:
        return list(pool.map(work, items))
