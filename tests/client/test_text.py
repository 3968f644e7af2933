"""Encoding: where the loss lies, what is cut, and that packing changes nothing that a model computes."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from client.templates import alpaca_prompt
from client.text import IGNORED_LABEL, Example, TokenSequence, byte_tokenizer, check_packing, collate, encode
from conf.schema import DataConfig, Template, Truncation
from tests.client.tiny_models import tiny_model

PAD, BOS, EOS = 256, 257, 258
TOKENIZER = byte_tokenizer()
EXAMPLES = [Example("Sort.", "3 1", "1 3"), Example("Say hi.", "", "hi"), Example("Add.", "2 and 2 and 7", "11")]


def settings(**changes):
    return DataConfig(**{"template": Template.plain, **changes})


def response_ids(sequence):
    return [token for token, label in zip(sequence.input_ids, sequence.labels, strict=True) if label != IGNORED_LABEL]


def merging_tokenizer(**special):
    """Bytes, and one merge: a line break followed by d is one token, 256."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(characters)} | {"Ċd": 256, "<end>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "d")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@given(st.text())
def test_byte_tokenizer_gives_the_bytes_and_gives_the_text_back(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    if not any(special in text for special in TOKENIZER.all_special_tokens):
        assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


def test_byte_tokenizers_special_ids_are_256_to_258_and_it_starts_texts():
    assert len(TOKENIZER) == 259
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (PAD, BOS, EOS)
    assert TOKENIZER("a")["input_ids"] == [BOS, ord("a")]


def test_byte_tokenizer_survives_saving(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for template in Template:
        data = settings(template=template)
        assert encode(EXAMPLES, loaded, data) == encode(EXAMPLES, TOKENIZER, data)


def test_loss_is_on_the_response_and_its_end_alone():
    (sequence,) = encode([Example("Say", "hé", "né")], TOKENIZER, settings())
    prompt, response = [BOS, *"Say\nhé\n".encode()], [*"né".encode(), EOS]
    assert sequence == TokenSequence(
        prompt + response, [IGNORED_LABEL] * len(prompt) + response, [len(prompt + response)]
    )


def test_no_token_straddles_prompt_and_response():
    """Tokenised together, the prompt's last line break and the response's d would be the one token 256."""
    tokenizer = merging_tokenizer(eos_token="<end>")
    line_break, d = tokenizer.convert_tokens_to_ids(["Ċ", "d"])
    assert 256 in tokenizer("Say\nd")["input_ids"]
    (sequence,) = encode([Example("Say", "", "d")], tokenizer, settings())
    assert sequence.input_ids[-3:] == [line_break, d, 257]
    assert response_ids(sequence) == [d, 257]


def test_beginning_token_is_added_where_the_tokenizer_adds_it():
    """SmolLM2's chat models call "<|im_start|>" their beginning token and do not put it before a text."""
    tokenizer = merging_tokenizer(eos_token="<end>", bos_token="<end>")
    (sequence,) = encode([Example("x", "", "y")], tokenizer, settings())
    assert sequence.input_ids.count(257) == 1


def test_alpaca_is_the_template_of_alpaca():
    (sequence,) = encode(EXAMPLES[:1], TOKENIZER, settings(template=Template.alpaca))
    assert TOKENIZER.decode(sequence.input_ids) == f"<bos>{alpaca_prompt(EXAMPLES[0])}1 3<eos>"


def test_chat_is_the_tokenizers_template_and_begins_once():
    sequences = encode(EXAMPLES[:2], TOKENIZER, settings(template=Template.chat))
    texts = [TOKENIZER.decode(sequence.input_ids) for sequence in sequences]
    assert texts == ["<bos>user: Sort.\n3 1\nassistant: 1 3<eos>", "<bos>user: Say hi.\nassistant: hi<eos>"]
    conversation = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]
    assert TOKENIZER.apply_chat_template(conversation, tokenize=False) == texts[1]


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match=r"data\.template=chat"):
        encode(EXAMPLES, merging_tokenizer(eos_token="<end>"), settings(template=Template.chat))


def test_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"model\.name has no end-of-sequence token"):
        encode(EXAMPLES, merging_tokenizer(), settings())


LONG = Example("abcdefgh", "", "UVWXYZ")
"""<bos> a..h, a line break and U..Z <eos>: 10 + 7 = 17 tokens."""


@pytest.mark.parametrize(
    ("truncation", "max_length", "expected"),
    [
        (Truncation.prompt, 17, "<bos>abcdefgh\nUVWXYZ<eos>"),
        (Truncation.prompt, 16, "<bos>bcdefgh\nUVWXYZ<eos>"),
        (Truncation.prompt, 9, "<bos>\nUVWXYZ<eos>"),
        (Truncation.prompt, 8, "<bos>UVWXYZ<eos>"),
        (Truncation.response, 16, "<bos>abcdefgh\nUVWXYZ"),
        (Truncation.response, 11, "<bos>abcdefgh\nU"),
    ],
)
def test_truncation_cuts_the_side_it_is_named_after(truncation, max_length, expected):
    (sequence,) = encode([LONG], TOKENIZER, settings(truncation=truncation, max_length=max_length))
    assert TOKENIZER.decode(sequence.input_ids) == expected
    response = expected[expected.index("U") :].replace("<eos>", "")
    assert response_ids(sequence) == [*response.encode(), *([EOS] if expected.endswith("<eos>") else [])]


def test_response_too_long_to_fit_alone_is_cut_even_when_the_prompt_gives_way():
    (sequence,) = encode([Example("a", "", "U" * 30)], TOKENIZER, settings(max_length=8))
    assert sequence.input_ids == [BOS, *b"UUUUUUU"]


@given(
    st.text(max_size=30),
    st.text(min_size=1, max_size=30),
    st.sampled_from(Truncation),
    st.integers(8, 40),
    st.booleans(),
)
def test_no_sequence_is_longer_than_allowed_or_without_loss(prompt, response, truncation, max_length, packing):
    data = settings(truncation=truncation, max_length=max_length, packing=packing)
    sequences = encode(
        [Example(prompt, "", response), Example("", "", "x"), LONG, Example("p", "", "y")], TOKENIZER, data
    )
    for sequence in sequences:
        assert len(sequence.input_ids) == len(sequence.labels) == sum(sequence.lengths) <= max_length
        assert response_ids(sequence)
        starts = [sum(sequence.lengths[:index]) for index in range(len(sequence.lengths))]
        assert {sequence.labels[start] for start in starts} == {IGNORED_LABEL}


@pytest.mark.parametrize("truncation", [Truncation.drop, Truncation.response])
def test_examples_without_room_for_a_response_are_dropped_and_counted(truncation, caplog):
    data = settings(truncation=truncation, max_length=10)
    with caplog.at_level(logging.WARNING):
        sequences = encode([LONG, Example("a", "", "b"), Example("c", "", "")], TOKENIZER, data)
    assert [TOKENIZER.decode(sequence.input_ids) for sequence in sequences] == ["<bos>a\nb<eos>"]
    assert "2 of 3 examples dropped" in caplog.text
    assert "data.max_length=10" in caplog.text


def test_nothing_left_at_all_is_an_error():
    with pytest.raises(ValueError, match=r"none of 1 examples .*data\.max_length=10"):
        encode([LONG], TOKENIZER, settings(truncation=Truncation.drop, max_length=10))
    assert encode([], TOKENIZER, settings()) == []


def test_packing_keeps_every_token_and_the_order():
    plain = encode(EXAMPLES * 3, TOKENIZER, settings())
    packed = encode(EXAMPLES * 3, TOKENIZER, settings(packing=True, max_length=40))
    for attribute in ("input_ids", "labels", "lengths"):
        flat = [value for sequence in packed for value in getattr(sequence, attribute)]
        assert flat == [value for sequence in plain for value in getattr(sequence, attribute)]
    assert len(packed) < len(plain)


def test_collate_pads_on_the_right():
    """12 tokens beside 15: <bos>, the 8 bytes of the prompt, hi and <eos>; then 3 of padding."""
    batch = collate(encode(EXAMPLES[:2], TOKENIZER, settings()), PAD)
    short = [BOS, *b"Say hi.\nhi", EOS]
    assert batch["input_ids"].tolist()[1] == [*short, PAD, PAD, PAD]
    assert batch["labels"].tolist()[1] == [IGNORED_LABEL] * 9 + [*b"hi", EOS] + [IGNORED_LABEL] * 3
    assert batch["token_mask"].tolist()[1] == [True] * 12 + [False] * 3
    assert batch["token_mask"].equal(batch["attention_mask"].bool())
    assert "position_ids" not in batch


def test_positions_of_a_pack_start_again_at_each_example_and_at_the_padding():
    """Lengths 2 and 3, then 1 and padding of 4: 0 1 | 0 1 2 and 0 | 0 1 2 3."""
    sequences = [
        TokenSequence([5, 6, 7, 8, 9], [IGNORED_LABEL, 6, IGNORED_LABEL, 8, 9], [2, 3]),
        TokenSequence([1], [IGNORED_LABEL], [1]),
    ]
    batch = collate(sequences, PAD)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]
    assert batch["token_mask"].tolist() == [[True] * 5, [True] + [False] * 4]
    assert "attention_mask" not in batch


PACKABLE = ["olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "granitemoe", "llama", "qwen3", "gpt2"]


@pytest.mark.parametrize("family", PACKABLE)
def test_packed_logits_are_the_unpacked_ones(family):
    """Examples of a pack do not see each other, in rows with padding left over too.

    Sixteen short examples are packed into rows of at most 64 tokens, three or more each.
    """
    model = tiny_model(family)
    examples = [Example("abcdefgh"[: index % 8 + 1], "x" * (index % 4), f"{index:05d}") for index in range(16)]
    plain = encode(examples, TOKENIZER, settings())
    packed = encode(examples, TOKENIZER, settings(packing=True, max_length=64))
    batch = collate(packed, PAD)
    assert (~batch["token_mask"]).any()
    with torch.no_grad():
        logits_BTV = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([sequence.input_ids])).logits[0] for sequence in plain]
        padded = collate(plain, PAD)
        together_BTV = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
    torch.testing.assert_close(logits_BTV[batch["token_mask"]], torch.cat(alone), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together_BTV[padded["token_mask"]], torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_packed_loss_is_the_unpacked_one():
    """Both are the mean over the same response tokens; a label at an example's start would add terms."""
    model = tiny_model("olmoe")
    losses = []
    for packing in (False, True):
        batch = collate(encode(EXAMPLES * 2, TOKENIZER, settings(packing=packing, max_length=64)), PAD)
        batch.pop("token_mask")
        with torch.no_grad():
            losses.append(model(**batch, use_cache=False).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", PACKABLE)
def test_models_that_keep_examples_apart_pass_the_check(family):
    check_packing(tiny_model(family))
    check_packing(tiny_model(family).to(torch.bfloat16))


def test_model_that_attends_across_examples_is_refused():
    """Of transformers 5.23's GPT-OSS, that is: it builds its masks without position_ids."""
    with pytest.raises(ValueError, match=r"data\.packing=true: GptOss.* attends across"):
        check_packing(tiny_model("gpt_oss"))
