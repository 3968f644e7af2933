"""Process-wide switches of torch."""

import os

import pytest
import torch

from client.runtime import configure_torch
from conf.schema import TrainConfig


@pytest.fixture(autouse=True)
def _switches_as_before():
    threads = torch.get_num_threads()
    yield
    configure_torch(TrainConfig())
    torch.set_num_threads(threads)


def test_deterministic_mode_refuses_an_operation_without_a_deterministic_algorithm():
    values, index = torch.arange(8.0), torch.tensor([3, 3])
    configure_torch(TrainConfig(deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] in {":4096:8", ":16:8"}
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(8).put_(index, values[:2])


def test_a_later_run_of_the_process_may_be_without_it():
    configure_torch(TrainConfig(deterministic=True))
    configure_torch(TrainConfig(num_threads=2))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert torch.get_num_threads() == 2
