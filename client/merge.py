"""A base model with an adapter merged into its weights, for tools that know nothing of adapters."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from client.bases import without_progress_bars


def merge_adapter(adapter: Path, folder: Path) -> None:
    """Write ``folder`` in transformers' format: the adapter's base model plus (alpha / rank) B A, and its tokenizer.

    Raises:
        ValueError: If there is no adapter, its base model cannot be found, or ``folder`` is not empty.
    """
    if not (adapter / "adapter_config.json").exists():
        raise ValueError(f"{adapter} holds no adapter: the run did not complete a round")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another folder")
    path = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    with without_progress_bars():
        try:
            base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(path)
        except OSError as error:
            raise ValueError(f"base model {path} of {adapter} cannot be read: {error}") from error
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
