"""A base model with an adapter merged into its weights, for tools that know nothing of adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

from client.bases import without_progress_bars
from client.folders import new_folder, reading
from client.text import read_tokenizer


def merge_adapter(adapter: Path, folder: Path) -> None:
    """Write ``folder`` in transformers' format: the adapter's base model plus (alpha / rank) B A, and its tokenizer.

    Raises:
        ValueError: If there is no adapter, it or its base model cannot be read, or ``folder`` is not empty.
    """
    if not (adapter / "adapter_config.json").exists():
        raise ValueError(f"{adapter} holds no adapter: the run did not complete a round")
    with new_folder(folder) as written, without_progress_bars():
        with reading(adapter):
            path = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
        with reading(f"base model {path} of {adapter}"):
            base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            tokenizer = read_tokenizer(path)
        with reading(adapter):
            merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        merged.save_pretrained(written)
        tokenizer.save_pretrained(written)
