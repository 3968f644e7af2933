"""Tiny random models of every checked family, made in milliseconds and the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from conf.model import ModelConfig, ModelSource

VOCAB_SIZE = 272
NUM_EXPERTS = 4
TOP_K = 2
NUM_LAYERS = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {"intermediate_size": 24, "num_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "intermediate_size": 20,
            "moe_intermediate_size": 24,
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
            "head_dim": 8,
        },
    ),
    # A shared expert beside the routed ones, behind a gate of its own.
    "qwen2_moe": (
        "qwen2_moe",
        {
            "intermediate_size": 20,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20,
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
        },
    ),
    "mixtral": (
        "mixtral",
        {"intermediate_size": 24, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "head_dim": 8},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            "intermediate_size": 20,
            "moe_intermediate_size": 24,
            "n_routed_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 6,
            "kv_lora_rank": 6,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "intermediate_size": 24,
            "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "granitemoe": (
        "granitemoe",
        {"intermediate_size": 24, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K},
    ),
    "llama": ("llama", {"intermediate_size": 20, "head_dim": 8}),
    "mistral": ("mistral", {"intermediate_size": 20, "head_dim": 8}),
    "qwen3": ("qwen3", {"intermediate_size": 20, "head_dim": 8}),
    "granite": ("granite", {"intermediate_size": 20}),
    "gpt2": ("gpt2", {"n_positions": 512}),
    # Plain experts, without a gate; the mixer of its second layer is the MoE.
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["attention", "moe"],
            "intermediate_size": 24,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "n_routed_experts": NUM_EXPERTS,
            "num_experts_per_tok": TOP_K,
            "head_dim": 8,
        },
    ),
    # Its router draws one expert after the other: with one left, the second is drawn from nothing.
    "phimoe": (
        "phimoe",
        {"intermediate_size": 24, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K},
    ),
    # Its layer hands the router a bias.
    "minimax_m2": (
        "minimax_m2",
        {"intermediate_size": 24, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": TOP_K, "head_dim": 8},
    ),
    # The experts' weights are joined into plain matrices.
    "dbrx": (
        "dbrx",
        {
            "d_model": 16,
            "n_heads": 2,
            "n_layers": NUM_LAYERS,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": NUM_EXPERTS, "moe_top_k": TOP_K},
        },
    ),
    # Its experts take every token and so have no place in transformers' experts interface.
    "llama4_text": (
        "llama4_text",
        {"intermediate_size": 24, "intermediate_size_mlp": 24, "num_local_experts": NUM_EXPERTS, "head_dim": 8},
    ),
}

MOE_FAMILIES = ("olmoe", "qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe")
DENSE_FAMILIES = ("llama",)


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Configuration of a model of ``family`` with two layers, width 16 and (MoE) four experts, two a token."""
    model_type, settings = _FAMILIES[family]
    return AutoConfig.for_model(model_type, **{**_COMMON, **settings, **overrides})


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Model of ``family`` whose every parameter is random, so that no projection, bias or router is zero."""
    model: Any = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.2 * torch.randn(parameter.shape, generator=generator))
    tiny: PreTrainedModel = model.eval()
    return tiny


def save_tiny_base(folder: Path, family: str, seed: int = 0, **overrides: Any) -> ModelConfig:
    """Write ``tiny_model`` with the byte tokenizer into ``folder``, as a base model of ours; settings that name it."""
    # Imported here: a test that only needs a model need not have the tokenizer.
    from client.text import byte_tokenizer

    tiny_model(family, seed, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelConfig(name=str(folder), source=ModelSource.hub)


def random_tokens(batch_size: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Token ids (batch_size, length), int64."""
    return torch.randint(0, 256, (batch_size, length), generator=torch.Generator().manual_seed(seed))
