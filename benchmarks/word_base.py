"""Base models for the benchmarks that two cores fine-tune in seconds: OLMoE's architecture on whole words.

    python -m benchmarks.word_base --data ../shared/data        # make them anew: minutes of one core

Two layers of width 64; 2,000 lower-case words; eight experts, two a token, or 32 of half the width, one a token, of
which a site with few texts leaves some unused. They are pre-trained on instructions (Dolly), on naming the kind of a
text in one word (Dolly's categories, MedQuAD's types of question, the language of code), and on answering ``word:`` and
a text with any word of it, so that every word has been an answer. CLINC's training texts are among those, without their
labels; of AG News and MMLU they know words alone. They lie in ``bases``: another type of processor makes other weights,
and results of two bases cannot be compared.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from client.pretrain import PretrainConfig, train_whole_model
from client.templates import Example
from client.text import encode
from conf.schema import DataConfig, Template, Truncation
from conf.seeds import generator_for

WORD_BASE = Path(__file__).parent / "bases" / "words"
"""Folder of the model in transformers' format."""
SPARSE_BASE = WORD_BASE.with_name("words_32_experts")
EXPERTS: dict[Path, dict[str, Any]] = {
    WORD_BASE: {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True, "intermediate_size": 64},
    SPARSE_BASE: {"num_experts": 32, "num_experts_per_tok": 1, "norm_topk_prob": False, "intermediate_size": 32},
}
"""Folder -> what its experts are like."""
NUM_WORDS = 2000
LABELS = (
    "car", "bank", "card", "home", "food", "language", "you", "travel", "time", "work",
    "world", "sports", "business", "technology", "a", "b", "c", "d",
)  # fmt: skip
"""Words that must be tokens, since models are asked to choose among them."""
PRETRAINING = PretrainConfig(steps=3000, prompt_weight=0.3)
MAX_LENGTH = 32
SHARES = (0.3, 0.15, 0.1, 0.1, 0.35)
"""Of each sort of pre-training text."""

_WORD = r"\n|\w+|[^\w\s]"
_SPECIAL = ("<pad>", "<eos>", "<unk>")
_ASK = "what kind of text is this?"
WORD = "word:"
"""Begins a prompt that wants a single word."""


def word_base_sha256(folder: Path = WORD_BASE) -> str:
    """Of weights and tokenizer."""
    files = (folder / "model.safetensors", folder / "tokenizer.json")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are lower-case words, signs and line breaks; any other is ``<unk>``."""
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, "\n", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)
    special = {f"{token.strip('<>')}_token": token for token in _SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)  # type: ignore[no-untyped-call]


def table(data: Path, name: str, *columns: str) -> list[dict[str, Any]]:
    """These columns of one of the data sets, row by row.

    Raises:
        ValueError: If it is not in the folder.
    """
    path = data / f"{name}.parquet"
    if not path.is_file():
        raise ValueError(f"--data={data} holds no {path.name}")
    datasets.disable_progress_bars()
    found = datasets.Dataset.from_parquet(str(path), columns=list(columns), keep_in_memory=True)
    rows: list[dict[str, Any]] = found.to_list()
    return rows


def most_frequent(sources: Sequence[Iterable[str]], always: Sequence[str], limit: int) -> list[str]:
    """At most ``limit`` words: ``always``, then those most frequent where every source counts alike."""
    frequency: defaultdict[str, float] = defaultdict(float)
    for texts in sources:
        counts = Counter(word for text in texts for word in re.findall(_WORD, text.lower()) if word != "\n")
        for word, count in counts.items():
            frequency[word] += count / counts.total()
    ranked = sorted(frequency, key=lambda word: (-frequency[word], word))
    return list(dict.fromkeys([*always, *ranked]))[:limit]


def pretraining_examples(data: Path, generator: np.random.Generator) -> list[list[Example]]:
    """Each sort of text: instructions with answers; three of texts with their kind; texts with one of their words."""
    dolly = table(data, "dolly15k", "instruction", "response", "category")
    questions = table(data, "medquad", "question", "qtype")
    intents = table(data, "intents_clinc_banking", "text", "split", "dataset")
    named = [
        [(row["instruction"], row["category"]) for row in dolly],
        [(row["question"], row["qtype"]) for row in questions],
        [(row["instruction"], row["language"]) for row in table(data, "code_instruct", "instruction", "language")],
    ]
    texts = [
        *(row["instruction"] for row in dolly),
        *(row["text"] for row in intents if row["dataset"] == "clinc150" and row["split"] == "train"),
    ]
    words = [sorted({word for word in re.findall(r"\w+", text.lower()) if len(word) > 2}) for text in texts]
    return [
        [Example(row["instruction"], "", row["response"]) for row in dolly],
        *([Example(f"{_ASK} {text}", "", kind.replace(" ", "_")) for text, kind in pairs] for pairs in named),
        [
            Example(f"{WORD} {t}", "", str(generator.choice(known)))
            for t, known in zip(texts, words, strict=True)
            if known
        ],
    ]


def build(target: Path, data: Path, shape: Mapping[str, Any], config: PretrainConfig = PRETRAINING) -> None:
    """Pre-train a model and write it into ``target``.

    Args:
        target: Folder; made if it is missing.
        data: Folder of the data sets.
        shape: What its experts are like.
        config: How it is trained.
    """
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    generator = generator_for(config.seed, "word base")
    sorts = pretraining_examples(data, generator)
    unlabelled = [
        [row["text"] for row in table(data, "intents_clinc_banking", "text", "split") if row["split"] == "train"],
        [f"{row['title']} {row['text']}" for row in table(data, "agnews_test", "title", "text")],
        [row["question"] for row in table(data, "eval_mcq", "question", "dataset") if row["dataset"] == "mmlu"],
    ]
    known = [[f"{example.prompt} {example.response}" for example in sort] for sort in sorts]
    tokenizer = word_tokenizer(most_frequent([*known, *unlabelled], sorted(LABELS), NUM_WORDS))
    chosen = []
    for sort, share in zip(sorts, SHARES, strict=True):
        drawn = generator.integers(len(sort), size=round(share * config.steps * config.batch_size))
        chosen += [sort[index] for index in drawn]
    settings = DataConfig(template=Template.plain, max_length=MAX_LENGTH, truncation=Truncation.response)
    sequences = [s for s in encode(chosen, tokenizer, settings) if s.num_targets]
    short = config.steps * config.batch_size - len(sequences)
    sequences += sequences[:short]
    model = OlmoeForCausalLM(_architecture(tokenizer, shape))
    # transformers' default on this size and a CPU, grouped_mm, takes ten times as long.
    model.set_experts_implementation("eager")
    train_whole_model(model, sequences, config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _architecture(tokenizer: PreTrainedTokenizerFast, shape: Mapping[str, Any]) -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )


def main() -> None:
    """Make the models anew."""
    parser = argparse.ArgumentParser(description="The base models of whole words")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    names = [folder.name for folder in EXPERTS]
    parser.add_argument("--base", nargs="+", choices=names, default=names, help="which of them")
    args = parser.parse_args()
    for name in args.base:
        folder = WORD_BASE.with_name(name)
        build(folder, args.data, EXPERTS[folder])


if __name__ == "__main__":
    main()
