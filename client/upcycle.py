"""Turns a dense model into a mixture of experts by copying each feed-forward block.

Sparse upcycling (Komatsuzaki et al., 2023, https://arxiv.org/abs/2212.05055), with routing weights that add up to
one: the copies of a block then compute together what the block did, whichever of them are chosen. How copies are
made to differ is in ``client/differentiate.py``.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from client.adapter_layout import moe_layers
from client.differentiate import describe_experts, differentiate, general_text
from client.text import read_tokenizer
from conf.model import Differentiation, UpcycleConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _MoeFamily:
    """A mixture of experts whose layers are those of a dense family but for the feed-forward block."""

    model_type: str
    block: str
    """Name of the layer's module that takes the place of ``mlp``."""
    num_experts_key: str
    width_key: str = "intermediate_size"
    """Setting that holds an expert's width."""


_MIXTRAL = _MoeFamily("mixtral", "mlp", "num_local_experts")
_FAMILIES = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "qwen3": _MoeFamily("qwen3_moe", "mlp", "num_experts", "moe_intermediate_size"),
    "granite": _MoeFamily("granitemoe", "block_sparse_moe", "num_local_experts"),
}

# Not carried over: they name the dense class, or the library that wrote its configuration.
_OWN_SETTINGS = {"model_type", "architectures", "transformers_version", "dtype", "quantization_config"}


def upcycle_folder(dense_folder: Path, config: UpcycleConfig, target: Path) -> None:
    """Upcycle the model in ``dense_folder`` into ``target``: weights, tokenizer, and ``upcycle.json``.

    The report says how far the experts and their use differ, and how far the logits moved.

    Raises:
        ValueError: If the family cannot be upcycled, or ``model.upcycle.text`` is too short.
    """
    dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype="auto")
    tokenizer = read_tokenizer(dense_folder)
    text = general_text(tokenizer, config)
    model = upcycle(dense, config)
    with torch.no_grad():
        dense_logits = dense(text.held_out).logits
    del dense
    if config.differentiate is not Differentiation.none:
        differentiate(model, text, config)
    report = {
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "differentiate": config.differentiate.value,
        **describe_experts(model, text, dense_logits),
    }
    logger.info("upcycled %s: %s", dense_folder.name, report)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "upcycle.json").write_text(json.dumps(report, indent=2) + "\n")


def upcycle(dense: PreTrainedModel, config: UpcycleConfig) -> PreTrainedModel:
    """A mixture of ``config.num_experts`` equal experts with random routers, and the logits of ``dense``.

    Raises:
        ValueError: If the family cannot be upcycled, or the model has a part the mixture's family lacks.
    """
    family = _FAMILIES.get(dense.config.model_type)
    if family is None:
        raise ValueError(
            f"model.upcycle.num_experts={config.num_experts}: cannot upcycle a model of type "
            f"{dense.config.model_type}, only {', '.join(_FAMILIES)}; set model.upcycle.num_experts=0"
        )
    moe_config = _moe_config(dense.config, family, config)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(moe_config, dtype=dense.dtype)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    state = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    for layer in moe_layers(model).values():
        block: Any = dense.get_submodule(layer.name.replace(family.block, "mlp"))
        gate_up = torch.cat([block.gate_proj.weight, block.up_proj.weight])
        state[f"{layer.name}.experts.gate_up_proj"] = gate_up.expand(config.num_experts, -1, -1)
        state[f"{layer.name}.experts.down_proj"] = block.down_proj.weight.expand(config.num_experts, -1, -1)
        router_ED = torch.randn(config.num_experts, gate_up.shape[1], generator=generator)
        state[f"{layer.router}.weight"] = dense.config.initializer_range * router_ED
    model.load_state_dict(state)
    model.generation_config = dense.generation_config
    model.train(mode=False)
    return model


def _moe_config(dense: PreTrainedConfig, family: _MoeFamily, config: UpcycleConfig) -> PreTrainedConfig:
    """The dense model's settings, as far as the mixture's family has them, and those of the experts."""
    settings: dict[str, Any] = dense.to_dict()
    known = AutoConfig.for_model(family.model_type).to_dict().keys()
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key) and (key == "mlp_bias" or key not in known):
            raise ValueError(f"cannot upcycle a {dense.model_type} model with {key}=true: {family.model_type} has none")
    if "sliding_attention" in (settings.get("layer_types") or []):
        raise ValueError(f"cannot upcycle a {dense.model_type} model with sliding attention in some layers")
    carried = {key: value for key, value in settings.items() if key in known - _OWN_SETTINGS}
    carried[family.width_key] = settings["intermediate_size"]
    carried[family.num_experts_key] = config.num_experts
    carried["num_experts_per_tok"] = config.experts_per_token
    if "norm_topk_prob" in known:
        carried["norm_topk_prob"] = True
    return AutoConfig.for_model(family.model_type, **carried)
