"""What server and sites say to each other: the only file that knows Flower's records by key.

Three exchanges, each one request and one reply:

* join: who is there, with which base model, settings and how much data;
* train: the global adapter out and what the strategy broadcasts, the shared part of the site's adapter and the method's
  extras back;
* evaluate: the global adapter out, losses on held-out data back; with ``Request.matrix`` the site's part of the
  evaluation matrix too, for which a site that gets an adapter of its own is sent the global one as ``broadcast``.

A reply that was not made by this file under the same settings is refused by ``decode_*``. The types
encoded here have no field for anything private.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from google.protobuf.message import EncodeError
from numpy.typing import NDArray

from client.evaluation.measured import Measured
from client.foreign import check_metrics, checked_name
from client.records import to_arrays, to_record
from strategies.base import MOST_EXAMPLES, MOST_TOKENS, ClientUpdate

if TYPE_CHECKING:  # torch takes seconds to import, and who only passes messages on needs none
    from client.evaluation.held_out import HeldOutLoss

FORMAT = 4
"""Version of this protocol; a reply with another one is refused."""

_NO_TEXT = (json.JSONDecodeError, UnicodeDecodeError)
TRAIN, EVALUATE, JOIN = MessageType.TRAIN, MessageType.EVALUATE, MessageType.QUERY


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server asks, besides the adapter."""

    run: str
    """Identity of the run; private state is kept under it."""
    server_round: int
    settings_hash: str
    """The sender's settings; a site that composed others refuses."""
    evaluate_own: bool = False
    """Whether to measure the locally trained adapter too."""
    matrix: bool = False
    """Whether to test all models on all sets with the evaluation."""
    private_root: str = ""
    """Folder of the simulated sites' private stores; a real site uses its own and ignores this."""


class Asked(NamedTuple):
    """A decoded request."""

    request: Request
    adapter: dict[str, NDArray[Any]]
    broadcast: dict[str, NDArray[Any]]
    """What the strategy sends beside the adapter."""


@dataclass(frozen=True, kw_only=True)
class Sender:
    """Who replies, in every reply."""

    site: str
    settings_hash: str
    process: str
    """The same in all replies of a process, and nothing else: for counting base model loads."""
    base_model_loads: int
    """Times that process has loaded the base model so far."""


@dataclass(frozen=True, kw_only=True)
class Joined:
    """A site's answer to the first message."""

    num_examples: int
    """Training examples it holds."""
    base_sha256: str


def encode_request(
    kind: str, node_id: int, request: Request, adapter: ArrayRecord | None = None, broadcast: ArrayRecord | None = None
) -> Message:
    """A message of ``kind`` to one node.

    Args:
        kind: Of the message.
        node_id: Whom it goes to.
        request: What is asked.
        adapter: ``to_record`` of it; several messages may carry the same record.
        broadcast: The same of what the strategy sends beside the adapter.
    """
    content = RecordDict(
        {
            "request": ConfigRecord({"json": json.dumps(asdict(request))}),
            "adapter": adapter or ArrayRecord(),
            "broadcast": broadcast or ArrayRecord(),
        }
    )
    return Message(content, node_id, kind, group_id=str(request.server_round))


def decode_request(message: Message) -> Asked:
    """The request, and the arrays that came with it.

    Raises:
        ValueError: If the message is not one of ours.
    """
    try:
        request = Request(**json.loads(str(message.content.config_records["request"]["json"])))
        arrays = message.content.array_records
        return Asked(request, to_arrays(arrays["adapter"]), to_arrays(arrays["broadcast"]))
    except (LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"not a request of this version of Bouquet: {error!r}") from error


def encode_joined(sender: Sender, joined: Joined, request: Message) -> Message:
    """Reply to a join message."""
    return _reply(sender, asdict(joined), {}, request)


def encode_update(sender: Sender, update: ClientUpdate, request: Message) -> Message:
    """Reply to a train message."""
    facts = {"num_examples": update.num_examples, "metrics": dict(update.metrics)}
    arrays = {
        "adapter": to_record(update.adapter),
        "expert-tokens": to_record(update.expert_tokens),
        "extras": to_record(update.extras),
    }
    return _reply(sender, facts, arrays, request)


def encode_losses(
    sender: Sender, losses: Mapping[str, HeldOutLoss], request: Message, measured: Measured | None = None
) -> Message:
    """Reply to an evaluate message: held-out set (named after the site that owns it) -> loss; the matrix if asked."""
    facts: dict[str, Any] = {"losses": {name: asdict(loss) for name, loss in losses.items()}}
    if measured is not None:
        facts["matrix"] = measured.to_json()
    return _reply(sender, facts, {}, request)


def encode_failure(sender: Sender, reason: str, request: Message) -> Message:
    """Reply of a site that could not do what was asked; ``decode_*`` raises the reason."""
    return _reply(sender, {"failure": reason}, {}, request)


def decode_joined(reply: Message) -> tuple[Sender, Joined]:
    """Read the answer to a join message.

    Raises:
        ValueError: If the reply is foreign, malformed or a failure.
    """
    with _malformed():
        sender, facts = _open(reply)
        return sender, Joined(num_examples=int(facts["num_examples"]), base_sha256=str(facts["base_sha256"]))


def decode_update(reply: Message) -> tuple[Sender, ClientUpdate]:
    """Read the answer to a train message; values and layout of its arrays are judged by ``Strategy.check_update``.

    Raises:
        ValueError: If the reply is foreign, malformed or a failure, adapter or extras are not float32, the token
            counts are not float64, or a metric is out of bounds.
    """
    with _malformed():
        sender, facts = _open(reply)
        arrays = reply.content.array_records
        update = ClientUpdate(
            site=sender.site,
            adapter=to_arrays(arrays["adapter"]),
            num_examples=int(facts["num_examples"]),
            expert_tokens=to_arrays(arrays["expert-tokens"], "float64"),
            extras=to_arrays(arrays["extras"]),
            metrics={str(name): float(value) for name, value in facts["metrics"].items()},
        )
    check_metrics(update.metrics)
    return sender, update


def decode_losses(reply: Message) -> tuple[Sender, dict[str, HeldOutLoss]]:
    """Read the answer to an evaluate message.

    Raises:
        ValueError: If the reply is foreign, malformed or a failure, a loss is NaN or infinite, a metric is out of
            bounds, or one was measured on nothing.
    """
    with _malformed():
        sender, facts = _open(reply)
        losses = {str(name): _held_out_loss(**loss) for name, loss in facts["losses"].items()}
    for name, loss in losses.items():
        if not math.isfinite(loss.loss):
            raise ValueError(f"held-out loss on {name} is {loss.loss}")
        check_metrics(loss.metrics)
        if not (1 <= loss.num_examples <= MOST_EXAMPLES and 1 <= loss.num_tokens <= MOST_TOKENS):
            counts = f"{str(loss.num_examples)[:30]} examples, {str(loss.num_tokens)[:30]} tokens"
            limits = f"1 to {MOST_EXAMPLES:g} and 1 to {MOST_TOKENS:g} are possible"
            raise ValueError(f"held-out loss on {name} is that of {counts}; {limits}")
    return sender, losses


def decode_measured(reply: Message) -> Measured | None:
    """A site's part of the evaluation matrix out of its answer to an evaluate message; None if it sent none.

    Raises:
        ValueError: If the reply is foreign, malformed or a failure, or a number is none or out of range.
    """
    with _malformed():
        values = _open(reply)[1].get("matrix")
        return None if values is None else Measured.from_json(values)


def payload_bytes(message: Message) -> int:
    """Bytes of all arrays in a message: what a round costs on the wire, without Flower's envelope."""
    if message.has_error():
        return 0
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def to_bytes(message: Message) -> bytes:
    """A whole message as protobuf, for another process.

    Raises:
        ValueError: If it is too long for one.
    """
    try:
        content: bytes = message_to_proto(message).SerializeToString()
    except EncodeError as error:
        raise ValueError(
            f"a message with {payload_bytes(message)} bytes of arrays is too long for the worker: set worker=off"
        ) from error
    return content


def from_bytes(content: bytes) -> Message:
    """The message that ``to_bytes`` wrote."""
    return message_from_proto(ProtoMessage.FromString(content))


def site_of(reply: Message) -> str | None:
    """Name of the replying site as far as the reply tells it, also when the reply is a failure."""
    if reply.has_error():
        return None
    with suppress(ValueError), _malformed():
        return str(json.loads(str(reply.content.config_records["reply"]["json"]))["sender"]["site"])
    return None


@contextmanager
def _malformed() -> Iterator[None]:
    """Turn what a hostile or foreign reply can raise into one ``ValueError``."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError, *_NO_TEXT) as error:
        raise ValueError(f"not a reply of this version of Bouquet: {error!r}") from error


def _reply(sender: Sender, facts: Mapping[str, Any], arrays: Mapping[str, ArrayRecord], request: Message) -> Message:
    header = json.dumps({"format": FORMAT, "sender": asdict(sender), "facts": dict(facts)})
    content: dict[str, Any] = {"reply": ConfigRecord({"json": header}), **arrays}
    return Message(RecordDict(content), reply_to=request)


def _open(reply: Message) -> tuple[Sender, dict[str, Any]]:
    if reply.has_error():
        raise ValueError(f"the client app crashed: {reply.error.reason}")
    header = json.loads(str(reply.content.config_records["reply"]["json"]))
    if header["format"] != FORMAT:
        raise ValueError(f"reply in format {header['format']}, this server reads {FORMAT}")
    sender, facts = _sender(**header["sender"]), dict(header["facts"])
    if "failure" in facts:
        raise ValueError(str(facts["failure"]))
    return sender, facts


def _sender(*, site: object, settings_hash: object, process: object, base_model_loads: Any) -> Sender:
    """A sender out of foreign JSON, of the right types."""
    return Sender(
        site=checked_name("a site's name", str(site)),
        settings_hash=checked_name("a settings hash", str(settings_hash)),
        process=checked_name("a process' name", str(process)),
        base_model_loads=int(base_model_loads),
    )


def _held_out_loss(*, loss: Any, num_tokens: Any, num_examples: Any, metrics: Any) -> HeldOutLoss:
    """A loss out of foreign JSON, of the right types."""
    from client.evaluation.held_out import HeldOutLoss  # noqa: PLC0415 - see the top of this file

    measured = {str(name): float(value) for name, value in metrics.items()}
    return HeldOutLoss(loss=float(loss), num_tokens=int(num_tokens), num_examples=int(num_examples), metrics=measured)
