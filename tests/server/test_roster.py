"""Sites are known by name, whatever Flower calls their nodes; who does not fit is refused with a reason."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from client.messages import Joined, Request, Sender, encode_failure, encode_joined
from server.roster import Roster
from tests.server.faults import answers_twice, crashes, stays_silent
from tests.server.loopback import Loopback, Node

REQUEST = Request(run="1", server_round=0, settings_hash="abc" * 20)
SENDER = Sender(site="", settings_hash=REQUEST.settings_hash, process="host:1", base_model_loads=1)
BASE = "f00" * 20


def joins(site, *, base=BASE, num_examples=5, **changes):
    """A node that answers as ``site``."""
    sender = replace(SENDER, site=site, **changes)
    return lambda message, honest: [encode_joined(sender, Joined(num_examples=num_examples, base_sha256=base), message)]


def fails(site, reason):
    return lambda message, honest: [encode_failure(replace(SENDER, site=site), reason, message)]


@pytest.fixture
def told():
    return []


@pytest.fixture
def roster(told):
    return Roster(REQUEST, BASE, told.append)


def grid_of(*faults):
    grid = Loopback("")
    for fault in faults:
        grid.connect(Node({}, fault))
    return grid


def test_sites_join_under_their_names(roster, told):
    grid = grid_of(joins("b"), joins("a", num_examples=9, process="host:2", base_model_loads=2))
    roster.wait_for(grid, 2, 5, fixed=True)
    assert roster.nodes == dict(zip("ba", grid.nodes, strict=True))
    assert roster.present(grid) == ["a", "b"]
    assert roster.loads == {"host:1": 1, "host:2": 2}
    assert "a joined with 9 training examples" in told


def test_key_speaks_only_for_the_site_it_was_registered_for(told):
    """Keys are known by node, names come from the sites: nobody may come in another's name."""
    grid = grid_of(joins("bank"), joins("bank"), joins("unlisted"))
    bank, impostor, _ = grid.nodes
    record = {str(bank): {"site": "bank"}, str(impostor): {"site": "court"}}
    roster = Roster(REQUEST, BASE, told.append, lambda: record)
    roster.wait_for(grid, 2, 5, fixed=True)
    assert roster.nodes["bank"] == bank
    assert roster.refused[impostor] == "bank refused: its key is that of 'court': bouquet site up --name court"
    assert "unlisted" in roster.nodes


def test_each_node_is_asked_once(roster):
    grid = grid_of(joins("a"), crashes, answers_twice_as("b"))
    for _ in range(3):
        roster.update(grid)
    assert len([sent for sent in grid.sent if not sent.up]) == 3


def answers_twice_as(site):
    return lambda message, honest: answers_twice(message, lambda received: joins(site)(received, honest)[0])


REFUSALS = {
    "settings": (
        joins("a", settings_hash="0" * 64),
        "a refused: settings hash 000000000000, this run has abcabcabcabc",
    ),
    "base model": (joins("a", base="0" * 64), "a refused: base model 000000000000, this run has f00f00f00f00"),
    "no data": (joins("a", num_examples=0), "a refused: it has 0 training examples, at least 1 is needed"),
    "failure": (fails("a", "data=x.csv: there is no such file"), "a refused: data=x.csv: there is no such file"),
    "crash": (crashes, "node [0-9]+ refused: the client app crashed: killed: out of memory"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_site_that_does_not_fit_is_refused_with_the_reason(roster, told, case):
    fault, reason = REFUSALS[case]
    grid = grid_of(fault, joins("b"))
    text = rf"^1 of 2 needed sites joined \(federation.join_timeout_seconds=60\): {reason}$"
    with pytest.raises(RuntimeError, match=text):
        roster.wait_for(grid, 2, 60, fixed=True)
    assert roster.present(grid) == ["b"]
    assert any(line.endswith(reason.rpartition("refused: ")[2]) for line in told)


@pytest.mark.parametrize("name", ["../a", "*pooled*", "a" * 101, "a\nBOUQUET {}"])
def test_site_whose_name_is_none_is_refused_in_one_line(roster, told, name):
    with pytest.raises(RuntimeError, match="name must be"):
        roster.wait_for(grid_of(joins(name), joins("b")), 2, 60, fixed=True)
    (line,) = [line for line in told if "refused" in line]
    assert "\n" not in line


def test_silent_node_is_waited_for_and_counted(roster):
    with pytest.raises(RuntimeError, match=r"^1 of 2 .*_seconds=0.1, 1 still to answer\): nobody was refused$"):
        roster.wait_for(grid_of(joins("a"), stays_silent), 2, 0.1, fixed=False)


def test_refused_node_does_not_keep_enough_others_from_starting(roster):
    grid = grid_of(joins("a"), joins("b", num_examples=0), joins("c"))
    roster.wait_for(grid, 2, 60, fixed=False)
    assert roster.present(grid) == ["a", "c"]


def test_second_node_in_a_connected_sites_name_is_refused(roster):
    grid = grid_of(joins("a"))
    roster.update(grid)
    first = dict(roster.nodes)
    second = grid.connect(Node({}, joins("a")))
    roster.update(grid)
    assert roster.nodes == first
    assert roster.refused == {second: "a refused: another connected node is 'a' already"}


def test_restarted_site_is_let_in_once_flower_misses_its_old_node(roster, told):
    """A SuperNode that was killed counts as connected for a while; its successor must not be locked out by that."""
    grid = grid_of(joins("a"))
    roster.update(grid)
    (old,) = grid.nodes
    new = grid.connect(Node({}, joins("a")))
    roster.update(grid)
    assert roster.nodes == {"a": old}
    del grid.nodes[old]
    roster.update(grid)
    assert roster.nodes == {"a": new}
    assert roster.refused == {}
    assert told[-2:] == ["a is gone", "a joined with 5 training examples"]


def test_site_that_left_is_told_once_and_not_present(roster, told):
    grid = grid_of(joins("a"), joins("b"))
    roster.update(grid)
    del grid.nodes[roster.nodes["b"]]
    for _ in range(3):
        roster.update(grid)
    assert roster.present(grid) == ["a"]
    assert told.count("b is gone") == 1


def test_reply_counts_only_from_its_own_node_and_under_the_same_settings(roster):
    grid = grid_of(joins("a"), joins("b"))
    roster.update(grid)
    sender = replace(SENDER, site="a", base_model_loads=3)
    roster.check_sender(roster.nodes["a"], sender)
    assert roster.loads == {"host:1": 3}
    with pytest.raises(ValueError, match="^reply in the name of 'a' from another node$"):
        roster.check_sender(roster.nodes["b"], sender)
    with pytest.raises(ValueError, match="^settings hash 111, this run has abcabcabcabc$"):
        roster.check_sender(roster.nodes["a"], replace(sender, settings_hash="111"))


def test_node_has_the_name_of_its_site_or_its_number(roster):
    grid = grid_of(joins("a"))
    roster.update(grid)
    assert roster.name_of(roster.nodes["a"]) == "a"
    assert roster.name_of(5) == "node 5"


def test_refused_node_is_asked_again_after_it_has_been_away(roster, told):
    """An operator mends the data file and restarts the SuperNode, which keeps its node id where keys are registered."""
    grid = grid_of(fails("a", "its data cannot be used"))
    (node,) = grid.nodes
    for _ in range(2):
        roster.update(grid)
    assert roster.nodes == {}
    away = grid.nodes.pop(node)
    roster.update(grid)
    grid.nodes[node] = replace(away, fault=joins("a"))
    roster.update(grid)
    assert (roster.nodes, roster.refused) == ({"a": node}, {})
    assert told[-1] == "a joined with 5 training examples"


def test_sites_that_are_away_are_waited_for(roster, told):
    grid = grid_of(joins("a"), joins("b"))
    roster.update(grid)
    node, away = roster.nodes["b"], grid.nodes.pop(roster.nodes["b"])
    threading.Timer(0.2, lambda: grid.nodes.update({node: away})).start()
    roster.wait_until(grid, lambda count: count >= 2, 30)
    assert roster.present(grid) == ["a", "b"]
    assert told[-1] == "waiting for sites, 1 connected"
    del grid.nodes[node]
    roster.wait_until(grid, lambda count: count >= 2, 0.1)
    assert roster.present(grid) == ["a"]
