"""A base model of a few thousand random weights, runs on it that take under a second, and what their tests ask them."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch

from client.embedded import DOMAINS
from client.messages import EVALUATE, decode_losses
from client.model import adapted_model
from tests.client.tiny_models import save_tiny_base
from tests.server.loopback import run_server, simulation

SITES = sorted(DOMAINS)
"""The embedded data's, which are the default partition."""
ROUTER_LOCAL = "strategy=fc_moe model.router=local train.optimizer_state=keep method.retention.kind=orthogonal"


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """Folder of a tiny OLMoE of one layer."""
    folder = tmp_path_factory.mktemp("base")
    save_tiny_base(folder, "olmoe", num_hidden_layers=1)
    return folder


@pytest.fixture(scope="session")
def small(tiny_base):
    """Settings: two rounds of one step."""
    return (
        f"model.source=hub model.name={tiny_base} rounds=2 data.num_examples=60 data.max_length=160 train.max_steps=1 "
        "train.batch_size=2 train.learning_rate=0.01 lora.rank=2 eval.max_examples=2 device=cpu "
        "federation.round_timeout_seconds=0.1 federation.join_timeout_seconds=0.1"
    )


@pytest.fixture
def run(small, tmp_path):
    """Runs the ServerApp over the four embedded sites; each call has an output folder of its own."""
    folders = (tmp_path / f"run-{number}" for number in itertools.count())

    def finished(overrides="", faults=None, num_sites=len(SITES), change=None):
        grid = simulation(f"{small} {overrides}", num_sites, faults)
        if change is not None:
            change(grid)
        return run_server(grid, next(folders))

    return finished


@pytest.fixture(scope="session")
def honest(small, tmp_path_factory):
    """Runs in which nothing goes wrong, by their settings; each is made once for all tests."""

    @cache
    def finished(overrides="", num_sites=len(SITES)):
        return run_server(simulation(f"{small} {overrides}", num_sites), tmp_path_factory.mktemp("honest") / "run")

    return finished


@pytest.fixture(scope="session")
def fc_moe_run(honest):
    return honest("strategy=fc_moe")


def model_of(config):
    return adapted_model(config.model, config.lora, torch.device("cpu"))


def measured(result):
    """Site -> what it answered to the last evaluation."""
    replies = [sent.message() for sent in result.grid.sent if sent.up and sent.kind == EVALUATE]
    return {sender.site: losses for sender, losses in map(decode_losses, replies)}
