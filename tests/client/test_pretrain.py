"""The command that rebuilds the packaged model; its real run takes minutes, here it takes three steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from client.pretrain import pretrain_tiny_moe


def pretrain(folder: Path) -> dict[str, float]:
    return pretrain_tiny_moe(folder, steps=3, seed=1, num_threads=torch.get_num_threads(), num_held_out=40)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(folder)
    return folder


def test_what_is_written_is_a_base_model_with_its_record(pretrained: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pretrained, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    record = json.loads((pretrained / "pretraining.json").read_text())
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert record["settings"]["steps"] == 3
    assert record["settings"]["seed"] == 1
    # A byte costs ln 259 = 5.56 nats before training.
    assert 0 < record["results"]["shared_nats_per_response_token"] < 5.56
    assert 0 <= record["results"]["house_rule_whole_answers_correct"] <= 1


def test_a_seed_makes_the_same_model_again(pretrained: Path, tmp_path: Path) -> None:
    pretrain(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (pretrained / "model.safetensors").read_bytes()


def test_what_is_there_is_refused_before_training(pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("client.pretrain.train_whole_model")
    for taken in (pretrained, pretrained / "config.json"):
        with pytest.raises(ValueError, match=f"{taken} cannot be "):
            pretrain(taken)


def test_an_interrupted_training_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("client.pretrain._evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
