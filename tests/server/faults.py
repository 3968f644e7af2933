"""What can go wrong at a site, as the grid of ``loopback.py`` takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from client.messages import TRAIN, decode_update, encode_update
from strategies.base import ClientUpdate
from tests.server.loopback import Answer, Fault


def crashes(message: Message, honest: Answer) -> Sequence[Message]:
    """What Flower sends for a ClientApp that died."""
    return [Message(Error(ErrorCode.CLIENT_APP_CRASHED, "killed: out of memory"), reply_to=message)]


def stays_silent(message: Message, honest: Answer) -> Sequence[Message]:
    return []


def answers_twice(message: Message, honest: Answer) -> Sequence[Message]:
    reply = honest(message)
    return [reply, reply]


def sends(change: Callable[[ClientUpdate], ClientUpdate], **sender_changes: str) -> Fault:
    """Sends another update than it trained, or in another's name; anything but a train message is answered honestly."""

    def fault(message: Message, honest: Answer) -> Sequence[Message]:
        reply = honest(message)
        if message.metadata.message_type != TRAIN:
            return [reply]
        sender, update = decode_update(reply)
        return [encode_update(replace(sender, **sender_changes), change(update), message)]

    return fault


def with_adapter(change: Callable[[str, np.ndarray], tuple[str, np.ndarray]]) -> Callable[[ClientUpdate], ClientUpdate]:
    """An update whose arrays (and their names) were changed one by one."""
    return lambda update: replace(update, adapter=dict(change(*item) for item in update.adapter.items()))
