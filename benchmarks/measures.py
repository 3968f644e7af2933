"""How good a federation's model is: over all test examples, and on each site's own.

Shapes: N examples, B of a batch, L label words, T tokens, V tokens of the vocabulary, D model width; E experts of one
MoE layer, O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.federation import Federation
from client.evaluation.examination import answered
from client.evaluation.held_out import held_out_loss, output_layer_at, reading_hidden_states
from client.methods.pfl_moe import PflMoe
from client.mixed_prediction import Mixture, log_mixture
from client.model import AdaptedModel
from client.text import IGNORED_LABEL, Example, TokenSequence, collate, encode
from conf.model import LoraConfig
from conf.schema import Config
from strategies.adapters import Arrays
from strategies.experts import by_layer, dots, num_experts
from strategies.low_rank import Factors, factors_of, lora_prefixes, squared_norm

BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one model, or the mean over the sites' models where nobody has a global one."""

    loss: float
    """Mean over all test examples: nats of the label word; without label words, nats per response token."""
    accuracy: float | None
    """Share of test examples whose label word is the likeliest; None without label words."""
    sites: dict[str, float]
    """Site -> accuracy, without label words the loss, of the model in use there, on its own test examples."""


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
        """Of the global model; where there is none, of the sites' own models, each on all examples and on its own.

        Where a site mixes the global model with its own, on its own examples that is scored.
        """
        names = federation.adapted.parameters_by_name().keys()
        if federation.adapter.keys() == names and not federation.personal:
            score = self.score_of(federation.adapter)
            return replace(score, sites=score.sites | self._mixed(federation))
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
        """Of greedy answers to the first test examples of each site, mean over the sites of the model in use there.

        Where one site holds all data, that of the model that it makes.
        """
        found = []
        for name, examples in self.examples.items():
            holder = name if name in federation.sites else next(iter(federation.sites))
            in_use = federation.sites[holder].in_use(federation.received(holder))
            found.append(answered(in_use, examples, self.adapted, federation.config)[0])
        return float(np.mean(found))

    def _mixed(self, federation: Federation) -> dict[str, float]:
        """Site -> the same on its own examples, of the mixture that it uses; sites that mix nothing are left out."""
        found = {}
        for name, site in federation.sites.items():
            if not isinstance(site.method, PflMoe):
                continue
            if not len(self.label_ids):
                found[name] = site.in_use(federation.adapter).loss(self.test[name]).loss
            elif mixture := site.method.mixture(*site.using(federation.adapter)):
                log_NL = mixed_label_log_p(self.adapted, mixture, self.test[name], self.label_ids)
                found[name] = float(label_scores(log_NL, self.test[name], self.label_ids)[1].mean())
        return found

    def _by_labels(self, adapter: Arrays) -> Score:
        everything = [sequence for sequences in self.test.values() for sequence in sequences]
        log_NL, _ = label_log_p(self.adapted, adapter, everything, self.label_ids)
        nll_N, is_right_N = label_scores(log_NL, everything, self.label_ids)
        ends = np.cumsum([len(sequences) for sequences in self.test.values()])[:-1]
        of_sites = zip(self.test, np.split(is_right_N, ends), strict=True)
        return Score(
            loss=float(nll_N.mean()),
            accuracy=float(is_right_N.mean()),
            sites={name: float(right.mean()) for name, right in of_sites},
        )


def label_scores(
    log_NL: torch.Tensor, sequences: Sequence[TokenSequence], label_ids: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(N,) nats of each example's label word, and whether it is the likeliest of the label words.

    Args:
        log_NL: Log-probabilities of the label words: see ``label_log_p``.
        sequences: Whose response is one label word.
        label_ids: (L,) int64, the label words.
    """
    answers_N = torch.tensor([_first_of_response(sequence) for sequence in sequences])
    is_answer_NL = answers_N[:, None] == label_ids
    assert is_answer_NL.any(dim=1).all()
    right_N = is_answer_NL.int().argmax(dim=1)
    nll_N = -log_NL.gather(1, right_N[:, None])[:, 0]
    return nll_N.double().numpy(), (log_NL.argmax(dim=1) == right_N).numpy()


def label_log_p(
    adapted: AdaptedModel, adapter: Arrays, sequences: Sequence[TokenSequence], label_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, L) log-probabilities of the label words where each response begins, and (N, D) the hidden states there.

    Both are float32, the former on the CPU, the latter on the model's device.

    Args:
        adapted: The model; ``adapter`` stays loaded.
        adapter: What to compute with.
        sequences: Prompts with responses.
        label_ids: (L,) int64, the label words.
    """
    adapted.load_adapter(adapter)
    adapted.model.eval()
    log_p, hidden = [], []
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].input_ids))
    with torch.no_grad():
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            batch = collate([sequences[index] for index in chosen], adapted.tokenizer.pad_token_id)
            # The first token of the response is predicted where the prompt ends.
            place_B = (batch["labels"] != IGNORED_LABEL).int().argmax(dim=1) - 1
            chosen_BT = functional.one_hot(place_B, batch["labels"].shape[1]).bool()
            inputs = {key: batch[key].to(adapted.device) for key in ("input_ids", "attention_mask")}
            with output_layer_at(adapted, chosen_BT.to(adapted.device)), reading_hidden_states(adapted) as read:
                logits_BV = adapted.model(**inputs, use_cache=False).logits
            log_p.append(logits_BV.float().log_softmax(dim=-1).cpu()[:, label_ids])
            hidden.append(read.pop().float())
    back_N = torch.tensor(order).argsort()
    return torch.cat(log_p)[back_N], torch.cat(hidden)[back_N.to(adapted.device)]


def mixed_label_log_p(
    adapted: AdaptedModel, mixture: Mixture, sequences: Sequence[TokenSequence], label_ids: torch.Tensor
) -> torch.Tensor:
    """(N, L) log-probabilities of the label words as the mixture has them: see ``label_log_p``."""
    log_local_NL, _ = label_log_p(adapted, mixture.local, sequences, label_ids)
    log_global_NL, hidden_ND = label_log_p(adapted, mixture.shared, sequences, label_ids)
    with torch.no_grad():
        logit_N = mixture.gate(hidden_ND).cpu()
    return log_mixture(logit_N[:, None], log_local_NL, log_global_NL)


def _first_of_response(sequence: TokenSequence) -> int:
    return next(label for label in sequence.labels if label != IGNORED_LABEL)


def expert_norm(adapter: Arrays, adapted: AdaptedModel, lora: LoraConfig) -> float:
    """Mean Euclidean length of the experts' weights, by LoRA of W + (alpha / rank) B A with the base's W."""
    layers = by_layer(adapter).items()
    return float(np.mean([np.sqrt(_squared_lengths(layer, arrays, adapted, lora)).mean() for layer, arrays in layers]))


def _squared_lengths(layer: str, arrays: Arrays, adapted: AdaptedModel, lora: LoraConfig) -> NDArray[np.float64]:
    """(E,) of one layer: ||W||^2 + 2 <W A^T, B> + ||B A||^2, in which no B A is formed."""
    total_E = np.zeros(num_experts(arrays))
    prefixes = lora_prefixes(arrays)
    module = adapted.base.model.get_submodule(f"{layer}.experts")
    for prefix in prefixes:
        weight = module.get_parameter(prefix.rpartition(".")[2]).detach()
        weight_EOI = (weight.mT if getattr(module, "is_transposed", False) else weight).double().cpu().numpy()
        A_ERI, B_EOR = factors_of(arrays, prefix)
        change = Factors(A_ERI, lora.alpha / lora.rank * B_EOR)
        cross_E = (weight_EOI @ np.swapaxes(A_ERI, -1, -2) * change.B).sum(axis=(-2, -1))
        total_E += (weight_EOI**2).sum(axis=(-2, -1)) + 2 * cross_E + squared_norm(change)
    return total_E if prefixes else dots(arrays, arrays)


def _one_token(adapted: AdaptedModel, label: str) -> int:
    tokens = adapted.tokenizer(label, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1 or tokens[0] == adapted.tokenizer.unk_token_id:
        raise ValueError(f"the label word {label!r} must be one token of {adapted.base.identity.name}, it is {tokens}")
    return int(tokens[0])
