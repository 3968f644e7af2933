"""Merging gives a model that computes what base and adapter do together, or an error that names what is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from client.merge import merge_adapter
from client.model import adapted_model
from conf.model import LoraConfig
from tests.client.tiny_models import random_tokens, save_tiny_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base, and beside it ``adapter`` with all values 0.1."""
    config = save_tiny_base(tmp_path / "base", "olmoe")
    adapted = adapted_model(config, LoraConfig(rank=2), torch.device("cpu"))
    arrays = {name: array * 0 + 0.1 for name, array in adapted.initial_adapter(0).items()}
    adapted.save_peft(arrays, tmp_path / "adapter")
    return Path(config.name)


def test_merged_weights_compute_what_base_and_adapter_do(base: Path, tmp_path: Path) -> None:
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    tokens = random_tokens()
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        without = plain(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
        together = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(tokens).logits
    torch.testing.assert_close(merged, together, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(merged, without)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("adapter/adapter_config.json", "{0}/adapter"),
        ("adapter/adapter_model.safetensors", "{0}/adapter"),
        ("base/model.safetensors", "base model {0}/base of {0}/adapter"),
    ],
)
def test_what_is_damaged_is_named_and_nothing_is_left(base: Path, tmp_path: Path, name: str, named: str) -> None:
    (tmp_path / name).write_bytes(b"half")
    with pytest.raises(ValueError, match=f"^{named.format(tmp_path)} cannot be read: "):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", base.name]
