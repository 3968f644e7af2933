"""Where and how torch computes: the device, and the switches of a whole process."""

from __future__ import annotations

import os

import torch

from conf.schema import Device, TrainConfig

_CUBLAS_WORKSPACE = ":4096:8"
"""One of the two values with which cuBLAS gives the same bits every time
(https://docs.nvidia.com/cuda/cublas/#results-reproducibility); torch demands it of deterministic programs."""


def configure_torch(config: TrainConfig) -> None:
    """Set ``train.num_threads`` and ``train.deterministic``; a process may serve runs that differ in them.

    With ``deterministic``, an operation that has no deterministic algorithm raises ``RuntimeError`` where it is used.
    """
    torch.set_num_threads(config.num_threads)
    # Read when the first matrix product on a GPU runs, so a later deterministic run of this process depends on it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(config.deterministic)
    torch.backends.cudnn.deterministic = config.deterministic
    # Trying several algorithms and keeping the fastest is a choice by the clock.
    torch.backends.cudnn.benchmark = False


def gpu_is_lost() -> bool:
    """Whether an error has left this process's GPU context unusable for good, as a failed kernel does."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def resolve_device(device: Device) -> torch.device:
    """The device to compute on.

    Raises:
        ValueError: If CUDA is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device is Device.cuda and not available:
        raise ValueError("device=cuda, but torch sees no CUDA device here: set device=cpu or device=auto")
    return torch.device("cuda" if available and device is not Device.cpu else "cpu")
