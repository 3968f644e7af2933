"""torch's switches that hold for the whole process: threads, and whether only deterministic algorithms may run."""

from __future__ import annotations

import os

import torch

from conf.schema import TrainConfig

_CUBLAS_WORKSPACE = ":4096:8"
"""One of the two values with which cuBLAS gives the same bits every time
(https://docs.nvidia.com/cuda/cublas/#results-reproducibility); torch demands it of deterministic programs."""


def configure_torch(config: TrainConfig) -> None:
    """Set ``train.num_threads`` and ``train.deterministic``; a process may serve runs that differ in them.

    With ``deterministic``, an operation that has no deterministic algorithm raises ``RuntimeError`` where it is used.
    """
    torch.set_num_threads(config.num_threads)
    if config.deterministic:
        # Read when the first matrix product on a GPU runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    # Trying several algorithms and keeping the fastest is a choice by the clock.
    torch.backends.cudnn.benchmark = False
