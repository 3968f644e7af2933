"""Federated DPO at a site: pairs of responses, each objective's at its own weight.

Shape suffixes: P pairs, T tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from client.alignment.rollouts import reference_log_probabilities, token_log_probabilities
from client.local_rule import LocalRule, Step, StepLoss
from client.memory import Passes
from client.methods.base import Method
from client.model import AdaptedModel
from client.prompts import PreferencePair, encode_pairs
from client.text import Example, TokenSequence, collate
from conf.alignment import DpoConfig, preference_of
from conf.methods import MethodConfig
from conf.schema import DataConfig
from strategies.adapters import Arrays

log = logging.getLogger("bouquet.client")


class Dpo(Method):
    """Direct preference optimisation (Rafailov et al. 2023, Eq. 7, https://arxiv.org/abs/2305.18290) at each site.

    The reference is the base model, which is the model with its adapter off. With several objectives each pair
    belongs to one, and the loss is the sum of the objectives' mean losses at the site's preference: the linear
    scalarisation that users of DPO have. Everything trained is sent.
    """

    def __init__(self, config: MethodConfig) -> None:
        """Take the settings under ``method.``."""
        assert isinstance(config, DpoConfig)
        self.config = config

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Everything trained is sent."""
        return True

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig
    ) -> Sequence[TokenSequence]:
        """Pairs of the objectives trained on, weighted.

        Raises:
            ValueError: If none is of such an objective, or as ``encode_pairs``.
        """
        wanted = self.config.objectives
        chosen = [example for example in examples if not wanted or example.objective in wanted]
        if examples and not chosen:
            # The server is told no value of a column: the run's settings name it, and it may hold text.
            log.error("data.objective_column holds %s", sorted({example.objective for example in examples})[:20])
            raise ValueError(f"method.objectives={wanted} are those of none of {len(examples)} pairs")
        return weighted(self.config, encode_pairs(chosen, tokenizer, data))

    def passes_over(self, sequences: Sequence[TokenSequence]) -> Passes:
        """Both responses of every pair."""
        return Passes(_both_responses(_as_pairs(sequences)), per_example=2)

    def local_rule(self, adapted: AdaptedModel, broadcast: Arrays, private: Arrays) -> LocalRule:  # noqa: ARG002
        """DPO's loss in place of the supervised one."""
        return PairwiseLoss(self.config.beta)

    def measures(
        self, adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], batch_size: int
    ) -> dict[str, float]:
        """How often and by how much, in nats, pairs are ranked right: of each of ``method.objectives``, or of all."""
        adapted.load_adapter(adapter)
        margins: dict[str, list[float]] = {}
        with adapted.evaluating(), torch.no_grad():
            for first in range(0, len(sequences), batch_size):
                pairs = _as_pairs(sequences[first : first + batch_size])
                for pair, margin in zip(pairs, margins_of(adapted, pairs).tolist(), strict=True):
                    named = pair.objective if pair.objective in self.config.objectives else "pairs"
                    margins.setdefault(named, []).append(margin)
        found = {}
        for name, values in sorted(margins.items()):
            found[f"held_out_accuracy/{name}"] = sum(value > 0 for value in values) / len(values)
            found[f"held_out_margin/{name}"] = sum(values) / len(values)
        return found


class PairwiseLoss(LocalRule):
    """The weighted mean over pairs of -log sigmoid(beta * margin)."""

    def __init__(self, beta: float) -> None:
        self._beta = beta

    def accumulate(self, step: Step) -> StepLoss:
        """Gradients of the weighted mean over the step's pairs; ``micro_batch`` counts sequences, two a pair."""
        pairs = _as_pairs(step.chosen)
        weights_P = torch.tensor([pair.weight for pair in pairs], device=step.adapted.device)
        size, total = max(1, step.micro_batch // 2), 0.0
        for first in range(0, len(pairs), size):
            part = slice(first, first + size)
            margins_P = margins_of(step.adapted, pairs[part], step)
            loss = -(weights_P[part] * functional.logsigmoid(self._beta * margins_P)).sum() / len(pairs)
            torch.autograd.backward(loss * step.loss_scale)
            total += float(loss.detach())
        sequences = _both_responses(pairs)
        return StepLoss(total=total * sum(sequence.num_targets for sequence in sequences), sequences=sequences)


def _both_responses(pairs: Sequence[PreferencePair]) -> list[TokenSequence]:
    return [sequence for pair in pairs for sequence in (pair, pair.rejected)]


def weighted(config: DpoConfig, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs with weights that make a mean over them the preferred mean over objectives.

    Each pair has its objective's preference over that objective's share of the pairs.

    A site that has no pair of an objective shares its preference out among the others.

    Raises:
        ValueError: If nothing that the site has is preferred at all.
    """
    if not config.objectives or not pairs:
        return list(pairs)
    preference = dict(zip(config.objectives, preference_of(config.preference, config.num_objectives()), strict=True))
    counts = Counter(pair.objective for pair in pairs)
    present = sum(preference[name] for name in counts)
    if present <= 0:
        raise ValueError(f"method.preference gives no weight to {sorted(counts)}, all pairs there are")
    each = {name: preference[name] / present * len(pairs) / count for name, count in counts.items()}
    return [replace(pair, weight=each[pair.objective]) for pair in pairs]


def margins_of(adapted: AdaptedModel, pairs: Sequence[PreferencePair], step: Step | None = None) -> Tensor:
    """(P,) log(policy / reference) of the preferred responses less that of the others, nats; Eq. 7 without beta.

    Args:
        adapted: The model, with the policy's adapter loaded.
        pairs: At least one.
        step: The step that trains on them, if one does.
    """
    sequences = [*pairs, *(pair.rejected for pair in pairs)]
    batch = collate(sequences, adapted.tokenizer.pad_token_id)
    if step is not None:
        step.counter.pause()
    reference_T = reference_log_probabilities(adapted, batch)
    if step is not None:
        step.counter.set_mask(batch["token_mask"])
    log_ratio_T = token_log_probabilities(adapted, batch) - reference_T
    sums = [part.sum() for part in torch.split(log_ratio_T, [sequence.num_targets for sequence in sequences])]
    return torch.stack(sums[: len(pairs)]) - torch.stack(sums[len(pairs) :])


def _as_pairs(sequences: Sequence[TokenSequence]) -> Sequence[PreferencePair]:
    assert all(isinstance(sequence, PreferencePair) for sequence in sequences), "made by Dpo.encode"
    return cast("Sequence[PreferencePair]", sequences)
