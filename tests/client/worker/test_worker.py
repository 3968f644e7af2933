"""A site with a real worker process: the real ClientApp, a real socket, a tiny base model.

The tests share one worker as far as they let it live, which is as long as messages of one SuperNode would.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Context, RecordDict

import client.training
from client.app import _wanted
from client.assemble import model_for
from client.base_model import process_name
from client.call import Call, process_started
from client.embedded import embedded_rows
from client.memory import choose_micro_batch
from client.messages import (
    EVALUATE,
    JOIN,
    TRAIN,
    Request,
    decode_joined,
    decode_losses,
    decode_update,
    encode_request,
    from_bytes,
    to_bytes,
)
from client.node import real_node
from client.records import to_record
from client.site import shared_arrays
from client.worker.ask import Wanted, ask
from client.worker.place import code_sha256, place_of
from client.worker.wire import greeting, receive, send
from conf.compose import load_config, settings_hash
from tests.client.tiny_models import save_tiny_base
from tests.server.loopback import Loopback, Node

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[3]


class Ward:
    """A site, its SuperNode, and a server that asks it."""

    def __init__(self, folder):
        save_tiny_base(folder / "base", "olmoe", num_hidden_layers=1)
        self.folder = folder
        rows = "".join(json.dumps(row) + "\n" for row in embedded_rows(40, seed=0))
        (folder / "ward.jsonl").write_text(rows)
        self.overrides = (
            f"federation=remote partition=files strategy=fc_moe model.source=hub model.name={folder / 'base'} "
            "lora.rank=2 device=cpu train.max_steps=40 train.batch_size=4 data.max_length=128"
        )
        self.node_config = {"site": "ward", "data": str(folder / "ward.jsonl"), "private": str(folder / "private")}

    def request(self, kind, server_round=0, adapter=None, run="r1"):
        Loopback(self.overrides)  # sets who is sending
        request = Request(run=run, server_round=server_round, settings_hash=settings_hash(self.config))
        message = encode_request(kind, 1, request, to_record(adapter or {}))
        message.metadata.__dict__["_message_id"] = message.object_id
        return message

    def ask(self, kind, server_round=0, adapter=None, run="r1", **node_config):
        grid = Loopback(self.overrides)
        node = grid.connect(Node(self.node_config | node_config))
        request = Request(run=run, server_round=server_round, settings_hash=settings_hash(self.config))
        (message_id,) = grid.push_messages([encode_request(kind, node, request, to_record(adapter or {}))])
        (reply,) = grid.pull_messages([message_id])
        return reply

    def worker(self):
        """Process id of the worker that answers, one being started if need be."""
        decode_joined(self.ask(JOIN))
        return int([line for line in self.log.splitlines() if line.endswith(" ready")][-1].split()[2])

    @property
    def config(self):
        return load_config(self.overrides)

    @property
    def adapter(self):
        return shared_arrays(model_for(self.config).initial_adapter(0), self.config)

    @property
    def place(self):
        return place_of(real_node(self.node_config), self.wanted.base)

    @property
    def wanted(self):
        grid = Loopback(self.overrides)
        call = Call(node_id=1, node_config=self.node_config, overrides=grid.overrides)
        return _wanted(call, real_node(self.node_config), Context(1, 1, self.node_config, RecordDict(), {}))

    @property
    def log(self):
        return self.place.log.read_text() if self.place.log.exists() else ""


@pytest.fixture(scope="module")
def ward(tmp_path_factory):
    ward = Ward(tmp_path_factory.mktemp("ward"))
    ward.adapter  # noqa: B018 - the first import of torch changes the environment, by which workers differ
    yield ward
    for line in ward.log.splitlines():
        if line.endswith("ready"):
            end(int(line.split()[2]))


def end(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if "client.worker" in process.cmdline():
            process.kill()
            process.wait(10)


def test_messages_that_race_start_one_worker(ward):
    message, call = (
        to_bytes(ward.request(JOIN)),
        Call(node_id=1, node_config=ward.node_config, overrides=ward.overrides),
    )
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, real_node(ward.node_config), ward.wanted, call, message) for _ in range(4)]
    senders = [decode_joined(from_bytes(reply.result()))[0] for reply in asked]
    assert len({sender.process for sender in senders}) == 1
    assert ward.log.count(" ready") == 1


def test_it_answers_every_kind_of_message_with_one_load_of_the_base(ward):
    joined = decode_joined(ward.ask(JOIN))
    update = decode_update(ward.ask(TRAIN, 1, ward.adapter, run="all"))
    losses = decode_losses(ward.ask(EVALUATE, 1, ward.adapter, run="all"))
    later = decode_joined(ward.ask(JOIN, run="later"))
    senders = [sender for sender, _ in (joined, update, losses, later)]
    (process,) = {sender.process for sender in senders}
    assert os.uname().nodename not in process
    assert {sender.base_model_loads for sender in senders} == {1}
    assert update[1].metrics["startup_seconds"] > 0
    assert np.isfinite(losses[1]["ward"].loss)


def test_startup_ends_where_the_first_step_begins(ward, monkeypatch):
    """After memory was estimated, which comes last before it; a process's start is known to 10 ms."""
    ready = []

    def slow(*arguments):
        time.sleep(0.1)
        chosen = choose_micro_batch(*arguments)
        ready.append(time.time())
        return chosen

    monkeypatch.setattr(client.training, "choose_micro_batch", slow)
    _, update = decode_update(ward.ask(TRAIN, 1, ward.adapter, run="stamped", worker="off"))
    began = process_started() + update.metrics["startup_seconds"]
    assert ready[0] - 0.02 <= began
    assert began + update.metrics["train_seconds"] <= time.time() + 0.02


def test_only_the_owner_can_reach_the_worker_or_read_its_log(ward):
    ward.worker()
    assert stat.S_IMODE(ward.place.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(ward.place.socket.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(ward.place.log.stat().st_mode) == 0o600


def test_it_has_left_the_session_of_whoever_started_it(ward):
    pid = ward.worker()
    assert os.getsid(pid) != os.getsid(0)
    assert psutil.Process(pid).ppid() != os.getpid()


LIGHT = """
import sys
from flwr.app import Context, RecordDict
from client.app import app
from client.messages import decode_joined, from_bytes
node_config, overrides = eval(sys.argv[1]), sys.argv[2]
reply = app(from_bytes(sys.stdin.buffer.read()), Context(1, 1, node_config, RecordDict(), {"overrides": overrides}))
print(sorted({"torch", "transformers", "peft", "datasets", "flwr_datasets", "pandas", "pyarrow"} & set(sys.modules)))
print(reply.content.config_records["reply"]["json"])
"""


def test_process_that_flower_starts_imports_no_torch(ward):
    run = subprocess.run(
        [sys.executable, "-c", LIGHT, repr(ward.node_config), ward.overrides],
        input=to_bytes(ward.request(JOIN)), capture_output=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    imported, answer = run.stdout.decode().splitlines()
    assert imported == "[]"
    assert '"num_examples": 32' in answer


def test_error_of_a_library_is_told_by_kind_alone_and_in_full_in_the_workers_log(ward):
    """A folder where the private file should be."""
    (ward.folder / "private" / "bad" / "ward.safetensors").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"^OSError \(details in the site's log\)$"):
        decode_update(ward.ask(TRAIN, 1, ward.adapter, run="bad"))
    assert "No such device" in ward.log


@contextlib.contextmanager
def answering(place, serve):
    """Somebody else at the worker's socket, who treats every caller as ``serve`` does."""
    place.socket.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place.socket))
        listener.listen()

        def loop():
            while True:
                connection, _ = listener.accept()
                with connection:
                    if serve(connection):
                        return

        thread = threading.Thread(target=loop)
        thread.start()
        yield
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(place.socket))
        thread.join()
    place.socket.unlink()


def test_worker_of_other_code_is_not_spoken_to(ward, tmp_path):
    node_config = ward.node_config | {"site": "lab", "private": str(tmp_path)}
    place, heard = place_of(real_node(node_config), ward.wanted.base), []

    def serve(connection):
        send(connection, f"{place.key} {'0' * 64}".encode())
        with contextlib.suppress(ConnectionError):
            heard.append(receive(connection))
        return True

    with answering(place, serve):
        reply = ward.ask(JOIN, **node_config)
    with pytest.raises(ValueError, match=r"^PermissionError \(details in the site's log\)$"):
        decode_joined(reply)
    assert heard == []


def test_two_workers_that_end_are_a_failure_by_the_sites_name(ward, tmp_path):
    """Here one that greets twice and hangs up; before its greeting a worker may end as often as it likes."""
    node_config = ward.node_config | {"site": "lab", "private": str(tmp_path)}
    place, calls = place_of(real_node(node_config), ward.wanted.base), []

    def serve(connection):
        calls.append(1)
        if len(calls) > 2:
            send(connection, greeting(place.key, code_sha256()))
        return len(calls) == 4

    with answering(place, serve):
        reply = ward.ask(JOIN, **node_config)
    with pytest.raises(ValueError, match=r"^the worker of site 'lab' ended 2 times before it had answered"):
        decode_joined(reply)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_train_message_whose_worker_is_killed_gives_what_it_would_have_given(ward):
    """FC-MoE's second round depends on what the first one left in the private store."""
    first = ward.worker()
    sender_before, trained = decode_update(ward.ask(TRAIN, 1, ward.adapter, run="killed"))
    adapter = trained.adapter
    before = ward.log.count("train of run")

    def kill_in_training():
        wait_for(lambda: ward.log.count("train of run") > before)
        os.kill(first, signal.SIGKILL)

    killer = threading.Thread(target=kill_in_training)
    killer.start()
    sender, update = decode_update(ward.ask(TRAIN, 2, adapter, run="killed"))
    killer.join()
    assert sender.process != sender_before.process
    assert sender.base_model_loads == 1
    here = {"worker": "off", "private": str(ward.folder / "here")}
    decode_update(ward.ask(TRAIN, 1, ward.adapter, run="killed", **here))
    undisturbed = decode_update(ward.ask(TRAIN, 2, adapter, run="killed", **here))[1]
    assert undisturbed.adapter.keys() == update.adapter.keys()
    for name, array in undisturbed.adapter.items():
        np.testing.assert_array_equal(update.adapter[name], array)


def test_base_that_changed_on_disk_is_loaded_anew_for_the_next_run(ward):
    """The worker looks when a run joins, so that no run changes its base on the way."""
    sender, joined = decode_joined(ward.ask(JOIN))
    save_tiny_base(ward.folder / "base", "olmoe", num_hidden_layers=1, seed=1)
    again, changed = decode_joined(ward.ask(JOIN))
    assert changed.base_sha256 != joined.base_sha256
    assert again.process != sender.process


def test_message_whose_sender_hangs_up_is_not_worked_on(ward):
    pid, before = ward.worker(), ward.log.count("train of run")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(ward.place.socket))
        receive(connection)
        call = Call(node_id=1, node_config=ward.node_config, overrides=ward.overrides)
        send(connection, json.dumps({"idle_seconds": 60, "supernode": os.getppid()}).encode())
        send(connection, call.to_json())
        send(connection, to_bytes(ward.request(TRAIN, 1, ward.adapter, run="left")))
        wait_for(lambda: ward.log.count("train of run") > before)
    wait_for(lambda: not psutil.pid_exists(pid))
    assert "hung up" in ward.log
    assert not list((ward.folder / "private" / "left").glob("*.safetensors"))


def test_node_decides_whether_it_has_a_worker(ward):
    assert ward.wanted == Wanted(enabled=True, idle_seconds=600, base=ward.wanted.base)
    sender, _ = decode_joined(ward.ask(JOIN, worker="off", run="here"))
    assert sender.process == process_name(os.getpid())
