"""Who takes part: sites by name, whatever Flower calls their nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from client.messages import JOIN, Joined, Request, Sender, decode_joined, encode_request, site_of
from client.site_names import check_site_name
from server.exchange import POLL_SECONDS, poll, push
from server.record import told


@dataclass
class Roster:
    """The sites that have joined, and why others were refused."""

    request: Request
    """What a join message asks; its settings hash must come back."""
    base_sha256: str
    """Base model of the run: a site with another one is refused."""
    tell: Callable[[str], None]
    """Takes one line for people."""
    registered: Callable[[], Mapping[str, Mapping[str, str]]] = dict
    """Gives node id -> {"site": name} as keys were registered: no other site may use that key. Empty: not checked."""
    nodes: dict[str, int] = field(default_factory=dict)
    """Site name -> node id, as last seen."""
    refused: dict[int, str] = field(default_factory=dict)
    """Node id -> why it may not take part; it is asked again after it has been away."""
    num_examples: dict[str, int] = field(default_factory=dict)
    """Site name -> training examples, as it said when it joined."""
    loads: dict[str, int] = field(default_factory=dict)
    """Process -> times it has loaded the base model."""
    _asked: dict[str, int] = field(default_factory=dict)
    """Message id -> node id of join messages without an answer."""
    _barred: set[int] = field(default_factory=set)
    """Nodes that were refused and have not been away since."""
    _rivals: dict[int, str] = field(default_factory=dict)
    """Node id -> site in whose name it came while another node was connected."""
    _gone: set[str] = field(default_factory=set)
    """Sites that were told to be gone."""

    def wait_for(self, grid: Grid, min_sites: int, timeout_seconds: float, *, fixed: bool) -> None:
        """Wait until ``min_sites`` have joined and nobody who was asked is still to answer.

        Args:
            grid: Flower's side.
            min_sites: Sites needed.
            timeout_seconds: Time to wait.
            fixed: True if no further node can appear (simulation): then failures end the wait at once.

        Raises:
            RuntimeError: If too few have joined in time; the text says who was refused and why.
        """
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            self.update(grid)
            if not self._asked and (len(self.nodes) >= min_sites or (fixed and self.refused)):
                break
            time.sleep(POLL_SECONDS)
        if len(self.nodes) < min_sites:
            refused = "; ".join(self.refused.values()) or "nobody was refused"
            waiting = f", {len(self._asked)} still to answer" if self._asked else ""
            raise RuntimeError(
                f"{len(self.nodes)} of {min_sites} needed sites joined "
                f"(federation.join_timeout_seconds={timeout_seconds:g}{waiting}): {refused}"
            )

    def wait_until(self, grid: Grid, enough: Callable[[int], bool], timeout_seconds: float) -> None:
        """Wait until enough of the sites that have joined are connected, or the time is over."""
        deadline = time.monotonic() + timeout_seconds
        self.update(grid)
        if not enough(len(self.present(grid))):
            self.tell(f"waiting for sites, {len(self.present(grid))} connected")
        while not enough(len(self.present(grid))) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self.update(grid)

    def update(self, grid: Grid) -> None:
        """Ask nodes not seen before who they are, and admit those that have answered; never waits."""
        present = set(grid.get_node_ids())
        self._tell_gone(present)
        self._forget_rivals(present)
        self._barred &= present
        self._ask(grid, sorted(present - set(self.nodes.values()) - self._barred - set(self._asked.values())))
        for reply in poll(grid, self._asked):
            node = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                self._admit(node, reply, present)
        self._asked = {message_id: node for message_id, node in self._asked.items() if node in present}

    def present(self, grid: Grid) -> list[str]:
        """Names of the sites that are connected now, sorted."""
        connected = set(grid.get_node_ids())
        return sorted(site for site, node in self.nodes.items() if node in connected)

    def name_of(self, node: int) -> str:
        """Site name of a node that has joined."""
        return next((site for site, known in self.nodes.items() if known == node), f"node {node}")

    def check_sender(self, node: int, sender: Sender) -> None:
        """Raise ``ValueError`` unless the reply comes from the site that joined on ``node``, with our settings."""
        self._check_settings(sender)
        if self.nodes.get(sender.site) != node:
            raise ValueError(f"reply in the name of {sender.site!r} from another node")
        self.loads[sender.process] = max(sender.base_model_loads, self.loads.get(sender.process, 0))

    def _tell_gone(self, present: set[int]) -> None:
        gone = {site for site, node in self.nodes.items() if node not in present}
        for site in sorted(gone - self._gone):
            self.tell(f"{site} is gone")
        self._gone = gone

    def _forget_rivals(self, present: set[int]) -> None:
        """Let nodes try again whose site's other node is gone: a restarted site comes before Flower misses the old."""
        for node, site in list(self._rivals.items()):
            if self.nodes[site] not in present:
                del self._rivals[node], self.refused[node]
                self._barred.discard(node)

    def _ask(self, grid: Grid, nodes: Sequence[int]) -> None:
        self._asked |= push(grid, [encode_request(JOIN, node, self.request) for node in nodes])

    def _admit(self, node: int, reply: Message, present: set[int]) -> None:
        try:
            sender, joined = decode_joined(reply)
            self._check_newcomer(node, sender, joined, present)
        except ValueError as error:
            self._barred.add(node)
            self.refused[node] = told(f"{site_of(reply) or f'node {node}'} refused: {error}")
            self.tell(self.refused[node])
        else:
            self.refused.pop(node, None)
            self.nodes[sender.site] = node
            self.num_examples[sender.site] = joined.num_examples
            self.loads[sender.process] = sender.base_model_loads
            self.tell(f"{sender.site} joined with {joined.num_examples} training examples")

    def _check_newcomer(self, node: int, sender: Sender, joined: Joined, present: set[int]) -> None:
        self._check_settings(sender)
        check_site_name(sender.site, "a site's name")
        owner = self.registered().get(str(node), {}).get("site", sender.site)
        if owner != sender.site:
            raise ValueError(f"its key is that of {owner!r}: bouquet site up --name {owner}")
        if joined.base_sha256 != self.base_sha256:
            raise ValueError(f"base model {joined.base_sha256[:12]}, this run has {self.base_sha256[:12]}")
        if joined.num_examples < 1:
            raise ValueError(f"it has {joined.num_examples} training examples, at least 1 is needed")
        known = self.nodes.get(sender.site)
        if known is not None and known != node and known in present:
            self._rivals[node] = sender.site
            raise ValueError(f"another connected node is {sender.site!r} already")

    def _check_settings(self, sender: Sender) -> None:
        theirs, ours = sender.settings_hash, self.request.settings_hash
        if theirs != ours:
            raise ValueError(f"settings hash {theirs[:12]}, this run has {ours[:12]}")
