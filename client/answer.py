"""A request answered: decode it, let the Site work, encode what it says. Needs torch: see ``client.worker``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Message

from client import messages
from client.assemble import real_site, simulated_site
from client.base_model import base_model_loads, process_name
from client.bases import materialise
from client.call import Call
from client.data import site_names
from client.evaluation.examination import examine
from client.failures import reason_of
from client.messages import EVALUATE, JOIN, TRAIN, Asked, Joined, Request, Sender
from client.node import Node, real_node
from client.site import Site
from client.throughput import training_began
from conf.compose import load_config, settings_hash
from conf.schema import Config, Mode
from strategies.base import ClientUpdate

log = logging.getLogger("bouquet.client")

_sites: dict[tuple[str, str, Node], Site] = {}
"""(settings hash, run, node) -> Site, oldest first: whoever answers several messages keeps its encoded data."""
_REAL_RUNS_KEPT = 2
"""Runs whose encoded data a real site's process keeps; a simulation's processes serve one run."""


def answer(message: Message, call: Call) -> Message:
    """The reply to any message of ours; what went wrong is a reply too."""
    name, hash_here = call.site, ""
    try:
        config = load_config(call.overrides)
        hash_here = settings_hash(config)
        node = node_of(call.node_config, config)
        name = node.site
        config.device = node.device or config.device
        asked = messages.decode_request(message)
        request = asked.request
        if request.settings_hash != hash_here:
            raise ValueError(f"settings hash {hash_here[:12]} here, {request.settings_hash[:12]} at the server")
        return _reply(_site(request, config, node), asked, message, call)
    # The edge of the process: whatever went wrong is told by name instead of ending as an anonymous crash.
    except Exception as error:
        log.exception("site %s failed", name)
        return messages.encode_failure(_sender(name, hash_here), reason_of(error), message)


def node_of(node_config: Mapping[str, Any], config: Config) -> Node:
    """Read a node's own settings.

    Raises:
        ValueError: As ``real_node``, if a real site is asked to simulate, or if the number of simulated nodes differs
            from the number of sites.
    """
    if config.federation.mode is Mode.remote:
        return real_node(node_config)
    names = site_names(config)
    if "partition-id" not in node_config:
        raise ValueError("this is a site of its own, not a simulated one: the run needs federation=remote")
    index = int(node_config["partition-id"])
    if int(node_config["num-partitions"]) != len(names):
        raise ValueError(f"{node_config['num-partitions']} simulated nodes for {len(names)} sites")
    return Node(site=names[index])


def base_has_changed() -> bool:
    """Whether the base model on disk is another by now than the one that this process's sites hold."""
    held = next(iter(_sites.values()), None)
    return held is not None and materialise(held.config.model).sha256 != held.adapted.base.identity.sha256


def _reply(site: Site, asked: Asked, message: Message, call: Call) -> Message:
    kind, request = message.metadata.message_type, asked.request
    if kind == TRAIN:
        return messages.encode_update(_sender_of(site, request), _train(site, asked, message, call), message)
    if kind == EVALUATE:
        losses = site.evaluate(asked.adapter)
        measured = examine(site, asked.adapter, asked.broadcast or asked.adapter) if request.matrix else None
        return messages.encode_losses(_sender_of(site, request), losses, message, measured)
    if kind == JOIN:
        joined = Joined(num_examples=site.num_examples, base_sha256=site.adapted.base.identity.sha256)
        return messages.encode_joined(_sender_of(site, request), joined, message)
    raise ValueError(f"message type {kind!r}, known are {JOIN}, {TRAIN} and {EVALUATE}")


def _train(site: Site, asked: Asked, message: Message, call: Call) -> ClientUpdate:
    """The site's update, with two more metrics of a real site.

    delivery_seconds: from the server's request, by its clock, to the start of Flower's process for it.
    startup_seconds: from there to the first training step.
    """
    request = asked.request
    update = site.train(request.server_round, asked.adapter, asked.broadcast, evaluate_own=request.evaluate_own)
    began = training_began()
    if call.process_started is None or began is None:
        return update
    waited = {
        "delivery_seconds": call.process_started - message.metadata.created_at,
        "startup_seconds": began - call.process_started,
    }
    return replace(update, metrics={**update.metrics, **waited})


def _site(request: Request, config: Config, node: Node) -> Site:
    if not re.fullmatch(r"\w+", request.run):
        raise ValueError(f"the run must be named by letters and digits, got {request.run!r}")
    key = (request.settings_hash, request.run, node)
    if key not in _sites:
        if node.data is None:
            _sites[key] = simulated_site(config, node.site, Path(request.private_root))
        else:
            assert node.private is not None
            while len(_sites) >= _REAL_RUNS_KEPT:
                del _sites[next(iter(_sites))]
            folder = node.private / request.run
            _sites[key] = real_site(
                config, node.site, node.data, folder, rewards=node.rewards, preference=node.preference
            )
    return _sites[key]


def _sender_of(site: Site, request: Request) -> Sender:
    return _sender(site.name, request.settings_hash)


def _sender(site: str, hash_here: str) -> Sender:
    return Sender(
        site=site, settings_hash=hash_here, process=process_name(os.getpid()), base_model_loads=base_model_loads()
    )
