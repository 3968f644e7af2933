"""The ClientApp: decode a request, let the Site work, encode its answer."""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client import messages
from client.assemble import default_private_root, real_site, simulated_site
from client.data import site_names
from client.evaluation import HeldOutLoss
from client.messages import Joined, Request, Sender
from client.model import base_model_loads
from client.site import Site
from conf.compose import load_config, settings_hash
from conf.schema import Config, Device, Mode
from strategies.adapters import Arrays
from strategies.base import ClientUpdate

Answer = TypeVar("Answer")

app = ClientApp()
log = logging.getLogger("bouquet.client")

_OUR_PACKAGES = ("client", "conf", "strategies")

_sites: dict[tuple[str, str, str], Site] = {}
"""(settings hash, run, site) -> Site: virtual clients of one process keep their encoded data."""


@dataclass(frozen=True)
class Node:
    """Where this process stands: what the run cannot set for a site."""

    site: str
    data: str | None = None
    """The site's own data file; None in simulation."""
    private: Path | None = None
    """Folder of the site's private state; None in simulation."""
    device: Device | None = None


@app.query()
def join(message: Message, context: Context) -> Message:
    """Say who is here, with which base model and how much data."""
    return _answer(message, context, _join, messages.encode_joined)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the received adapter and send back what is shared."""
    return _answer(message, context, _train, messages.encode_update)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the received adapter on held-out data."""
    return _answer(message, context, _evaluate, messages.encode_losses)


def _join(site: Site, _request: Request, _adapter: Arrays) -> Joined:
    return Joined(num_examples=site.num_examples, base_sha256=site.adapted.base.identity.sha256)


def _train(site: Site, request: Request, adapter: Arrays) -> ClientUpdate:
    return site.train(request.server_round, adapter, evaluate_own=request.evaluate_own)


def _evaluate(site: Site, _request: Request, adapter: Arrays) -> Mapping[str, HeldOutLoss]:
    return site.evaluate(adapter)


def node_of(node_config: Mapping[str, Any], config: Config) -> Node:
    """Read a node's own settings.

    Raises:
        ValueError: If ``site`` or ``data`` is missing at a real site, if a real site is asked to simulate, or if the
            number of simulated nodes differs from the number of sites.
    """
    if config.federation.mode is Mode.simulation:
        names = site_names(config)
        if "partition-id" not in node_config:
            raise ValueError("this is a site of its own, not a simulated one: the run needs federation=remote")
        index = int(node_config["partition-id"])
        if int(node_config["num-partitions"]) != len(names):
            raise ValueError(f"{node_config['num-partitions']} simulated nodes for {len(names)} sites")
        return Node(site=names[index])
    for key in ("site", "data"):
        if not node_config.get(key):
            example = 'flower-supernode --node-config \'site="NAME" data="FILE"\''
            raise ValueError(f"the node config needs {key}=...: {example}")
    private = str(node_config.get("private", "") or default_private_root())
    device = str(node_config.get("device", ""))
    if device and device not in Device.__members__:
        raise ValueError(f"node config device must be one of {', '.join(Device.__members__)}, got {device!r}")
    return Node(
        site=str(node_config["site"]),
        data=str(Path(str(node_config["data"])).expanduser()),
        private=Path(private).expanduser(),
        device=Device[device] if device else None,
    )


def _answer(
    message: Message,
    context: Context,
    work: Callable[[Site, Request, Arrays], Answer],
    encode: Callable[[Sender, Answer, Message], Message],
) -> Message:
    name, hash_here = str(context.node_config.get("site", f"node {context.node_id}")), ""
    try:
        config = load_config(str(context.run_config["overrides"]))
        hash_here = settings_hash(config)
        node = node_of(context.node_config, config)
        name = node.site
        config.device = node.device or config.device
        request, adapter = messages.decode_request(message)
        if request.settings_hash != hash_here:
            raise ValueError(f"settings hash {hash_here[:12]} here, {request.settings_hash[:12]} at the server")
        answer = work(_site(request, config, node), request, adapter)
        return encode(_sender(name, hash_here), answer, message)
    # The edge of the process: whatever went wrong is told by name instead of ending as an anonymous crash.
    except Exception as error:
        log.exception("site %s failed", name)
        reason = str(error) if _is_ours(error) else f"{type(error).__name__} (details in the site's log)"
        return messages.encode_failure(_sender(name, hash_here), reason, message)


def _is_ours(error: Exception) -> bool:
    """Whether our code raised it to be read: a library's exception may quote the site's data, which stays here."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return isinstance(error, ValueError) and module.partition(".")[0] in _OUR_PACKAGES


def _site(request: Request, config: Config, node: Node) -> Site:
    if not re.fullmatch(r"\w+", request.run):
        raise ValueError(f"the run must be named by letters and digits, got {request.run!r}")
    key = (request.settings_hash, request.run, node.site)
    if key not in _sites:
        if node.data is None:
            _sites[key] = simulated_site(config, node.site, Path(request.private_root))
        else:
            assert node.private is not None
            _sites[key] = real_site(config, node.site, node.data, node.private / request.run)
    return _sites[key]


def _sender(site: str, hash_here: str) -> Sender:
    process = f"{platform.node()}:{os.getpid()}"
    return Sender(site=site, settings_hash=hash_here, process=process, base_model_loads=base_model_loads())
