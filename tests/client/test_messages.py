"""What crosses the wire: our types come back as they were, anything else is refused with a reason."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from client.evaluation.held_out import HeldOutLoss
from client.messages import (
    EVALUATE,
    JOIN,
    TRAIN,
    Joined,
    Request,
    Sender,
    decode_joined,
    decode_losses,
    decode_request,
    decode_update,
    encode_failure,
    encode_joined,
    encode_losses,
    encode_request,
    encode_update,
    payload_bytes,
    site_of,
)
from client.records import to_arrays, to_record
from strategies.base import ClientUpdate

SENDER = Sender(site="ward-7", settings_hash="abc", process="host:17", base_model_loads=1)
REQUEST = Request(run="42", server_round=3, settings_hash="abc", evaluate_own=True, private_root="/p")
ADAPTER = {
    "model.layers.0.mlp.experts.gate_up_proj.lora_A": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "model.layers.0.self_attn.q_proj.lora_B": np.float32([[1e-38, -0.0], [3.4e38, 1.5]]),
}
UPDATE = ClientUpdate(
    site="ward-7",
    adapter=ADAPTER,
    num_examples=12,
    expert_tokens={"model.layers.0.mlp": np.array([3.0, 0.0])},
    extras={"control/model.layers.0.mlp": np.float32([0.5, -2.0, 3e-9])},
    metrics={"train_loss": 0.1, "num_steps": 2.0},
)
BROADCAST = {"reference/model.layers.0.mlp": np.float32([0.25, 0.75])}
LOSSES = {
    "ward-7": HeldOutLoss(loss=1.25, num_tokens=30, num_examples=4, metrics={"held_out_kl": 0.5}),
    "*pooled*": HeldOutLoss(loss=2.0, num_tokens=90, num_examples=12),
}


@pytest.fixture(autouse=True)
def task():
    """Who sends, as Flower sets it in a process of a run."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 42, 1, 1


def over_the_wire(message):
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))


def request(kind=TRAIN):
    return over_the_wire(encode_request(kind, 7, REQUEST, to_record(ADAPTER), to_record(BROADCAST)))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def with_header(**changes):
    """A train reply whose header holds something else."""
    reply = encode_update(SENDER, UPDATE, request())
    header = json.loads(reply.content.config_records["reply"]["json"])
    for key, value in changes.items():
        node = header
        *groups, last = key.split("__")
        for group in groups:
            node = node[group]
        node[last] = value
    reply.content.config_records["reply"]["json"] = json.dumps(header)
    return over_the_wire(reply)


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE, JOIN])
def test_request_comes_back_as_it_was(kind):
    received = request(kind)
    assert received.metadata.message_type == kind
    assert received.metadata.dst_node_id == 7
    decoded, adapter, broadcast = decode_request(received)
    assert decoded == REQUEST
    assert_same(adapter, ADAPTER)
    assert_same(broadcast, BROADCAST)


def test_request_without_a_broadcast_has_an_empty_one():
    _, adapter, broadcast = decode_request(over_the_wire(encode_request(TRAIN, 7, REQUEST, to_record(ADAPTER))))
    assert_same(adapter, ADAPTER)
    assert broadcast == {}


def test_joined_comes_back_as_it_was():
    joined = Joined(num_examples=9, base_sha256="f00")
    assert decode_joined(over_the_wire(encode_joined(SENDER, joined, request(JOIN)))) == (SENDER, joined)


def test_update_comes_back_as_it_was():
    sender, update = decode_update(over_the_wire(encode_update(SENDER, UPDATE, request())))
    assert sender == SENDER
    assert_same(update.adapter, UPDATE.adapter)
    assert_same(update.expert_tokens, UPDATE.expert_tokens)
    assert_same(update.extras, UPDATE.extras)
    bare = {"adapter": {}, "expert_tokens": {}, "extras": {}}
    assert replace(update, **bare) == replace(UPDATE, **bare)


def test_update_without_arrays_comes_back_too():
    bare = replace(UPDATE, adapter={}, expert_tokens={}, extras={})
    assert decode_update(over_the_wire(encode_update(SENDER, bare, request()))) == (SENDER, bare)


def test_losses_come_back_as_they_were():
    assert decode_losses(over_the_wire(encode_losses(SENDER, LOSSES, request(EVALUATE)))) == (SENDER, LOSSES)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.floats(-1e18, 1e18))
def test_numbers_lose_no_bit(in_array, in_metric):
    update = replace(UPDATE, adapter={"x": np.float32([in_array])}, metrics={"train_loss": in_metric})
    _, received = decode_update(over_the_wire(encode_update(SENDER, update, request())))
    assert received.adapter["x"].tobytes() == update.adapter["x"].tobytes()
    assert received.metrics == update.metrics


@pytest.mark.parametrize("decode", [decode_joined, decode_update, decode_losses])
def test_failure_is_raised_with_its_reason_and_names_the_site(decode):
    reply = over_the_wire(encode_failure(SENDER, "data=/x: there is no such file", request()))
    assert site_of(reply) == "ward-7"
    with pytest.raises(ValueError, match=r"^data=/x: there is no such file$"):
        decode(reply)


@pytest.mark.parametrize("decode", [decode_joined, decode_update, decode_losses])
def test_crash_is_raised_with_flowers_reason(decode):
    reply = over_the_wire(Message(Error(8, "out of memory"), reply_to=request()))
    assert site_of(reply) is None
    assert payload_bytes(reply) == 0
    with pytest.raises(ValueError, match="^the client app crashed: out of memory$"):
        decode(reply)


FOREIGN = {
    "nothing": RecordDict(),
    "another app's": RecordDict({"arrays": to_record(ADAPTER), "metrics": ConfigRecord({"loss": 1.0})}),
    "no JSON": RecordDict({"reply": ConfigRecord({"json": "hello"})}),
    "JSON of another kind": RecordDict({"reply": ConfigRecord({"json": "[1, 2]"})}),
    "deep JSON": RecordDict({"reply": ConfigRecord({"json": "[" * 100_000})}),
    "arrays for text": RecordDict({"reply": to_record(ADAPTER)}),
}


@pytest.mark.parametrize("decode", [decode_joined, decode_update, decode_losses])
@pytest.mark.parametrize("content", FOREIGN)
def test_foreign_reply_is_refused(decode, content):
    reply = over_the_wire(Message(FOREIGN[content], reply_to=request()))
    assert site_of(reply) is None
    with pytest.raises(ValueError, match="^not a reply of this version of Bouquet"):
        decode(reply)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 1}, "reply in format 1, this server reads 4"),
        ({"sender": {"site": "x"}}, "not a reply of this version"),
        ({"sender__base_model_loads": "many"}, "invalid literal"),
        ({"facts": {}}, "not a reply of this version"),
        ({"facts__num_examples": None}, "not a reply of this version"),
        ({"facts__num_examples": math.inf}, "not a reply of this version"),
        ({"facts__metrics": [1]}, "not a reply of this version"),
        ({"facts__metrics": {"train_loss": math.nan}}, "^metric train_loss is nan; "),
        ({"facts__metrics": {"own_loss": math.inf}}, "^metric own_loss is inf; "),
    ],
)
def test_update_with_a_bad_header_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decode_update(with_header(**changes))


def test_names_in_a_header_are_text_whatever_was_sent():
    """A list for a name could not be looked up, a number would be another site's key."""
    sender, update = decode_update(with_header(sender__site=["a"], sender__process=3))
    assert (sender.site, update.site, sender.process) == ("['a']", "['a']", "3")


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_refused_by_site(loss):
    bad = {"ward-7": replace(LOSSES["ward-7"], loss=loss)}
    with pytest.raises(ValueError, match=rf"^held-out loss on ward-7 is {loss}$"):
        decode_losses(over_the_wire(encode_losses(SENDER, bad, request(EVALUATE))))


@pytest.mark.parametrize("count", ["num_examples", "num_tokens"])
def test_loss_over_nothing_is_refused(count):
    bad = {"ward-7": replace(LOSSES["ward-7"], **{count: 0})}
    with pytest.raises(
        ValueError, match=r"^held-out loss on ward-7 is that of .*; 1 to 1e\+12 and 1 to 1e\+15 are possible$"
    ):
        decode_losses(over_the_wire(encode_losses(SENDER, bad, request(EVALUATE))))


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.float64, np.bool_, np.complex64])
def test_array_of_another_dtype_is_refused_by_name(dtype):
    update = replace(UPDATE, adapter={"layer.lora_A": np.ones((2, 2), dtype)})
    with pytest.raises(ValueError, match=r"^layer.lora_A must be float32, got "):
        decode_update(over_the_wire(encode_update(SENDER, update, request())))


def test_token_counts_are_float64():
    update = replace(UPDATE, expert_tokens={"layer": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"^layer must be float64, got float32$"):
        decode_update(over_the_wire(encode_update(SENDER, update, request())))


def packed(*layout, values=b""):
    """A record as its docstring says, written independently."""
    text = json.dumps(layout).encode()
    while (8 + len(text)) % 16:
        text += b" "
    return struct.pack(">Q", len(text)) + text + values


def reply_with(content):
    reply = encode_update(SENDER, UPDATE, request())
    (key,) = reply.content["adapter"]
    array = Array(dtype="uint8", shape=(len(content),), stype=key, data=content)
    reply.content["adapter"] = ArrayRecord({key: array})
    return over_the_wire(reply)


def test_arrays_lie_one_after_the_other_behind_their_layout():
    values = np.float32([1.5, -2.0]).tobytes() + np.float32([[3.0]]).tobytes()
    _, update = decode_update(
        reply_with(packed(["b", "float32", [2]], ["a", "float32", [1, 1]], ["0", "float32", [0]], values=values))
    )
    assert_same(update.adapter, {"b": np.float32([1.5, -2]), "a": np.float32([[3]]), "0": np.zeros(0, np.float32)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a reply of this version"),
        (b"\xff" * 40, "not a reply of this version"),
        (packed(3), "not a reply of this version"),
        (packed(["x", "float32"]), "not enough values"),
        (packed(["x", "object", [1]], values=b"\0" * 8), "^x must be float32, got object$"),
        (
            packed(["x", "float32", [2]], values=b"\0" * 7),
            r"^x has the shape \[2\], but the record ends before it does$",
        ),
        (packed(["x", "float32", [9999999999999]]), r"^x has the shape \[9999999999999\], but the record ends"),
        (packed(["x", "float32", [-1]], values=b"\0" * 4), r"^x has the shape \[-1\]$"),
        (packed(["x", "float32", [1.0]], values=b"\0" * 4), r"^x has the shape \[1.0\]$"),
        (packed(["x", "float32", [1]], values=b"\0" * 5), "^1 bytes of a record belong to no array$"),
    ],
)
def test_bytes_that_are_no_arrays_are_refused(content, message):
    with pytest.raises(ValueError, match=message):
        decode_update(reply_with(content))


@given(st.binary(max_size=60), st.integers(0, 300))
def test_damaged_arrays_are_refused_or_read_and_nothing_else(inserted, place):
    whole = next(iter(to_record(ADAPTER).values())).data
    place = min(place, len(whole))
    try:
        decode_update(reply_with(whole[:place] + inserted + whole[place + len(inserted) :]))
    except ValueError as error:
        assert str(error)


def test_array_arrives_as_it_is_however_it_lies_in_memory():
    big_endian = ADAPTER["model.layers.0.self_attn.q_proj.lora_B"].astype(">f4")
    assert_same(to_arrays(to_record({"x": big_endian})), {"x": big_endian.astype(np.float32)})
    adapter = {"transposed": ADAPTER["model.layers.0.mlp.experts.gate_up_proj.lora_A"].T, "scalar": np.float32(3.0)}
    assert_same(to_arrays(to_record({name: np.asarray(array) for name, array in adapter.items()})), adapter)


def test_arrays_are_read_in_place():
    """No copy is made, and every value lies where its type may lie."""
    record = to_record(ADAPTER)
    (piece,) = record.values()
    for array in to_arrays(record).values():
        assert np.shares_memory(array, np.frombuffer(piece.data, np.uint8))
        assert array.flags.aligned
        assert not array.flags.writeable


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({"request": ConfigRecord({"json": "{}"})})])
def test_foreign_request_is_refused(content):
    with pytest.raises(ValueError, match="^not a request of this version of Bouquet"):
        decode_request(over_the_wire(Message(content, 7, TRAIN)))


def test_payload_is_the_bytes_of_all_arrays_and_of_their_layouts():
    """(24 + 4) float32 and 2 float64; beside them 3 float32 up and 2 down.

    Each record begins with the 8 bytes of its layout's length.
    """
    adapter = len(packed(*([name, "float32", array.shape] for name, array in ADAPTER.items()))) + 28 * 4
    tokens = len(packed(["model.layers.0.mlp", "float64", [2]])) + 2 * 8
    extras = len(packed(["control/model.layers.0.mlp", "float32", [3]])) + 3 * 4
    broadcast = len(packed(["reference/model.layers.0.mlp", "float32", [2]])) + 2 * 4
    assert payload_bytes(request()) == adapter + broadcast
    assert payload_bytes(over_the_wire(encode_update(SENDER, UPDATE, request()))) == adapter + tokens + extras
    assert payload_bytes(over_the_wire(encode_losses(SENDER, LOSSES, request(EVALUATE)))) == 0


def test_arrays_keep_their_order():
    received = to_arrays(to_record(ADAPTER))
    assert list(received) == list(ADAPTER)
    assert_same(received, ADAPTER)
