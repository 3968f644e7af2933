"""The ClientApp: hands each message to the site's warm worker, or answers it itself.

Flower starts a new process for every message to a real site. With a worker that process imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, replace

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from client import messages
from client.call import Call, process_started
from client.failures import reason_of
from client.messages import Sender
from client.node import Node, is_real, real_node
from client.worker.ask import Wanted, ask
from client.worker.place import base_key, code_sha256

app = ClientApp()
log = logging.getLogger("bouquet.client")

_WANTED = "bouquet-worker"
"""Key of what a run wants of its worker in ``Context.state``, which lives in the SuperNode's memory."""


@app.query()
def join(message: Message, context: Context) -> Message:
    """Say who is here, with which base model and how much data."""
    return _answered(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train from the received adapter and send back what is shared."""
    return _answered(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the received adapter on held-out data."""
    return _answered(message, context)


def _answered(message: Message, context: Context) -> Message:
    real = is_real(context.node_config)
    call = Call(
        node_id=context.node_id,
        node_config=context.node_config,
        overrides=str(context.run_config["overrides"]),
        process_started=process_started() if real else None,
    )
    try:
        if real:
            node = real_node(call.node_config)
            wanted = _wanted(call, node, context)
            if wanted.enabled:
                return messages.from_bytes(ask(node, wanted, call, messages.to_bytes(message)))
    # The edge of the process, as in ``client.answer``.
    except Exception as error:
        log.exception("site %s failed", call.site)
        sender = Sender(site=call.site, settings_hash="", process="", base_model_loads=0)
        return messages.encode_failure(sender, reason_of(error), message)
    from client.answer import answer  # noqa: PLC0415 - torch takes seconds to import

    return answer(message, call)


def _wanted(call: Call, node: Node, context: Context) -> Wanted:
    """What the run wants of its worker. Composing its settings takes half a second: done once a run, then remembered.

    Raises:
        ValueError: If the settings cannot be composed.
    """
    source = hashlib.sha256(f"{code_sha256()}\0{call.overrides}".encode()).hexdigest()
    record = context.state.config_records.get(_WANTED)
    if record is None or record["source"] != source:
        from conf.compose import load_config  # noqa: PLC0415 - see above

        config = load_config(call.overrides)
        wanted = Wanted(
            enabled=config.worker.enabled,
            idle_seconds=60 * config.worker.idle_minutes,
            base=base_key(config.model, node.device or config.device),
        )
        record = ConfigRecord({"source": source, "json": json.dumps(asdict(wanted))})
        context.state[_WANTED] = record
    wanted = Wanted(**json.loads(str(record["json"])))
    return wanted if node.worker is None else replace(wanted, enabled=node.worker)
