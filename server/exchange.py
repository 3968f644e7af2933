"""Messages out, replies back, within a deadline that is ours."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

# Flower's own send_and_receive looks every 3 s, longer than a small round takes.
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Exchange:
    """Requests that are under way."""

    grid: Grid
    asked: dict[str, int]
    """Message id -> node id. A reply that Flower makes for a dead node names the message, not the node."""
    taken: Collection[str]
    """Ids of the messages that Flower could store; to the others there will be no reply."""
    deadline: float
    """On ``time.monotonic``'s clock, seconds."""

    def replies(self) -> list[Message]:
        """Replies that came before the deadline, in no particular order, at most one to each request."""
        waiting, received = set(self.taken), []
        while True:
            # Looks once even if the caller came after the deadline: it had work of its own meanwhile.
            for reply in poll(self.grid, waiting):
                if reply.metadata.reply_to_message_id in waiting:
                    waiting.remove(reply.metadata.reply_to_message_id)
                    received.append(reply)
            if not waiting or time.monotonic() >= self.deadline:
                return received
            time.sleep(POLL_SECONDS)


def send(grid: Grid, requests: Sequence[Message], timeout_seconds: float) -> Exchange:
    """Send all requests; collect with ``replies``. Requests that Flower cannot store count as asked."""
    taken = push(grid, requests)
    asked = {request.metadata.message_id: request.metadata.dst_node_id for request in requests}
    return Exchange(grid, asked, taken.keys(), time.monotonic() + timeout_seconds)


def push(grid: Grid, requests: Sequence[Message]) -> dict[str, int]:
    """Message id -> node id of the requests that Flower took; it leaves out what it could not store."""
    taken = set(grid.push_messages(requests)) if requests else set()
    nodes = {request.metadata.message_id: request.metadata.dst_node_id for request in requests}
    return {message_id: node for message_id, node in nodes.items() if message_id in taken}


def poll(grid: Grid, message_ids: Collection[str]) -> list[Message]:
    """Replies to ``message_ids`` that are there now."""
    return list(grid.pull_messages(sorted(message_ids))) if message_ids else []
