"""The local loop: AdamW over the trainable parameters of one site's model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from client.checkpointing import checkpointed_layers
from client.local_rule import LocalRule, Step, StepLoss
from client.memory import SMALLER, Passes, choose_micro_batch
from client.model import AdaptedModel
from client.routing import ExpertTokenCounter
from client.runtime import configure_torch
from client.text import TokenSequence
from client.throughput import Throughput, ThroughputMeter
from conf.schema import OptimizerState, TrainConfig
from strategies.adapters import Arrays, NotFiniteError

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square, as torch names them."""

_FLOAT16_LOSS_SCALE = 1024.0
"""Keeps float16 gradients above underflow. Fixed: a dynamic scale skips steps until it has settled, and a
round may have only a few."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What one round of local training yields."""

    adapter: Arrays
    optimizer: Arrays
    """Adam's moments and step counts by ``<kind>/<array>``, in the adapter's layout; empty unless they are kept."""
    expert_tokens: Arrays
    """MoE layer -> (num_experts,) float64: tokens routed to each expert, padding excluded."""
    micro_batch: int
    """Sequences of a forward and backward pass, at most."""
    num_steps: int
    num_tokens: int
    """Response tokens trained on, each as often as it was seen."""
    loss: float
    """Mean over those tokens of the loss when they were seen, nats per token unless the method has a loss of its own;
    without the proximal term."""
    seconds: float
    """Wall time from the first step on."""
    throughput: Throughput


def train(
    adapted: AdaptedModel,
    sequences: Sequence[TokenSequence],
    *,
    start: Arrays,
    anchor: Arrays,
    optimizer: Arrays,
    config: TrainConfig,
    generator: np.random.Generator,
    rule: LocalRule | None = None,
    passes: Passes | None = None,
) -> TrainingResult:
    """Train ``start`` on ``sequences`` in an order drawn from ``generator``; the result stays loaded.

    Args:
        adapted: The model.
        sequences: The site's training data.
        start: Adapter that training starts from.
        anchor: Arrays the proximal term pulls towards, the received ones, wherever training starts; an
            array that is not in it is not pulled.
        optimizer: ``TrainingResult.optimizer`` of an earlier round to go on from; empty: fresh moments.
        config: The settings under ``train.``.
        generator: Source of every random draw, torch's included.
        rule: What the method adds to the loop; None: nothing.
        passes: What the rule's forward passes go over (``Method.passes_over``); None: ``sequences``, once each.

    Raises:
        ValueError: If there is no sequence, ``start`` does not fit the model, a pass of ``train.micro_batch``
            sequences would not fit into memory, there is less than was found free, or the loss or a gradient is not
            finite.
    """
    if not sequences:
        raise ValueError("no training sequences")
    rule = rule or LocalRule()
    configure_torch(config)
    # Before memory is measured: a graft that an adapter lacks takes none.
    adapted.load_adapter(start)
    micro_batch = choose_micro_batch(adapted, passes or Passes(sequences), config)
    # Spawned, so that the order of the sequences is the generator's own stream.
    torch.manual_seed(int(generator.spawn(1)[0].integers(2**63)))
    adapted.model.train()
    loop = _Loop(
        adapted=adapted,
        rule=rule,
        config=config,
        adamw=_adamw(adapted, optimizer, config),
        anchored=_anchored(adapted, anchor) if config.proximal_mu > 0 else [],
        micro_batch=micro_batch,
        loss_scale=_FLOAT16_LOSS_SCALE if adapted.base.model.dtype is torch.float16 else 1.0,
    )
    total, num_steps, num_tokens, ran_out = 0.0, 0, 0, False
    meter = ThroughputMeter(adapted)
    try:
        with (
            adapted.count_expert_tokens() as counter,
            rule.watching(),
            checkpointed_layers(adapted.model, enabled=config.gradient_checkpointing),
        ):
            for chosen in _batches(sequences, config, generator):
                num_steps += 1
                found = loop.step(num_steps, chosen, counter)
                meter.add(found.sequences)
                total += found.total
                num_tokens += found.num_tokens
    except torch.OutOfMemoryError:
        ran_out = True
    finally:
        loop.adamw.zero_grad()  # the next site of this process needs the memory
    if ran_out:  # raised here: with the first error its tensors would stay
        raise ValueError(
            f"{adapted.device} ran out of memory in training step {num_steps}, {micro_batch} sequence(s) at a time, "
            f"though there was enough when the round began: see what else computes there, or set {SMALLER}"
        )
    throughput = meter.result(counter.totals())
    return TrainingResult(
        adapter=adapted.read_adapter(),
        optimizer=_optimizer_arrays(adapted, loop.adamw) if config.optimizer_state is OptimizerState.keep else {},
        expert_tokens=counter.totals(),
        micro_batch=micro_batch,
        num_steps=num_steps,
        num_tokens=num_tokens,
        loss=total / num_tokens,
        seconds=meter.seconds(),
        throughput=throughput,
    )


def _batches(
    sequences: Sequence[TokenSequence], config: TrainConfig, generator: np.random.Generator
) -> Iterator[list[TokenSequence]]:
    """The batches of a round: one epoch, or ``max_steps`` from as many epochs as it takes, each shuffled anew."""

    def endless() -> Iterator[list[TokenSequence]]:
        while True:
            order = generator.permutation(len(sequences))
            for first in range(0, len(order), config.batch_size):
                yield [sequences[index] for index in order[first : first + config.batch_size]]

    return itertools.islice(endless(), config.max_steps or math.ceil(len(sequences) / config.batch_size))


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What all steps of a round have in common."""

    adapted: AdaptedModel
    rule: LocalRule
    config: TrainConfig
    adamw: torch.optim.AdamW
    anchored: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Each parameter that the proximal term pulls, and what towards."""
    micro_batch: int
    loss_scale: float

    def step(self, number: int, chosen: Sequence[TokenSequence], counter: ExpertTokenCounter) -> StepLoss:
        """One step on the batch ``chosen``: the rule's gradients and the proximal term's, corrected and clipped.

        Raises:
            NotFiniteError: If the loss or a gradient is not finite.
        """
        self.adamw.zero_grad()
        found = self.rule.accumulate(
            Step(
                chosen=chosen,
                adapted=self.adapted,
                counter=counter,
                micro_batch=self.micro_batch,
                loss_scale=self.loss_scale,
            )
        )
        loss = torch.tensor(found.total / found.num_tokens)
        if self.anchored:
            proximal = _proximal_term(self.anchored, self.config.proximal_mu)
            torch.autograd.backward(proximal * self.loss_scale)
            loss += proximal.detach().cpu()
        self._unscale()
        self.rule.correct(self.adapted.parameters_by_name())
        self._clip(loss, number)
        self.adamw.step()
        return found

    def _unscale(self) -> None:
        if self.loss_scale != 1.0:
            for parameter in self.adapted.parameters_by_name().values():
                if parameter.grad is not None:
                    parameter.grad.div_(self.loss_scale)

    def _clip(self, loss: torch.Tensor, number: int) -> None:
        config = self.config
        length = torch.nn.utils.clip_grad_norm_(self.adapted.parameters_by_name().values(), config.max_grad_norm)
        if not (torch.isfinite(loss) and torch.isfinite(length)):
            raise NotFiniteError(
                f"training step {number}: loss is {loss.item():.4g} and the gradient's norm {length.item():.4g}; lower "
                f"train.learning_rate={config.learning_rate} or train.max_grad_norm={config.max_grad_norm}, or set "
                "model.dtype=float32"
            )


def _anchored(adapted: AdaptedModel, anchor: Arrays) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter that is pulled, and what it is pulled towards."""
    parameters = adapted.parameters_by_name()
    return [(parameters[name], adapted.from_canonical(name, array)) for name, array in anchor.items()]


def _proximal_term(anchored: Sequence[tuple[torch.Tensor, torch.Tensor]], mu: float) -> torch.Tensor:
    """FedProx's (mu / 2) ||w - anchor||^2 over pairs of w and anchor (Li et al. 2020, Eq. 2)."""
    return torch.stack([(weight - anchor).square().sum() for weight, anchor in anchored]).sum() * (mu / 2)


def _adamw(adapted: AdaptedModel, arrays: Arrays, config: TrainConfig) -> torch.optim.AdamW:
    """Fresh AdamW with the moments in ``arrays``, if any; its fused form, on a CPU too, takes a fourth of the time."""
    parameters = adapted.parameters_by_name()
    adamw = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=True,
    )
    state: dict[int, Mapping[str, torch.Tensor]] = {}
    for index, name in enumerate(parameters):
        if f"step/{name}" in arrays:
            moments = {kind: adapted.from_canonical(name, arrays[f"{kind}/{name}"]) for kind in _MOMENTS}
            state[index] = {"step": torch.tensor(float(arrays[f"step/{name}"])), **moments}
    adamw.load_state_dict({"state": state, "param_groups": adamw.state_dict()["param_groups"]})
    return adamw


def _optimizer_arrays(adapted: AdaptedModel, adamw: torch.optim.AdamW) -> dict[str, NDArray[np.float32]]:
    arrays = {}
    for name, parameter in adapted.parameters_by_name().items():
        state = adamw.state[parameter]
        if state:  # None of a parameter that never had a gradient.
            arrays[f"step/{name}"] = np.array(state["step"].item(), np.float32)
            arrays |= {f"{kind}/{name}": adapted.to_canonical(name, state[kind]) for kind in _MOMENTS}
    return arrays
