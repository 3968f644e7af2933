"""A linear reward head from preference pairs: a logistic regression on differences of hidden states.

Shape suffixes: P pairs, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from client.alignment.reward_models import HeadFacts, LinearHead, pair_features
from client.model import AdaptedModel
from client.templates import chat_message
from client.text import Example
from conf.schema import DataConfig

_MAX_STEPS = 200


@dataclass(frozen=True)
class Pairs:
    """Hidden states of the two responses of each pair."""

    preferred_PD: Tensor
    rejected_PD: Tensor

    @property
    def differences(self) -> Tensor:
        """(P, D) preferred less rejected, float64."""
        return self.preferred_PD.double() - self.rejected_PD.double()


def features_of(adapted: AdaptedModel, examples: Sequence[Example], data: DataConfig) -> Pairs:
    """The base's hidden states of pairs.

    Raises:
        ValueError: If there is no pair, or one lacks its rejected response.
    """
    if not examples:
        raise ValueError("no preference pairs: see data.path, data.filter and --objective")
    if not all(example.rejected.strip() for example in examples):
        raise ValueError(f"data.rejected_column={data.rejected_column!r} is empty in some pairs")
    prompts = [chat_message(example) for example in examples]
    return Pairs(
        pair_features(adapted, prompts, [example.response for example in examples], data),
        pair_features(adapted, prompts, [example.rejected for example in examples], data),
    )


def bradley_terry_weights(differences_PD: Tensor, penalty: float) -> Tensor:
    """(D,) float64: the weights that minimise mean log(1 + exp(-w . d)) + penalty / 2 * |s * w|^2.

    Bradley and Terry's model of preferences, a convex problem; s is the deviation of each coordinate of d about zero,
    so the penalty does not depend on the units of a hidden state.

    Args:
        differences_PD: Hidden states of the preferred responses less those of the rejected.
        penalty: > 0; without one the weights of pairs that can be told apart would grow for ever.
    """
    scale_D = differences_PD.square().mean(dim=0).sqrt().clamp(min=1e-12)
    scaled_PD = differences_PD / scale_D
    weight_D = torch.zeros_like(scale_D, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [weight_D], max_iter=_MAX_STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = functional.softplus(-(scaled_PD @ weight_D)).mean() + 0.5 * penalty * weight_D.square().sum()
        torch.autograd.backward(value)
        return value

    lbfgs.step(loss)  # type: ignore[no-untyped-call]
    return weight_D.detach() / scale_D


def accuracy(weight_D: Tensor, pairs: Pairs) -> float:
    """Share of the pairs whose preferred response is scored higher; equal scores count half."""
    margins_P = pairs.differences @ weight_D.to(pairs.preferred_PD.device).double()
    return float(((margins_P > 0).double() + 0.5 * (margins_P == 0).double()).mean())


def train_head(
    adapted: AdaptedModel,
    training: Sequence[Example],
    held_out: Mapping[str, Sequence[Example]],
    *,
    objective: str,
    data: DataConfig,
    penalty: float,
) -> LinearHead:
    """A head fitted to ``training``, scaled so that rewards of its responses have a deviation of 1.

    Its accuracy is told of ``training`` and, by their names, of the sets of pairs in ``held_out``.

    Raises:
        ValueError: As ``features_of``.
    """
    assert data.template is not None
    fitted = features_of(adapted, training, data)
    weight_D = bradley_terry_weights(fitted.differences, penalty)
    rewards = torch.cat([fitted.preferred_PD, fitted.rejected_PD]).double() @ weight_D
    weight_D = weight_D / rewards.std().clamp(min=1e-12)
    found = {"training": accuracy(weight_D, fitted)}
    found |= {name: accuracy(weight_D, features_of(adapted, pairs, data)) for name, pairs in held_out.items()}
    identity = adapted.base.identity
    facts = HeadFacts(
        objective=objective,
        base_name=Path(identity.name).name if Path(identity.name).is_absolute() else identity.name,
        base_sha256=identity.sha256,
        template=data.template.name,
        max_length=data.max_length,
        num_pairs=len(training),
        accuracy=found,
    )
    return LinearHead(weight_D.float().cpu(), facts)
