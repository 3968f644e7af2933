"""Learnt rewards: a linear head on the base model that is in memory anyway, or a classifier of transformers.

Shape suffixes: N texts, D model width, L labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from client.alignment.rewards import PROGRAMMATIC, Reward, Rewards
from client.bases import without_progress_bars
from client.evaluation.held_out import reading_hidden_states, response_logits
from client.model import AdaptedModel
from client.text import Example, collate, encode_each
from conf.alignment import REWARD_TEXTS
from conf.schema import DataConfig, Template

HEAD_FILE, HEAD_FACTS = "reward_head.safetensors", "reward_head.json"
_BATCH_SIZE = 16


def named_rewards(specs: Sequence[str], adapted: AdaptedModel, formats: Mapping[str, str]) -> Rewards:
    """The rewards that ``method.rewards`` lists, each ``NAME`` or ``NAME:SOURCE``.

    A name alone is that of a programmatic reward. A source is a folder that ``bouquet reward train`` wrote, or a
    folder or hub name of a sequence classifier, whose text is put together as ``formats`` says: see
    ``FirmConfig.reward_formats``.

    Raises:
        ValueError: If a name is unknown, or a source cannot be used.
    """
    return Rewards({spec.partition(":")[0]: _named_reward(spec, adapted, formats) for spec in specs})


def _named_reward(spec: str, adapted: AdaptedModel, formats: Mapping[str, str]) -> Reward:
    name, _, source = spec.partition(":")
    if not source:
        if name not in PROGRAMMATIC:
            raise ValueError(
                f"method.rewards: {name!r} is none of {sorted(PROGRAMMATIC)}; write {name}:FOLDER or {name}:HUB_NAME, "
                f'or let the site say where it has one, by rewards="{name}:FOLDER" in its node config'
            )
        return PROGRAMMATIC[name]
    if (Path(source).expanduser() / HEAD_FACTS).is_file():
        return LinearHead.load(Path(source).expanduser()).on(adapted, name)
    return _classifier(name, source, adapted.device, formats.get(name))


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What a linear head was trained for, beside its weights."""

    objective: str
    base_name: str
    """For people: a folder's without the way to it, since heads are handed on."""
    base_sha256: str
    """Hash of the base model whose hidden states it reads; with another one its numbers mean nothing."""
    template: str
    """How prompt and completion become one text: a member of ``conf.schema.Template``."""
    max_length: int
    """Tokens of prompt and completion together, at most."""
    num_pairs: int
    """Preference pairs that it was trained on."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """Set of pairs -> share of them whose preferred response it scores higher: ``training``, ``held_out``, and
    ``held_out/OBJECTIVE`` of pairs that were judged by another; below 1/2 the objectives conflict."""


@dataclass(frozen=True)
class LinearHead:
    """r(x, y) = w . (mean of the hidden states that the frozen base predicts y's tokens from).

    It has no bias, which pairs could not tell.
    """

    weight_D: Tensor
    facts: HeadFacts

    def save(self, folder: Path) -> None:
        """Write it into a folder: weights as safetensors, facts as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"weight": self.weight_D.float().contiguous()}, folder / HEAD_FILE)
        (folder / HEAD_FACTS).write_text(json.dumps(asdict(self.facts), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> LinearHead:
        """Read what ``save`` wrote.

        Raises:
            ValueError: If it is damaged.
        """
        try:
            facts = HeadFacts(**json.loads((folder / HEAD_FACTS).read_text()))
            return cls(safetensors.torch.load_file(folder / HEAD_FILE)["weight"], facts)
        except (OSError, TypeError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder} holds no reward head that can be read: {error!r}") from error

    def on(self, adapted: AdaptedModel, name: str) -> Reward:
        """The head as a reward, on the base model of ``adapted``.

        Raises:
            ValueError: If it was trained on another base model.
        """
        identity = adapted.base.identity
        if identity.sha256 != self.facts.base_sha256:
            raise ValueError(
                f"reward {name!r} reads hidden states of {self.facts.base_name} ({self.facts.base_sha256[:12]}), but "
                f"this run's base model is {identity.name} ({identity.sha256[:12]}): train it again with this model"
            )
        data = DataConfig(template=Template[self.facts.template], max_length=self.facts.max_length)

        def score(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.floating]:
            features_ND = pair_features(adapted, prompts, completions, data)
            return (features_ND @ self.weight_D.to(features_ND)).cpu().numpy().astype(np.float64)

        return score


def pair_features(
    adapted: AdaptedModel, prompts: Sequence[str], completions: Sequence[str], data: DataConfig
) -> Tensor:
    """(N, D) float32: the base's hidden states, averaged over the places that each completion is predicted from."""
    # There must be something to read: an empty completion is taken for a line break.
    texts = [Example(prompt, "", text or "\n") for prompt, text in zip(prompts, completions, strict=True)]
    sequences = [sequence for sequence in encode_each(texts, adapted.tokenizer, data) if sequence is not None]
    assert len(sequences) == len(texts), "data.truncation=prompt never drops an example"
    rows: list[Tensor] = []
    with (
        adapted.without_adapter(),
        adapted.evaluating(),
        torch.no_grad(),
        reading_hidden_states(adapted) as read,
    ):
        for first in range(0, len(sequences), _BATCH_SIZE):
            batch = collate(sequences[first : first + _BATCH_SIZE], adapted.tokenizer.pad_token_id)
            _, _, counted = response_logits(adapted, batch)
            weights = counted / counted.sum(dim=1, keepdim=True)
            rows.append(torch.einsum("bt,btd->bd", weights, read.pop()[:, :-1].float()))
    return torch.cat(rows)


@lru_cache(maxsize=8)
def _classifier(name: str, source: str, device: torch.device, text_format: str | None) -> Reward:
    """A sequence classifier as a reward: its one logit, or of two labels the second's log-odds; kept by the process.

    Prompt and completion are given as ``text_format`` says; without it as a chat if its tokenizer has a template for
    one, else as a pair of texts. Of what is too long the prompt's beginning is left out.

    Raises:
        ValueError: If it cannot be loaded, lacks weights of a classifier or has more than two labels.
    """
    try:
        with without_progress_bars():
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"reward {name!r}: no reward head and no sequence classifier at {source!r}: {error}"
        ) from error
    model, found = loaded
    if found["missing_keys"]:  # which transformers would draw at random
        lacking = ", ".join(sorted(found["missing_keys"])[:4])
        raise ValueError(f"reward {name!r}: {source} is no sequence classifier: it has no weights for {lacking}")
    num_labels = int(model.config.num_labels)
    if num_labels > 2:
        raise ValueError(
            f"reward {name!r}: {source} has {num_labels} labels, a reward needs 1 (a score) or 2 (no, yes)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(device).eval().requires_grad_(requires_grad=False)

    def score(prompts: Sequence[str], completions: Sequence[str]) -> NDArray[np.floating]:
        logits = []
        for first in range(0, len(prompts), _BATCH_SIZE):
            chosen = slice(first, first + _BATCH_SIZE)
            batch = _classifier_inputs(tokenizer, model, prompts[chosen], completions[chosen], text_format)
            with torch.no_grad():
                logits.append(model(**batch.to(device)).logits.float())
        logits_NL = torch.cat(logits)
        scores_N = logits_NL[:, 0] if num_labels == 1 else logits_NL[:, 1] - logits_NL[:, 0]
        return scores_N.cpu().numpy().astype(np.float64)

    return score


def _classifier_inputs(
    tokenizer: Any, model: Any, prompts: Sequence[str], completions: Sequence[str], text_format: str | None
) -> Any:
    limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 512)
    pairs = zip(prompts, completions, strict=True)
    return tokenizer.pad([_fitting(*pair, tokenizer, limit, text_format) for pair in pairs], return_tensors="pt")


def _fitting(prompt: str, completion: str, tokenizer: Any, limit: int, text_format: str | None) -> dict[str, list[int]]:
    """Inputs of one pair: of the prompt as much of its end as there is room for, then of a completion its beginning."""
    while True:
        inputs = _inputs(prompt, completion, tokenizer, text_format)
        excess = len(inputs["input_ids"]) - limit
        if excess <= 0 or not prompt:
            return {key: values[:limit] for key, values in inputs.items()}
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        shorter = tokenizer.decode(prompt_ids[excess:])
        prompt = shorter if len(shorter) < len(prompt) else ""


def _inputs(prompt: str, completion: str, tokenizer: Any, text_format: str | None) -> Mapping[str, list[int]]:
    """Tokens and whatever else the tokenizer gives for them, such as which of the two texts each belongs to."""
    inputs: Mapping[str, list[int]]
    if text_format is not None:
        before, between, after = REWARD_TEXTS.split(text_format.replace("\\n", "\n"))
        inputs = tokenizer(f"{before}{prompt}{between}{completion}{after}")
    elif tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        inputs = tokenizer.apply_chat_template(chat, return_dict=True)
    elif tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False):
        inputs = tokenizer(prompt, completion)
    else:  # nothing would stand between the two
        inputs = tokenizer(f"{prompt}\n{completion}")
    return inputs
