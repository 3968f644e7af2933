"""The arrows between packages, and a training core that runs on five libraries and what these bring along."""

import ast
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

IMPORTS = {
    "strategies": {"strategies"},
    "conf": {"conf", "strategies"},
    "client": {"client", "conf", "strategies"},
    "server": {"server", "client", "conf", "strategies"},
}
"""Package -> packages of ours it may import."""

ONLY_IN = {
    "flwr": {
        "client/answer.py",
        "client/app.py",
        "client/messages.py",
        "client/records.py",
        "server/app.py",
        "server/clientapps.py",
        "server/exchange.py",
        "server/gate.py",
        "server/pulls.py",
        "server/roster.py",
        "server/rounds.py",
        "server/supernode.py",
    },
    "flwr_datasets": {"client/data.py", "client/partitions.py"},
    "datasets": {"client/data.py", "client/partitions.py"},
    "hydra": {"conf/compose.py"},
    "omegaconf": {"conf/compose.py"},
}
"""Library -> the files that may import it."""

CORE = ("torch", "transformers", "peft", "numpy", "safetensors")
"""What the training core needs."""

BLOCKED_TRAINING = """
import sys

# None in sys.modules means absent, to import statements and to libraries that ask with find_spec.
sys.modules |= dict.fromkeys(sys.argv[2:])

from pathlib import Path
import torch
from client.model import adapted_model
from client.private import PrivateStore
from client.site import Site
from client.text import Example
from conf.methods import FcMoeConfig
from conf.model import LoraConfig
from conf.schema import Config, TrainConfig
from tests.client.tiny_models import save_tiny_base

folder = Path(sys.argv[1])
config = Config(
    model=save_tiny_base(folder / "base", "olmoe"),
    method=FcMoeConfig(),
    lora=LoraConfig(rank=2),
    train=TrainConfig(max_steps=1, batch_size=2),
)
adapted = adapted_model(config.model, config.lora, torch.device("cpu"))
examples = [Example("Name a colour.", "", "red"), Example("Name a fruit.", "", "plum")]
store = PrivateStore(folder / "private", "here", adapted.base.identity.sha256)
site = Site("here", examples, {"here": examples}, adapted=adapted, config=config, store=store)
received = adapted.initial_adapter(config.seed)
update = site.train(1, received, evaluate_own=True)
assert update.metrics["num_steps"] == 1
assert any((update.adapter[name] != received[name]).any() for name in received)
assert site.evaluate(update.adapter)["here"].loss == update.metrics["own_loss"]
assert store.load()
print("trained")
"""


def source_files(package):
    return sorted(path for path in (ROOT / package).rglob("*.py") if not path.name.startswith("test_"))


@cache
def imported_packages(path):
    """Top-level package of every import in the file, also of those inside functions."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            packages.add(node.module.partition(".")[0])
    return packages


@pytest.mark.parametrize("package", IMPORTS)
def test_imports_point_one_way(package):
    for path in source_files(package):
        ours = IMPORTS.keys() & imported_packages(path)
        assert ours <= IMPORTS[package], f"{path} imports {ours - IMPORTS[package]}"


def test_strategies_need_only_numpy_and_its_threads():
    for path in source_files("strategies"):
        foreign = imported_packages(path) - sys.stdlib_module_names - {"strategies", "numpy", "threadpoolctl"}
        assert not foreign, f"{path} imports {foreign}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_in_its_files(library):
    importing = {
        path.relative_to(ROOT).as_posix()
        for package in IMPORTS
        for path in source_files(package)
        if library in imported_packages(path)
    }
    assert importing <= ONLY_IN[library]


def with_dependencies(names):
    """The distributions and all that they require, extras left out."""
    found, waiting = set(), [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:  # for another platform
            continue
        waiting += [
            canonicalize_name(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})
        ]
    return found


@pytest.mark.slow
def test_training_core_runs_without_any_other_library(tmp_path):
    """One local step of a tiny random MoE, from texts to the update that a site sends."""
    kept = with_dependencies(CORE)
    blocked = [
        module
        for module, distributions in packages_distributions().items()
        if module.isidentifier() and not kept & set(map(canonicalize_name, distributions))
    ]
    ours = {"client", "conf", "strategies", "server", "tests", "benchmarks"}
    assert {"flwr", "hydra", "datasets", "rouge_score"} <= set(blocked)
    run = subprocess.run(
        [sys.executable, "-c", BLOCKED_TRAINING, str(tmp_path), *sorted(set(blocked) - ours)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("trained\n")
