"""A federation in this process: Flower's Grid around the real ClientApp, with everything sent as real bytes."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client.app import app as client_app
from client.messages import TRAIN, payload_bytes
from server.app import app as server_app
from server.record import RunFolder, parse_line

Answer = Callable[[Message], Message]
Fault = Callable[[Message, Answer], Sequence[Message]]
"""Takes a message and what would answer it honestly; returns the replies that are sent instead."""

_run_ids = itertools.count(7_000)
# As in Flower, nobody can guess these, and no two runs have the same.
_node_ids = itertools.count(9_000_001, 7_919)


@dataclass
class Node:
    """One SuperNode."""

    node_config: Mapping[str, Any]
    fault: Fault | None = None
    overrides: str | None = None
    """Settings of its ClientApp if they are not the run's."""


@dataclass(frozen=True)
class Sent:
    """One message as it went over the wire."""

    up: bool
    """From the site to the server."""
    site: int
    """Node id."""
    kind: str
    content: bytes

    def message(self) -> Message:
        """The message, read again from its bytes."""
        return message_from_proto(ProtoMessage.FromString(self.content))


@dataclass
class Loopback(Grid):
    """Answers each message when it is pushed; replies lie ready for the next pull."""

    overrides: str
    run_id: int = field(default_factory=lambda: next(_run_ids))
    nodes: dict[int, Node] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    late: list[Message] = field(default_factory=list)
    """Replies that become ready with the next messages that are pushed."""
    newest_first: bool = False
    """Hand replies out in the opposite order."""
    _ready: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = self.run_id, 1, 1

    def connect(self, node: Node) -> int:
        """The node's id."""
        node_id = next(_node_ids)
        self.nodes[node_id] = node
        return node_id

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        self._ready += self.late
        self.late = []
        taken = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            if message.metadata.dst_node_id in self.nodes:
                taken.append(message.metadata.message_id)
                self._ready += self._answers(message)
        return taken

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        wanted = set(message_ids)
        pulled = [reply for reply in self._ready if reply.metadata.reply_to_message_id in wanted]
        self._ready = [reply for reply in self._ready if reply.metadata.reply_to_message_id not in wanted]
        return pulled[::-1] if self.newest_first else pulled

    def payload(self, kind: str, *, up: bool) -> int:
        """Bytes of all arrays that went one way in messages of one kind."""
        return sum(payload_bytes(sent.message()) for sent in self.sent if (sent.kind, sent.up) == (kind, up))

    def _answers(self, message: Message) -> list[Message]:
        node_id = message.metadata.dst_node_id
        node = self.nodes[node_id]

        def honest(received: Message) -> Message:
            run_config = {"overrides": self.overrides if node.overrides is None else node.overrides}
            return client_app(received, Context(self.run_id, node_id, dict(node.node_config), RecordDict(), run_config))

        received = self._over_the_wire(message, node_id, up=False)
        replies = [honest(received)] if node.fault is None else node.fault(received, honest)
        return [self._over_the_wire(reply, node_id, up=True) for reply in replies]

    def _over_the_wire(self, message: Message, node_id: int, *, up: bool) -> Message:
        content = message_to_proto(message).SerializeToString()
        self.sent.append(Sent(up, node_id, message.metadata.message_type, content))
        return self.sent[-1].message()


@dataclass
class Finished:
    """A run of the ServerApp to its end."""

    folder: RunFolder
    log: str
    error: Exception | None
    grid: Loopback

    @property
    def summary(self) -> dict[str, Any]:
        summary = self.folder.summary()
        assert summary is not None
        return summary

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The tagged lines of the log, parsed."""
        return [values for values in map(parse_line, self.log.splitlines()) if values is not None]

    @property
    def events(self) -> list[str]:
        return [values["text"] for values in self.lines if values["kind"] == "event"]

    def rounds(self) -> list[dict[str, Any]]:
        return [row for row in self.folder.rows() if row["type"] == "round"]

    def site_rows(self, site: str) -> list[dict[str, Any]]:
        return [row for row in self.folder.rows() if row["type"] == "site" and row["site"] == site]

    def adapter(self) -> dict[str, bytes]:
        """The files of the adapter's folder."""
        return {path.name: path.read_bytes() for path in (self.folder.path / "adapter").iterdir()}


def simulation(overrides: str, num_sites: int, faults: Mapping[int, Fault] | None = None) -> Loopback:
    """A grid of ``num_sites`` simulated nodes; ``faults`` by partition, in the order of the sites' names."""
    grid = Loopback(overrides)
    for partition in range(num_sites):
        node_config = {"partition-id": partition, "num-partitions": num_sites}
        grid.connect(Node(node_config, (faults or {}).get(partition)))
    return grid


def run_server(grid: Loopback, folder: Path) -> Finished:
    """Run the real ServerApp on ``grid`` to its end, whatever that is."""
    grid.overrides = f"{grid.overrides} output={json.dumps(str(folder))}"
    context = Context(grid.run_id, 1, {}, RecordDict(), {"overrides": grid.overrides})
    error = None
    with contextlib.redirect_stdout(io.StringIO()) as log:
        try:
            server_app(grid, context)
        except (ValueError, RuntimeError) as raised:
            error = raised
    return Finished(RunFolder(folder), log.getvalue(), error, grid)


def in_round(server_round: int, fault: Fault, kind: str = TRAIN) -> Fault:
    """The fault, but only for messages of one kind in one round."""

    def only_then(message: Message, honest: Answer) -> Sequence[Message]:
        due = message.metadata.message_type == kind and message.metadata.group_id == str(server_round)
        return fault(message, honest) if due else [honest(message)]

    return only_then
