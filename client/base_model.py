"""The frozen base model of a process: read once, whoever asks."""

from __future__ import annotations

import copy
import secrets
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from client.bases import BaseIdentity, materialise, without_progress_bars
from client.folders import reading
from client.quantization import quantize_int8
from client.text import read_tokenizer
from conf.model import ModelConfig, Quantization


@dataclass(frozen=True)
class BaseModel:
    """A base model as it was pre-trained; nothing changes it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity


_bases: dict[str, BaseModel] = {}
_num_base_loads = 0


def base_model_loads() -> int:
    """How often this process has read a base model from disk."""
    return _num_base_loads


@cache
def process_name(pid: int) -> str:  # noqa: ARG001 - a forked process is another one
    """A name for the process of that id, by which its counts can be told apart, and which tells nothing of it."""
    return secrets.token_hex(8)


def load_base(model: ModelConfig, device: torch.device) -> BaseModel:
    """The base model that ``model`` names, in its dtype and without gradients; read once a process.

    Raises:
        ValueError: If the base cannot be had (see ``client.bases.materialise``), is damaged or no causal language
            model, or is to be quantised without torchao.
    """
    global _num_base_loads  # noqa: PLW0603
    key = repr((model.name, model.source, model.wheel_dir, model.upcycle, model.dtype, model.quantization, device))
    if key not in _bases:
        identity = materialise(model)
        dtype: torch.dtype = getattr(torch, model.dtype.value)
        with without_progress_bars(), reading(identity.folder):
            network: Any = AutoModelForCausalLM.from_pretrained(identity.folder, dtype=dtype)
            tokenizer = read_tokenizer(identity.folder)
        network.to(device).eval().requires_grad_(requires_grad=False)
        if model.quantization is Quantization.int8:
            quantize_int8(network)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        _bases[key] = BaseModel(network, tokenizer, identity)
        _num_base_loads += 1
    return _bases[key]


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same modules around the same tensors, for PEFT to wrap; ``model`` itself stays as it is."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
