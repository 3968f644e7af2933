"""How good a federation's model is: over all test examples, and on each site's own.

Shapes: N examples, L label words, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.federation import Federation
from client.evaluation.examination import answered
from client.evaluation.held_out import held_out_loss
from client.model import AdaptedModel
from client.text import IGNORED_LABEL, Example, TokenSequence, collate, encode
from conf.schema import Config
from strategies.adapters import Arrays
from strategies.experts import by_layer, norms

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one model, or the mean over the sites' models where nobody has a global one."""

    loss: float
    """Mean over all test examples: nats of the label word; without label words, nats per response token."""
    accuracy: float | None
    """Share of test examples whose label word is the likeliest; None without label words."""
    sites: dict[str, float]
    """Site -> the same on its own test examples: accuracy, without label words the loss."""


class Judge:
    """Test examples of every site, encoded once."""

    def __init__(
        self, adapted: AdaptedModel, config: Config, test: Mapping[str, Sequence[Example]], labels: Sequence[str]
    ) -> None:
        """Encode.

        Args:
            adapted: The model.
            config: The run's settings.
            test: Site -> its test examples; with ``labels`` every response is one of them.
            labels: Words that the model is to choose from; empty: the loss alone is measured.

        Raises:
            ValueError: If a label word is not exactly one token of the model's vocabulary.
        """
        self.adapted = adapted
        self.examples = test
        self.test = {name: encode(examples, adapted.tokenizer, config.data) for name, examples in test.items()}
        self.label_ids = torch.tensor([_one_token(adapted, label) for label in labels], dtype=torch.int64)

    def score(self, federation: Federation) -> Score:
        """Of the global model; where there is none, of the sites' own models, each on all examples and on its own."""
        names = federation.adapted.parameters_by_name().keys()
        if federation.adapter.keys() == names and not federation.personal:
            return self.score_of(federation.adapter)
        own = {name: site.adapter_in_use(federation.received(name)) for name, site in federation.sites.items()}
        scores = {name: self.score_of(adapter) for name, adapter in own.items()}
        accuracies = [score.accuracy for score in scores.values() if score.accuracy is not None]
        return Score(
            loss=float(np.mean([score.loss for score in scores.values()])),
            accuracy=float(np.mean(accuracies)) if accuracies else None,
            sites={name: score.sites[name] for name, score in scores.items()},
        )

    def score_of(self, adapter: Arrays) -> Score:
        """Of the model with this adapter."""
        if len(self.label_ids):
            return self._by_labels(adapter)
        losses = {name: held_out_loss(self.adapted, adapter, test, BATCH) for name, test in self.test.items()}
        weights = [loss.num_tokens for loss in losses.values()]
        return Score(
            loss=float(np.average([loss.loss for loss in losses.values()], weights=weights)),
            accuracy=None,
            sites={name: loss.loss for name, loss in losses.items()},
        )

    def rouge_l(self, federation: Federation) -> float:
        """Of greedy answers to the first test examples of each site, mean over the sites of the model in use there."""
        found = []
        for name, site in federation.sites.items():
            in_use = site.in_use(federation.received(name))
            found.append(answered(in_use, self.examples[name], self.adapted, federation.config)[0])
        return float(np.mean(found))

    def _by_labels(self, adapter: Arrays) -> Score:
        everything = [sequence for sequences in self.test.values() for sequence in sequences]
        nll_N, is_right_N = label_scores(self.adapted, adapter, everything, self.label_ids)
        ends = np.cumsum([len(sequences) for sequences in self.test.values()])[:-1]
        of_sites = zip(self.test, np.split(is_right_N, ends), strict=True)
        return Score(
            loss=float(nll_N.mean()),
            accuracy=float(is_right_N.mean()),
            sites={name: float(right.mean()) for name, right in of_sites},
        )


def label_scores(
    adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], label_ids: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(N,) nats of each example's label word, and whether it is the likeliest of the label words.

    Args:
        adapted: The model; ``adapter`` stays loaded.
        adapter: What to compute with.
        sequences: Whose response is one label word.
        label_ids: (L,) int64, the label words.
    """
    adapted.load_adapter(adapter)
    adapted.model.eval()
    nll_N, is_right_N = np.empty(len(sequences)), np.empty(len(sequences), bool)
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].input_ids))
    with torch.no_grad():
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            batch = collate([sequences[index] for index in chosen], adapted.tokenizer.pad_token_id)
            # The first token of the response is predicted where the prompt ends.
            place_B = (batch["labels"] != IGNORED_LABEL).int().argmax(dim=1)
            rows_B = torch.arange(len(chosen))
            label_B = batch["labels"][rows_B, place_B]
            inputs = {key: batch[key].to(adapted.device) for key in ("input_ids", "attention_mask")}
            logits_BTV = adapted.model(**inputs, use_cache=False).logits
            log_BV = logits_BTV[rows_B, place_B - 1].float().log_softmax(dim=-1).cpu()
            nll_N[chosen] = -log_BV[rows_B, label_B].numpy()
            is_right_N[chosen] = (label_ids[log_BV[:, label_ids].argmax(dim=1)] == label_B).numpy()
    return nll_N, is_right_N


def expert_norm(adapter: Arrays) -> float:
    """Mean Euclidean length of the experts' arrays; with LoRA of their factors."""
    return float(np.mean([norms(arrays).mean() for arrays in by_layer(adapter).values()]))


def _one_token(adapted: AdaptedModel, label: str) -> int:
    tokens = adapted.tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1 or tokens[0] == adapted.tokenizer.unk_token_id:
        raise ValueError(f"the label word {label!r} must be one token of {adapted.base.identity.name}, it is {tokens}")
    return int(tokens[0])
