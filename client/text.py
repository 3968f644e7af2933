"""From examples to padded tensors: template, tokens, truncation, packing, collation.

Shape suffixes: B sequences of a batch, T tokens of the longest of them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from client.templates import Example, alpaca_prompt, chat_message, plain_prompt
from conf.schema import DataConfig, Template, Truncation

__all__ = [
    "IGNORED_LABEL", "Example", "TokenSequence", "byte_tokenizer", "check_packing", "collate", "encode", "encode_each",
    "encode_prompts", "report_dropped", "response_sequence",
]  # fmt: skip

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""Label of a token that carries no loss: transformers' and PyTorch's convention."""

_PACKED_INPUTS = frozenset({"input_ids", "position_ids"})

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TokenSequence:
    """Tokens of one example, or of several packed one after the other."""

    input_ids: list[int]
    labels: list[int]
    """The same ids where the token belongs to a response, its end-of-sequence token included; else -100."""
    lengths: list[int]
    """Tokens of each example in it; they add up to ``len(input_ids)``."""

    @property
    def num_targets(self) -> int:
        """Response tokens that carry loss: all but one that is the first of the sequence, which nothing predicts."""
        return sum(label != IGNORED_LABEL for label in self.labels[1:])


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> list[TokenSequence]:
    """Token sequences of at most ``data.max_length`` tokens, in the order of the examples.

    Prompt and response are tokenised apart, so that no token straddles where the loss begins. A text starts with
    the tokenizer's beginning-of-sequence token where the tokenizer puts one itself, as it will at generation.
    Examples of whose response nothing is left are dropped, and counted in the log.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, if ``data.template=chat`` and it has no chat
            template, or if every example was dropped.
    """
    sequences = [sequence for sequence in encode_each(examples, tokenizer, data) if sequence is not None]
    report_dropped(len(examples) - len(sequences), len(examples), data)
    return _pack(sequences, data.max_length) if data.packing else sequences


def encode_each(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[TokenSequence | None]:
    """The token sequence of every example, never packed; None where nothing is left of the response.

    Raises:
        ValueError: As ``encode``, but for dropped examples.
    """
    if not examples:
        return []
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer of model.name has no end-of-sequence token: a response could not be ended")
    prefix, prompts = _beginning(tokenizer, data.template), _prompt_ids(examples, tokenizer, data.template)
    responses = tokenizer([example.response for example in examples], add_special_tokens=False)["input_ids"]
    sequences: list[TokenSequence | None] = []
    for prompt, response in zip(prompts, responses, strict=True):
        ended = [*response, tokenizer.eos_token_id] if response else []
        fitted = _truncate(prefix + prompt, ended, len(prefix), data)
        sequences.append(response_sequence(*fitted) if fitted is not None and fitted[1] else None)
    return sequences


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> list[list[int]]:
    """Tokens of each example up to where its response starts, as ``encode`` has them; at most ``data.max_length``.

    Of a longer prompt the beginning is cut, whatever ``data.truncation`` says: an answer needs its end.

    Raises:
        ValueError: If ``data.template=chat`` and the tokenizer has no chat template.
    """
    prefix = _beginning(tokenizer, data.template)
    limit = data.max_length - len(prefix)
    return [prefix + prompt[-limit:] for prompt in _prompt_ids(examples, tokenizer, data.template)]


def collate(sequences: Sequence[TokenSequence], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right: int64 tensors (B, T), and ``token_mask``, bool (B, T).

    ``token_mask`` says which tokens are real; it is not for the model. With ``attention_mask`` the batch holds one
    example a sequence. As soon as one is packed it holds ``position_ids`` instead, which start again at each example.
    There transformers keeps the examples apart, but only if it is given no mask and ``use_cache=False``: otherwise
    they see each other without a word.
    """
    width = max(len(sequence.input_ids) for sequence in sequences)
    token_mask_BT = torch.tensor([_padded([1] * len(s.input_ids), width, 0) for s in sequences], dtype=torch.bool)
    batch = {
        "input_ids": torch.tensor([_padded(s.input_ids, width, pad_token_id) for s in sequences]),
        "labels": torch.tensor([_padded(s.labels, width, IGNORED_LABEL) for s in sequences]),
        "token_mask": token_mask_BT,
    }
    if any(len(sequence.lengths) > 1 for sequence in sequences):
        # The padding of a row is one more example of its own, so no real token shares attention with it.
        runs = [[*s.lengths, width - len(s.input_ids)] for s in sequences]
        batch["position_ids"] = torch.tensor([[place for run in row for place in range(run)] for row in runs])
    else:
        batch["attention_mask"] = token_mask_BT.long()
    return batch


def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model that lets the examples of a pack see each other; two short forward passes tell.

    Some models of transformers, GPT-OSS among them, do not look at ``position_ids`` when they make their mask.

    Args:
        model: A causal language model in evaluation mode.

    Raises:
        ValueError: If what one example holds changes the logits of the next.
    """
    first, other, second = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [3, 5, 7, 9]
    lengths = [len(first), len(second)]
    packs = [TokenSequence([*before, *second], [IGNORED_LABEL] * sum(lengths), lengths) for before in (first, other)]
    batch = {name: tensor.to(model.device) for name, tensor in collate(packs, 0).items() if name in _PACKED_INPUTS}
    with torch.no_grad():
        logits_BTV = model(**batch, use_cache=False).logits[:, len(first) :].float()
    # A tenth of their spread: far above the rounding of bfloat16, far below what six more tokens do.
    if (logits_BTV[0] - logits_BTV[1]).abs().max() > 0.1 * logits_BTV.std():
        raise ValueError(
            f"data.packing=true: {type(model).__name__} attends across the examples of a pack, since it does not "
            "look at position_ids when it masks; set data.packing=false"
        )


def read_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ValueError: If one of its files is JSON of another shape than it should be, as a list where an object belongs.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{folder} cannot be read: its tokenizer: {error}") from error
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of UTF-8 bytes without merges; it starts texts with ``<bos>`` and has a small chat template.

    The ids never change, since the weights of ``tiny_moe`` hang on them: 0-255 are the bytes, 256 is ``<pad>``,
    257 ``<bos>``, 258 ``<eos>``.
    """
    characters = _byte_characters()
    vocabulary = {characters[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos")}
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special.values()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)  # type: ignore[no-untyped-call]
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _byte_characters() -> list[str]:
    """Character by which byte-level tokenizers write each byte (``bytes_to_unicode`` of GPT-2's encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _beginning(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> list[int]:
    """The beginning-of-sequence token, if the tokenizer starts texts with it; a chat template brings its own."""
    # Asking for bos_token_id alone would put SmolLM2-Instruct's "<|im_start|>" before plain text.
    first = tokenizer("")["input_ids"][:1]
    return [] if template is Template.chat or first != [tokenizer.bos_token_id] else list(first)


def _prompt_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template | None
) -> list[list[int]]:
    """Tokens of each example up to where its response starts."""
    if template is not Template.chat:
        words = alpaca_prompt if template is Template.alpaca else plain_prompt
        return list(tokenizer([words(example) for example in examples], add_special_tokens=False)["input_ids"])
    if tokenizer.chat_template is None:
        raise ValueError(
            "data.template=chat, but the tokenizer of model.name has no chat template: set alpaca or plain"
        )
    chats = [[{"role": "user", "content": chat_message(example)}] for example in examples]
    return cast("list[list[int]]", tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False))


def _truncate(
    prompt: list[int], response: list[int], num_kept: int, data: DataConfig
) -> tuple[list[int], list[int]] | None:
    """Prompt and response cut to ``data.max_length`` together; the first ``num_kept`` tokens always stay."""
    if len(prompt) + len(response) <= data.max_length:
        return prompt, response
    if data.truncation is Truncation.drop:
        return None
    if data.truncation is Truncation.response:
        return prompt, response[: max(0, data.max_length - len(prompt))]
    response = response[: data.max_length - num_kept]
    num_left = data.max_length - len(response)
    return prompt[:num_kept] + prompt[len(prompt) - (num_left - num_kept) :], response


def response_sequence(prompt: list[int], response: list[int]) -> TokenSequence:
    """One example, with a loss on its response alone."""
    labels = [IGNORED_LABEL] * len(prompt) + response
    # Nothing precedes the first token that could predict it; in a pack the example before it would have to.
    labels[0] = IGNORED_LABEL
    return TokenSequence(prompt + response, labels, [len(labels)])


def _pack(sequences: Iterable[TokenSequence], max_length: int) -> list[TokenSequence]:
    """The sequences joined in their order, each to the one before it as long as both fit into ``max_length``."""
    packed: list[TokenSequence] = []
    for sequence in sequences:
        if packed and len(packed[-1].input_ids) + len(sequence.input_ids) <= max_length:
            last = packed[-1]
            last.input_ids.extend(sequence.input_ids)
            last.labels.extend(sequence.labels)
            last.lengths.extend(sequence.lengths)
        else:
            packed.append(TokenSequence([*sequence.input_ids], [*sequence.labels], [*sequence.lengths]))
    return packed


def report_dropped(num_dropped: int, num_examples: int, data: DataConfig) -> None:
    """Log how many examples have no response left.

    Raises:
        ValueError: If that is all of them, and there are any.
    """
    settings = f"data.max_length={data.max_length}, data.truncation={data.truncation.name}"
    if num_dropped == num_examples > 0:
        raise ValueError(f"none of {num_examples} examples has a response that fits: {settings}; raise data.max_length")
    if num_dropped:
        logger.warning("%d of %d examples dropped: no response left (%s)", num_dropped, num_examples, settings)


def _padded(values: list[int], width: int, padding: int) -> list[int]:
    return values + [padding] * (width - len(values))
