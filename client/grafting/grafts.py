"""A site's personal experts beside the routed ones of each MoE layer: what they compute, and how they are loaded.

Needs torch, transformers, peft and safetensors, and nothing of Bouquet: ``bouquet export`` puts a copy of this file
beside the arrays, so that ``load_personal`` works where Bouquet is not installed.

Shape suffixes: N tokens, D model width, I inputs, O outputs, R rank, M grafted experts of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

ARRAYS_FILE = "graft.safetensors"
"""File of an exported folder with the grafts' arrays, and their ``GraftSpec`` and layers as metadata."""
NO_GRAFT = -1
"""In place of an expert's number: the layer has no graft yet, and computes as if there were none."""
_MARK = ".graft."


def is_graft_array(name: str) -> bool:
    """Whether the array belongs to a graft: its weights, its gates, or which experts it was copied from."""
    return _MARK in name


def graft_name(layer: str, name: str) -> str:
    """The array ``name`` of one layer's graft, such as ``model.layers.0.mlp.graft.gate_weight``."""
    return f"{layer}{_MARK}{name}"


@dataclass(frozen=True)
class GraftSpec:
    """What all grafts of a model have in common."""

    num_experts: int = 1
    """M, grafted experts of a layer."""
    rank: int = 0
    """R of the low-rank change of a frozen expert; 0: a trainable copy of it."""
    scale: float = 1.0
    """Factor of the low-rank term: alpha / rank."""
    convex: bool = False
    """Whether the gates take from the routed experts what they give to the personal ones."""
    exact: bool = True
    """Whether an expert's contribution is its difference to the frozen one it was copied from."""


class Graft(nn.Module):
    """The personal experts E_m of one layer, float32, each with a gate s_m that looks at the token.

    With F(x) what the layer's routed experts give, E0_m the frozen expert that E_m was copied from (FLEx, 2025,
    https://arxiv.org/abs/2506.00965, whose formulas are known second-hand only):

    * exact:    ``y = F(x) + sum_m s_m(x) (E_m(x) - E0_m(x))``, ``s_m = sigmoid(w_m x + b_m)``: F itself at the start,
      yet the gradient of E_m is that of an expert with weight s_m;
    * additive: ``y = F(x) + sum_m s_m(x) E_m(x)``, with the same gates;
    * convex:   ``y = (1 - sum_m s_m(x)) F(x) + sum_m s_m(x) E_m(x)``, ``s = softmax(0, w_1 x + b_1, ...)`` without its
      first entry: a sigmoid where there is one personal expert.

    Shared experts, which some families add to F, are left alone.
    """

    choice: Tensor

    def __init__(self, experts: Any, spec: GraftSpec) -> None:
        """Zeros, on the first experts of the layer.

        Args:
            experts: The layer's module of fused experts, in transformers' experts interface.
            spec: What kind of graft.
        """
        super().__init__()
        self.spec = spec
        self._fused = {"up": "gate_up_proj" if experts.has_gate else "up_proj", "down": "down_proj"}
        device = experts.down_proj.device
        for own, fused in self._fused.items():
            for name, shape in _shapes(own, getattr(experts, fused).shape[1:], experts, spec.rank).items():
                setattr(self, name, nn.Parameter(torch.zeros(spec.num_experts, *shape, device=device)))
        width = getattr(experts, self._fused["up"]).shape[1 if experts.is_transposed else 2]
        self.gate_weight = nn.Parameter(torch.zeros(spec.num_experts, width, device=device))
        self.gate_bias = nn.Parameter(torch.zeros(spec.num_experts, device=device))
        # On the CPU, where asking it keeps no GPU waiting.
        self.register_buffer("choice", torch.arange(spec.num_experts))

    def forward(self, experts: Any, tokens: Tensor, routed: Tensor) -> Tensor:
        """The layer's output with its graft.

        Args:
            experts: The layer's module of fused experts.
            tokens: (N, D) what the experts were given.
            routed: (N, D) F, what they made of it.
        """
        chosen = self.choice.tolist()
        if NO_GRAFT in chosen:
            return routed
        x_ND = tokens.to(experts.down_proj.dtype)
        gate_NM = functional.linear(x_ND, self.gate_weight.to(x_ND.dtype), self.gate_bias.to(x_ND.dtype)).float()
        if self.spec.convex:
            share_NM = functional.pad(gate_NM, (1, 0)).softmax(dim=-1)[:, 1:]
            output = (1 - share_NM.sum(dim=-1, keepdim=True)).to(routed.dtype) * routed
        else:
            share_NM, output = gate_NM.sigmoid(), routed
        for place, expert in enumerate(chosen):
            personal_ND = self._expert(experts, x_ND, expert, place)
            if self.spec.exact:
                personal_ND = personal_ND - self._expert(experts, x_ND, expert)
            output = output + (share_NM[:, place, None] * personal_ND).to(routed.dtype)
        return output

    def copied(self, experts: Any, chosen: Iterable[int], generator: torch.Generator) -> dict[str, Tensor]:
        """This graft's arrays as they are before training, on the given experts.

        A copy of each expert, or factors of which A is uniform within 1 / sqrt(inputs) and B zero; gates of 1/2.
        """
        choice = torch.tensor(list(chosen))
        arrays = {name: torch.zeros(parameter.shape) for name, parameter in self.named_parameters()}
        for own, fused in self._fused.items():
            if self.spec.rank:
                shape = arrays[f"{own}_A"].shape
                uniform = torch.rand(shape, generator=generator)
                arrays[f"{own}_A"] = (2 * uniform - 1) * shape[-1] ** -0.5
                continue
            arrays[own] = getattr(experts, fused)[choice.to(experts.down_proj.device)].float().cpu()
            if experts.has_bias:
                bias = getattr(experts, f"{fused}_bias")[choice.to(experts.down_proj.device)]
                arrays[f"{own}_bias"] = bias.float().cpu()
        return {**arrays, "choice": choice}

    def _expert(self, experts: Any, x_ND: Tensor, expert: int, place: int | None = None) -> Tensor:
        """The frozen expert's output, or with a ``place`` that of the personal one made from it."""
        opened = self._project("up", experts, x_ND, expert, place)
        inner = experts._apply_gate(opened) if experts.has_gate else experts.act_fn(opened)
        output = self._project("down", experts, inner, expert, place)
        norm = getattr(experts, "post_expert_norm", None)
        return output if norm is None else norm(output)

    def _project(self, own: str, experts: Any, x_NI: Tensor, expert: int, place: int | None) -> Tensor:
        fused = self._fused[own]
        weight = getattr(experts, fused)[expert]
        bias = getattr(experts, f"{fused}_bias")[expert] if experts.has_bias else None
        if place is not None and not self.spec.rank:
            weight = getattr(self, own)[place].to(x_NI.dtype)
            bias = getattr(self, f"{own}_bias")[place].to(x_NI.dtype) if experts.has_bias else None
        y_NO = functional.linear(x_NI, weight.mT if experts.is_transposed else weight, bias)
        if place is not None and self.spec.rank:
            A_RI, B_OR = (getattr(self, f"{own}_{factor}")[place].to(x_NI.dtype) for factor in "AB")
            y_NO = y_NO + self.spec.scale * functional.linear(functional.linear(x_NI, A_RI), B_OR)
        return y_NO


def _shapes(own: str, weight: torch.Size, experts: Any, rank: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what is trained of one projection, without the axis of grafted experts."""
    inputs, outputs = tuple(weight) if experts.is_transposed else tuple(weight)[::-1]
    if rank:
        return {f"{own}_A": (rank, inputs), f"{own}_B": (outputs, rank)}
    return {own: tuple(weight)} | ({f"{own}_bias": (outputs,)} if experts.has_bias else {})


def attach_grafts(model: nn.Module, layers: Iterable[str], spec: GraftSpec) -> dict[str, Graft]:
    """Give the experts of each layer a graft that acts from now on; layer -> graft.

    Args:
        model: A model of transformers, without PEFT around it.
        layers: Names of MoE layers, such as ``model.layers.0.mlp``.
        spec: What kind of grafts.
    """
    grafts = {}
    for layer in layers:
        experts: Any = model.get_submodule(f"{layer}.experts")
        grafts[layer] = experts.graft = Graft(experts, spec)
        experts.register_forward_hook(_add_graft)
    return grafts


def _add_graft(experts: Any, inputs: tuple[Tensor, ...], routed: Tensor) -> Tensor:
    output: Tensor = experts.graft(experts, inputs[0], routed)
    return output


def graft_metadata(layers: Iterable[str], spec: GraftSpec) -> dict[str, str]:
    """What ``ARRAYS_FILE`` says about its arrays, in safetensors' metadata."""
    return {"graft": json.dumps({"layers": list(layers), "spec": asdict(spec)})}


def load_personal(folder: str | Path, **settings: Any) -> PeftModel:
    """The model that ``bouquet export`` wrote: base, adapter and, where there is one, graft; ready to generate.

    Args:
        folder: The exported folder.
        settings: For ``AutoModelForCausalLM.from_pretrained``, such as ``dtype`` or ``device_map``.

    Raises:
        OSError: If the base model that the adapter names cannot be had.
    """
    path = Path(folder)
    base = AutoModelForCausalLM.from_pretrained(
        PeftConfig.from_pretrained(str(path)).base_model_name_or_path, **settings
    )
    model = PeftModel.from_pretrained(base, str(path))
    if (path / ARRAYS_FILE).exists():
        with safe_open(path / ARRAYS_FILE, framework="pt") as file, torch.no_grad():
            described = json.loads(file.metadata()["graft"])
            grafts = attach_grafts(model.get_base_model(), described["layers"], GraftSpec(**described["spec"]))
            for layer, graft in grafts.items():
                for name, tensor in (*graft.named_parameters(), *graft.named_buffers()):
                    tensor.copy_(file.get_tensor(graft_name(layer, name)))
    return model.eval()
