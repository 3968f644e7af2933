"""The runs that settings ask for, checked and named, with all that they need to start elsewhere."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from conf.alignment import FirmConfig
from conf.check import check_num_sites
from conf.compose import expand_sweep, load_config, quoted, swept_keys, to_dict
from conf.model import ModelSource, Quantization
from conf.partitions import Files
from conf.schema import Config, Mode
from server.gpu_share import check_share
from server.record import default_name

_LONGEST_NAME_BYTES = 200
"""Of a run's folder in a sweep, without a hash in place of the rest: file systems take 255."""


@dataclass(frozen=True)
class Job:
    """One run to be launched."""

    name: str
    config: Config
    overrides: tuple[str, ...]
    output: Path
    num_sites: int | None
    """Simulated sites; None for a remote run."""


def plan(overrides: list[str], *, multirun: bool) -> tuple[list[Job], Path]:
    """The runs that the settings ask for, all checked, and the folder that will hold them.

    Raises:
        ValueError: If any run's settings are wrong, a folder already holds a run, or the runs of a sweep would not have
            one SuperLink and a folder each.
    """
    if not multirun:
        config = load_config(overrides)
        job = _job("", config, overrides, Path(config.output or f"outputs/{default_name(config)}"))
        return [job], job.output
    sweep = expand_sweep(overrides)
    configs = [load_config(words) for words in sweep]
    keys = swept_keys(overrides) or ["strategy"]
    _check_sweep(keys, configs)
    folder = Path(configs[0].output or f"outputs/compare-{time.strftime('%Y%m%d-%H%M%S')}").expanduser().resolve()
    names = [_run_name(words, keys, config) for words, config in zip(sweep, configs, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"a sweep makes a folder for each run, and two would be called {twice[0]}: name no value twice"
        )
    jobs = [_job(name, config, words, folder / name) for name, config, words in zip(names, configs, sweep, strict=True)]
    return jobs, folder


def _check_sweep(keys: Sequence[str], configs: Sequence[Config]) -> None:
    """Raise ``ValueError`` for what all runs of a sweep must have in common: their folder and their SuperLink."""
    if "output" in keys:
        raise ValueError(
            f"output={configs[0].output},{configs[-1].output}: a sweep has one output, with a folder a run"
        )
    for key in ("mode", "superlink", "root_certificates"):
        values = sorted({str(to_dict(config)["federation"][key]) for config in configs})
        if len(values) > 1:
            raise ValueError(f"federation.{key} is {' and '.join(values)} in one sweep, whose runs share a SuperLink")


def _job(name: str, config: Config, overrides: Sequence[str], output: Path) -> Job:
    output = output.expanduser().resolve()
    if (output / "config.yaml").exists() or (output / "summary.json").exists():
        raise ValueError(f"output={output} already holds a run: choose another folder, or remove it")
    words = [word for word in overrides if not word.startswith("output=")]
    sites = None
    if config.federation.mode is Mode.simulation:
        _check_installed(config)
        check_share(config)
        sites = _count_sites(config)
    if sites is not None:
        # The run's processes start elsewhere: relative paths are made absolute here, where the user wrote them.
        words += [f"{key}={quoted(path)}" for key, path in _local_paths(config).items()]
        words += _with_absolute_sources(config)
        words += [f"output={quoted(str(output))}"]
    return Job(name or config.strategy.name, config, tuple(words), output, sites)


def _check_installed(config: Config) -> None:
    """Raise ``ValueError`` if a library is missing that only some settings need: simulated sites run here."""
    sentiment = isinstance(config.method, FirmConfig) and "sentiment" in config.method.rewards
    needed = {
        "torchao": (config.model.quantization is Quantization.int8, "model.quantization=int8", "int8"),
        "vaderSentiment": (sentiment, "method.rewards=[sentiment]", "rewards"),
    }
    for library, (is_needed, setting, extra) in needed.items():
        if is_needed and find_spec(library) is None:
            raise ValueError(f"{setting} needs the package {library}: pip install 'bouquet-fl[{extra}]'")


def _local_paths(config: Config) -> dict[str, str]:
    model = config.model
    paths = {
        "data.path": config.data.path,
        "eval.path": config.eval.path,
        "eval.general_path": config.eval.general_path,
        "eval.choices.path": config.eval.choices.path,
        "model.wheel_dir": model.wheel_dir,
        "model.upcycle.text": model.upcycle.text,
        "model.name": model.name if model.source is ModelSource.hub and Path(model.name).is_dir() else None,
    }
    is_pattern = isinstance(config.partition, Files)
    local = {key: path for key, path in paths.items() if path is not None}
    return {
        key: str(Path(path).expanduser().absolute())
        for key, path in local.items()
        if Path(path).expanduser().exists() or (is_pattern and key == "data.path")
    }


def _with_absolute_sources(config: Config) -> list[str]:
    """``method.rewards`` again, if it names a folder that is here."""
    if not isinstance(config.method, FirmConfig):
        return []
    named = [spec.partition(":") for spec in config.method.rewards]
    folders = {source: str(Path(source).expanduser().absolute()) for _, _, source in named if source}
    present = {source: folder for source, folder in folders.items() if Path(folder).is_dir()}
    specs = [quoted(f"{name}{colon}{present.get(source, source)}") for name, colon, source in named]
    return [f"method.rewards=[{','.join(specs)}]"] if present else []


def _count_sites(config: Config) -> int:
    from client.data import site_names  # noqa: PLC0415 - takes seconds to import

    count = len(site_names(config))
    check_num_sites(config, count, f"the number of sites, {count},")
    return count


def _run_name(words: Sequence[str], keys: Sequence[str], config: Config) -> str:
    values = dict(word.lstrip("+").partition("=")[::2] for word in words)
    parts = [config.strategy.name if key == "strategy" else f"{key}={values[key]}" for key in keys]
    name = ",".join(parts).replace("/", "-").encode()
    if len(name) > _LONGEST_NAME_BYTES:
        name = name[:_LONGEST_NAME_BYTES] + f"-{hashlib.sha256(name).hexdigest()[:12]}".encode()
    return name.decode(errors="ignore")
