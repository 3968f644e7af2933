"""Makes the equal experts of an upcycled model differ, and says how far they do.

Shape suffixes: N tokens, D model width, E experts, B sequences, T tokens of a sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from client.adapter_layout import moe_layers
from client.embedded import pretraining_texts
from client.routing import balance_loss, count_expert_tokens, routing_entropy
from conf.model import Differentiation, UpcycleConfig

_LENGTH = 128
"""Tokens of a sequence of general text."""
_BATCH_SIZE = 8
_NUM_ROUTER_SEQUENCES = 32
_NUM_HELD_OUT = 4
_LEARNING_RATE = 5e-5
_BALANCE_WEIGHT = 0.01


@dataclass(frozen=True)
class GeneralText:
    """Token ids, int64 (sequences, 128)."""

    training: torch.Tensor
    held_out: torch.Tensor


def general_text(tokenizer: PreTrainedTokenizerBase, config: UpcycleConfig) -> GeneralText:
    """Text to fit routers and experts to, from ``config.text`` or generated, and a little more to judge them by.

    Raises:
        ValueError: If ``config.text`` cannot be read or is too short.
    """
    num_sequences = _NUM_ROUTER_SEQUENCES
    if config.differentiate is Differentiation.steps:
        num_sequences = max(num_sequences, config.steps * _BATCH_SIZE)
    wanted = (num_sequences + _NUM_HELD_OUT) * _LENGTH
    if config.text is None:
        # A generated text is about 40 characters: five tokens at the least.
        lines = pretraining_texts(wanted // 5, seed=0)
    else:
        lines = iter(Path(config.text).read_text(encoding="utf-8").splitlines())
    ids: list[int] = []
    while len(ids) < wanted and (batch := list(itertools.islice(lines, 256))):
        ids += tokenizer("\n".join([*batch, ""]), add_special_tokens=False)["input_ids"]
    smallest = (_NUM_HELD_OUT + _BATCH_SIZE) * _LENGTH
    if len(ids) < smallest:
        raise ValueError(f"model.upcycle.text={config.text} has {len(ids)} tokens, at least {smallest} are needed")
    sequences = torch.tensor(ids[: min(len(ids), wanted) // _LENGTH * _LENGTH]).reshape(-1, _LENGTH)
    return GeneralText(training=sequences[_NUM_HELD_OUT:], held_out=sequences[:_NUM_HELD_OUT])


def differentiate(model: PreTrainedModel, text: GeneralText, config: UpcycleConfig) -> None:
    """Fit the routers to clusters of what they see; with ``steps``, then train routers and experts."""
    fit_routers(model, text.training[:_NUM_ROUTER_SEQUENCES])
    if config.differentiate is Differentiation.steps:
        _train_experts(model, text.training, config.steps)


@torch.no_grad()
def fit_routers(model: PreTrainedModel, input_ids: torch.Tensor) -> None:
    """Set each router to k-means centres of its inputs on ``input_ids`` (sequences, time).

    As long as the experts are equal, no layer's inputs depend on any router: one pass serves all.
    """
    with _recorded_inputs(model) as inputs:
        for batch in torch.split(input_ids, _BATCH_SIZE):
            model(batch)
    generator = torch.Generator().manual_seed(0)
    for name, layer in moe_layers(model).items():
        router = model.get_parameter(f"{layer.router}.weight")
        router.copy_(router_rows(torch.cat(inputs[name]), layer.num_experts, generator))


def router_rows(inputs_ND: torch.Tensor, num_experts: int, generator: torch.Generator) -> torch.Tensor:
    """Router (E, D) that sends each input first to the nearest of E centres, logits having unit variance.

    Spherical k-means, as a router compares inner products. The inputs' mean direction, which most of
    their length is in, is left out of the centres: a router has no bias that could undo it.
    """
    inputs_ND = inputs_ND.float()
    mean_D = functional.normalize(inputs_ND.mean(dim=0), dim=0)
    points_ND = functional.normalize(inputs_ND - (inputs_ND @ mean_D)[:, None] * mean_D, dim=1)
    centres_ED = _farthest_points(points_ND, num_experts, generator)
    for _ in range(25):
        nearest_N = (points_ND @ centres_ED.T).argmax(dim=1)
        sums_ED = torch.zeros_like(centres_ED).index_add_(0, nearest_N, points_ND)
        is_empty_E = torch.bincount(nearest_N, minlength=num_experts) == 0
        centres_ED = torch.where(is_empty_E[:, None], centres_ED, functional.normalize(sums_ED, dim=1))
    return centres_ED / (inputs_ND @ centres_ED.T).std()


def _farthest_points(points_ND: torch.Tensor, num_centres: int, generator: torch.Generator) -> torch.Tensor:
    """First centres as k-means++ draws them: each with a chance that grows with its squared distance to the others."""
    chosen = [int(torch.randint(len(points_ND), (1,), generator=generator))]
    while len(chosen) < num_centres:
        distance_N = (1 - (points_ND @ points_ND[chosen].T).max(dim=1).values).clamp(min=0) + 1e-9
        chosen.append(int(torch.multinomial(distance_N, 1, generator=generator)))
    return points_ND[chosen]


@contextmanager
def _recorded_inputs(model: PreTrainedModel) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Layer -> what its experts are called with, (tokens, D) each time, while the context lasts."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in moe_layers(model)}
    handles = [
        model.get_submodule(f"{name}.experts").register_forward_pre_hook(
            lambda _module, args, seen=seen: seen.append(args[0].detach())
        )
        for name, seen in inputs.items()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _train_experts(model: PreTrainedModel, input_ids: torch.Tensor, steps: int) -> None:
    """A few AdamW steps on ``input_ids``; everything but routers and experts is frozen."""
    dtype: Any = model.dtype
    model.float().train().requires_grad_(requires_grad=False)  # type: ignore[no-untyped-call]
    trained = [
        parameter.requires_grad_()
        for layer in moe_layers(model).values()
        for path in (f"{layer.name}.experts", f"{layer.router}")
        for parameter in model.get_submodule(path).parameters()
    ]
    optimizer = torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=0.0)
    for step in range(steps):
        start = step * _BATCH_SIZE % (len(input_ids) - _BATCH_SIZE + 1)
        batch_BT = input_ids[start : start + _BATCH_SIZE]
        output = model(batch_BT, labels=batch_BT, output_router_logits=True)
        num_chosen = model.config.num_experts_per_tok
        balance = balance_loss(output.router_logits, num_chosen, torch.ones_like(batch_BT, dtype=torch.bool))
        # transformers adds its own balance loss to ``loss``; ours takes its place.
        loss = output.loss - model.config.router_aux_loss_coef * output.aux_loss + _BALANCE_WEIGHT * balance
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.to(dtype).eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def describe_experts(model: PreTrainedModel, text: GeneralText, dense_logits: torch.Tensor) -> dict[str, float]:
    """How far experts, their use and the logits on held-out text differ."""
    layers = moe_layers(model)
    experts = {name: model.get_submodule(f"{name}.experts") for name in layers}
    num_experts = {name: layer.num_experts for name, layer in layers.items()}
    with count_expert_tokens(experts, num_experts, model.device) as counter:
        counter.set_mask(torch.ones_like(text.held_out, dtype=torch.bool))
        logits = model(text.held_out).logits
    tokens = counter.totals().values()
    distances = [
        _relative_distance(getattr(experts[name], weight)) for name, layer in layers.items() for weight in layer.weights
    ]
    return {
        "mean_relative_expert_distance": float(np.mean(distances)),
        "mean_routing_entropy": float(np.mean([routing_entropy(tokens_E) for tokens_E in tokens])),
        "largest_expert_share": max(float(tokens_E.max() / tokens_E.sum()) for tokens_E in tokens),
        "max_logit_change": float((logits - dense_logits).abs().max()),
        "dense_loss": _loss(dense_logits, text.held_out),
        "loss": _loss(logits, text.held_out),
    }


def _relative_distance(weight: torch.Tensor) -> float:
    """Mean distance between two experts' weights over their mean norm; weight (E, ...)."""
    flat = weight.float().flatten(1)
    pairs = [float((flat[i] - flat[j]).norm()) for i, j in itertools.combinations(range(len(flat)), 2)]
    return float(np.mean(pairs)) / float(flat.norm(dim=1).mean())


def _loss(logits_BTV: torch.Tensor, input_ids_BT: torch.Tensor) -> float:
    """Mean nats per token."""
    return float(functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), input_ids_BT[:, 1:].flatten()))
