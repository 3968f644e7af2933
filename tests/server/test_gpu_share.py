"""Bytes in, share of a GPU out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import server.gpu_share
from conf.compose import load_config
from server.gpu_share import Need, choose_gpus_per_site, gpu_share
from server.jobs import plan

GIB = 1 << 30


def test_share_by_hand():
    """0.95 of 80 GiB is 76; a process takes 9 + 1 GiB, so 7 fit: the server and 6 of sites, each a sixth."""
    assert gpu_share(Need(site=9 * GIB, gpu=80 * GIB)) == 0.1666
    assert gpu_share(Need(site=30 * GIB, gpu=80 * GIB)) == 1.0
    assert gpu_share(Need(site=74 * GIB, gpu=80 * GIB)) == 1.0


@given(site=st.integers(1, 70 * GIB), gpu=st.integers(75 * GIB, 200 * GIB))
def test_shares_of_a_gpu_hold_their_processes_and_add_up_to_one_at_most(site, gpu):
    share = gpu_share(Need(site=site, gpu=gpu))
    processes = math.floor(1 / share)
    assert 0 < processes * share <= 1
    assert processes * site <= gpu


def test_what_does_not_fit_on_a_gpu_is_refused_with_numbers():
    with pytest.raises(ValueError, match=r"a simulated site needs 81\.0 GiB, the GPU has 80\.0 GiB: set a smaller"):
        gpu_share(Need(site=80 * GIB, gpu=80 * GIB))


@pytest.mark.parametrize(
    ("words", "share"),
    [("device=cpu", 0.0), ("federation.gpus_per_site=0.25", 0.25), ("federation.gpus_per_site=0", 0.0)],
)
def test_a_share_that_is_set_and_a_run_on_cpus_need_no_measurement(words, share):
    assert choose_gpus_per_site(load_config(words)) == share


@pytest.mark.slow
def test_a_gpu_that_was_asked_for_and_is_not_there_is_told_before_anything_starts():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="device=cuda, but torch sees no CUDA device here"):
        choose_gpus_per_site(load_config("device=cuda"))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "federation.cpus_per_site=4096",
            r"federation.cpus_per_site must be at most \d+, this machine's cores, got 4096",
        ),
        (
            "federation.gpus_per_site=0.5",
            "federation.gpus_per_site must be 0 or null, since there is no GPU here, got 0.5",
        ),
    ],
)
def test_more_of_a_machine_than_there_is_is_refused_before_anything_starts(monkeypatch, setting, told):
    monkeypatch.setattr(server.gpu_share, "may_have_gpu", lambda: False)
    with pytest.raises(ValueError, match=told):
        plan([setting], multirun=False)
