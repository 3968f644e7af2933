"""From overrides to checked dataclasses: the one file that imports Hydra.

Server and sites compose the same overrides with the same files, so both hold the same settings;
``settings_hash`` in every message proves it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache, lru_cache
from itertools import product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from conf import alignment, methods, partitions
from conf.check import check_config
from conf.methods import MethodConfig
from conf.partitions import PartitionConfig
from conf.schema import Config
from strategies.base import Strategy
from strategies.centralised import Centralised
from strategies.clair import Clair
from strategies.fc_moe import FcMoe
from strategies.fc_moe_plus import FcMoePlus
from strategies.fedalign_moe import FedAlignMoe
from strategies.fedavg import FedAvg, FedProx
from strategies.fedcmoo import FedCmoo
from strategies.fedmoe import FedMoe
from strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from strategies.firm import Firm
from strategies.flex import Flex
from strategies.local_only import LocalOnly
from strategies.pfl_moe import PflMoe
from strategies.scaffold import Scaffold

STRATEGIES: tuple[type[Strategy], ...] = (
    FedAvg, FedProx, FedAvgM, FedAdam, FedAdagrad, FedYogi, Scaffold,
    FedMoe, FedAlignMoe, FcMoe, FcMoePlus, PflMoe, Flex, Clair, Firm, FedCmoo, LocalOnly, Centralised,
)  # fmt: skip
METHODS: tuple[type[MethodConfig], ...] = (
    methods.SftConfig, methods.ScaffoldConfig, methods.FcMoeConfig, methods.FedAlignMoeConfig, methods.PflMoeConfig,
    methods.FlexConfig, methods.LocalOnlyConfig, alignment.FirmConfig, alignment.DpoConfig,
)  # fmt: skip
PARTITIONS: tuple[type[PartitionConfig], ...] = (
    partitions.Iid, partitions.Dirichlet, partitions.Pathological, partitions.Shard, partitions.Natural,
    partitions.Files,
)  # fmt: skip

NOT_HASHED = (
    "data.path", "eval.path", "eval.general_path", "eval.choices.path", "model.wheel_dir", "model.upcycle.text",
    "federation", "worker", "output", "device",
)  # fmt: skip
"""Settings that may differ between the two ends of a message: paths, places and processes."""

GROUPS = (
    "model", "data", "partition", "method", "strategy", "screen", "federation", "worker", "experiment",
)  # fmt: skip
"""Settings that name a file or a dataclass with further settings."""

_OPEN = {
    "data.filter": "column: value",
    "method.reward_formats": "reward: text",
    "method.site_preferences": "site: [weights]",
}
"""Settings with keys of the user's own, and what they look like."""

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}


def load_config(overrides: str | Sequence[str] = "") -> Config:
    """Settings from ``conf/config.yaml`` and Hydra overrides, as checked dataclasses; the caller's own to change.

    Raises:
        ValueError: If a key is unknown, a value has the wrong type or lies outside its limits, or two
            settings contradict each other. The message names the key, the value and the limit.
    """
    return copy.deepcopy(_composed(tuple(_words(overrides))))


def load_saved(text: str, overrides: Sequence[str] = ()) -> Config:
    """Settings out of a run folder's ``config.yaml``, and overrides of them.

    Raises:
        ValueError: As ``load_config``; or if the settings are damaged, or of another version of Bouquet.
    """
    try:
        saved = yaml.safe_load(text)
        named = {group: str(saved[group].pop("name")) for group in ("strategy", "method", "partition")}
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"damaged settings, or of another version of Bouquet ({reason})") from error
    words = [f"{group}={name}" for group, name in named.items()]
    return load_config([*words, *_leaves(saved, ""), *overrides])


def _leaves(values: Mapping[Any, Any], prefix: str) -> list[str]:
    """Overrides that set every value of a tree."""
    words = []
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" in _OPEN:
            # As a whole: the keys are the user's own, and may hold dots.
            pairs = ",".join(f"{_as_key(own)}:{_as_override(one)}" for own, one in value.items())
            words.append(f"{prefix}{key}={{{pairs}}}")
        elif isinstance(value, Mapping):
            words += _leaves(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={_as_override(value)}")
    return words


def _as_key(key: str) -> str:
    """A key of a mapping as Hydra's grammar has it, where quotes are not allowed."""
    return re.sub(r"([\\()\[\]{}:=, \t])", r"\\\1", key)


def _as_override(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(_as_override(item) for item in value)}]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def quoted(text: str) -> str:
    """Text as it is written in an override, whatever it holds."""
    # A backslash before ${ keeps it from being replaced by another setting, and must itself be told from those there.
    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(literal, Quote.single).with_quotes()


# Composing takes longer than a small site's round, and a process is asked for the same settings with every message.
@lru_cache(maxsize=16)
def _composed(words: tuple[str, ...]) -> Config:
    for override in _parse(words):
        _check_form(override)
    _register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(Path(__file__).parent.resolve()), version_base="1.3"):
            composed = compose("config", [_with_open_keys(word) for word in words])
            config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error, words)) from error
    assert isinstance(config, Config)
    check_config(config)
    return config


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Overrides of each run of a sweep: ``seed=0,1 rounds=3`` gives two lists, in the order written.

    Raises:
        ValueError: If an override cannot be parsed.
    """
    return [list(words) for words in product(*(_choices(override) for override in _parse(overrides)))]


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """Keys that take several values in a sweep, in the order written."""
    return [override.get_key_element() for override in _parse(overrides) if override.is_sweep_override()]


def to_yaml(config: Config) -> str:
    """Every setting, resolved; group choices carry their name as a comment-free ``name`` key."""
    values = to_dict(config)
    text = str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    # PyYAML writes this line break as it is, and reads it back as another.
    return str(yaml.safe_dump(values, sort_keys=False)) if "\x85" in text else text


def to_dict(config: Config) -> dict[str, Any]:
    """Every setting as JSON values, with the names of the chosen strategy, method and partition."""
    values = _plain(config)
    for group in ("strategy", "method", "partition"):
        values[group] = {"name": getattr(config, group).name} | values[group]
    return dict(values)


def settings_hash(config: Config) -> str:
    """SHA-256 (hex) over all settings but paths, federation, worker, output and device."""
    values = to_dict(config)
    for key in NOT_HASHED:
        *groups, last = key.split(".")
        node = values
        for group in groups:
            node = node[group]
        del node[last]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value.name if isinstance(value, Enum) else value


@cache
def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for strategy in STRATEGIES:
        store.store(group="strategy/fields", name=strategy.name, node=strategy)
    for method in METHODS:
        store.store(group="method", name=method.name, node=method)
    for partition in PARTITIONS:
        store.store(group="partition", name=partition.name, node=partition)


def _words(overrides: str | Sequence[str]) -> list[str]:
    if not isinstance(overrides, str):
        return list(overrides)
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ValueError(f"cannot read the settings {overrides!r}: {error}") from error


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        return list(OverridesParser.create().parse_overrides(list(overrides)))
    except OverrideParseException as error:
        raise ValueError(f"cannot read the setting {error.override!r}: write it as key=value") from error


def _check_form(override: Override) -> None:
    """Raise ``ValueError`` for what Hydra accepts beyond key=value: it would add or remove settings without a word."""
    key, value = override.key_or_group, override.value()
    if not key or override.is_add() or override.is_force_add() or override.is_delete() or override.package is not None:
        raise ValueError(f"cannot read the setting {override.input_line!r}: write it as key=value")
    if key.partition(".")[0] == "hydra":
        raise ValueError(
            f"{override.input_line}: Bouquet composes its settings with Hydra, but takes none of Hydra's own"
        )
    if key in GROUPS and not isinstance(value, str) and not override.is_sweep_override():
        given = override.get_value_string()
        raise ValueError(f"{key} must be a name, got {given!r}; what belongs to it is set by {key}.setting=value")
    if key in _OPEN and not isinstance(value, dict) and not override.is_sweep_override():
        raise ValueError(f"{key} must be {{{_OPEN[key]}}}, got {override.get_value_string()!r}")


def _choices(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    values = override.sweep_string_iterator()
    return [f"{override.get_key_element()}={value}" for value in values]


def _with_open_keys(word: str) -> str:
    """Some settings take any key, such as a column; Hydra wants a ``+`` for keys that are not declared."""
    open_keys = (f"{key}{sign}" for key in _OPEN for sign in ".=")
    return f"+{word}" if word.startswith(tuple(open_keys)) and not word.endswith("={}") else word


def _explain(error: Exception, words: Sequence[str]) -> str:
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    if isinstance(error, OverrideParseException):
        return f"cannot read the setting {error.override!r}: write it as key=value"
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        return f"{group} must be one of {', '.join(sorted(error.options))}, got {choice!r}"
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and cause.full_key:
        return _unknown_key(str(cause.full_key), cause.parent_node)
    if isinstance(cause, ValidationError) and cause.full_key:
        return f"{cause.full_key} must be {_type_of(str(cause.full_key), cause)}, got {_as_written(cause.value)}"
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        return f"{cause.full_key}: {str(cause.msg or cause).splitlines()[0]}"
    several = [word for word in words if _parse([word])[0].is_sweep_override()]
    if several:
        return f"{several[0]} names several values: add -m to sweep over them, or write key=[a,b] for a list"
    given = f" (settings given: {' '.join(words)})" if words else ""
    return str(cause).replace("\n", " ") + given


def _unknown_key(key: str, parent: Any) -> str:
    group = key.rpartition(".")[0]
    known = sorted(str(name) for name in parent if name != "hydra") if isinstance(parent, DictConfig) else []
    chosen = getattr(OmegaConf.get_type(parent), "name", None) if isinstance(parent, DictConfig) else None
    where = (f"{group}={chosen}" if chosen else group) or "the run"
    return f"unknown setting {key!r}; settings of {where}: {', '.join(known) or 'none'}"


def _type_of(key: str, error: ValidationError) -> str:
    """What the schema says a setting is, for people."""
    group, _, name = key.rpartition(".")
    if group in _OPEN:
        return _OPEN[group].partition(": ")[2]
    owner = error.object_type if dataclasses.is_dataclass(error.object_type) else Config
    declared = get_type_hints(owner).get(name, Any)
    kinds = get_args(declared) or (declared,)
    return " or ".join(_kind(kind) for kind in kinds)


def _kind(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    if dataclasses.is_dataclass(kind):
        return "a group of settings, each set by key.setting=value"
    return _KINDS.get(kind, str(kind))


def _as_written(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else repr(value)
