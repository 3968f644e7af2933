"""Messages out and replies back: one reply to a request at most, and never a wait for what cannot come."""

from __future__ import annotations

import time

import pytest
from flwr.app import Message, RecordDict

from client.messages import JOIN
from server.exchange import POLL_SECONDS, poll, push, send
from tests.server.faults import answers_twice, stays_silent
from tests.server.loopback import Loopback, Node


def echo(message, honest):
    return [Message(RecordDict(), reply_to=message)]


def grid_of(*faults):
    grid = Loopback("")
    for fault in faults:
        grid.connect(Node({}, fault))
    return grid


def requests(grid, *extra_nodes):
    return [Message(RecordDict(), node, JOIN) for node in (*grid.nodes, *extra_nodes)]


def senders(replies):
    return [reply.metadata.src_node_id for reply in replies]


def test_each_request_gets_its_reply():
    grid = grid_of(echo, echo, echo)
    exchange = send(grid, requests(grid), 5)
    assert sorted(exchange.asked.values()) == sorted(grid.nodes)
    assert sorted(senders(exchange.replies())) == sorted(grid.nodes)


def test_silent_node_is_waited_for_until_the_deadline_and_no_longer():
    grid = grid_of(echo, stays_silent)
    start = time.monotonic()
    replies = send(grid, requests(grid), 0.3).replies()
    assert senders(replies) == [next(iter(grid.nodes))]
    assert 0.3 <= time.monotonic() - start < 0.3 + 5 * POLL_SECONDS


def test_second_reply_to_a_request_is_ignored():
    grid = grid_of(lambda message, honest: answers_twice(message, lambda received: echo(received, honest)[0]))
    assert len(send(grid, requests(grid), 1).replies()) == 1


def test_message_that_flower_could_not_store_is_asked_but_not_waited_for():
    grid = grid_of(echo)
    exchange = send(grid, requests(grid, 12345), 60)
    assert sorted(exchange.asked.values()) == sorted([*grid.nodes, 12345])
    start = time.monotonic()
    assert senders(exchange.replies()) == list(grid.nodes)
    assert time.monotonic() - start < 1


def test_replies_that_lie_ready_are_taken_after_the_deadline_too():
    """The server's own evaluation, done meanwhile, may take longer than the sites had."""
    grid = grid_of(echo)
    exchange = send(grid, requests(grid), 0)
    time.sleep(0.01)
    assert len(exchange.replies()) == 1


def test_nothing_to_send_or_ask_needs_no_flower():
    grid = grid_of()
    assert push(grid, []) == {}
    assert poll(grid, []) == []
    assert send(grid, [], 60).replies() == []


@pytest.mark.parametrize("missing", [0, 1])
def test_push_names_what_was_taken(missing):
    grid = grid_of(echo, echo)
    asked = requests(grid, *[7] * missing)
    taken = push(grid, asked)
    assert list(taken.values()) == list(grid.nodes)
    assert set(taken) <= {message.metadata.message_id for message in asked}
