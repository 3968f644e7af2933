"""``flwr-clientapp`` as a SuperNode finds it: by name, in a new process, with streams of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from server.clientapps import fast_clientapps
from tests.server.commands import BIN

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def environment():
    with fast_clientapps(os.environ) as changes:
        yield {**os.environ, **changes}


def clientapp(environment, *words):
    command = shutil.which("flwr-clientapp", path=environment["PATH"])
    return subprocess.run([command, *words], env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_it_does_what_flowers_command_does(environment):
    flowers = subprocess.run([BIN / "flwr-clientapp", "--help"], capture_output=True, text=True, check=True)
    ours = clientapp(environment, "--help")
    assert ours.stdout == flowers.stdout
    assert "unrecognized arguments: --nonsense" in clientapp(environment, "--token", "t", "--nonsense").stderr


def test_without_the_forking_process_flowers_own_command_runs(environment):
    with fast_clientapps(os.environ) as other:
        (starter,) = [
            child for child in psutil.Process().children()
            if "server.clientapps" in child.cmdline() and child.environ().get("PATH") == other["PATH"]
        ]  # fmt: skip
        starter.kill()
        assert "Run a Flower ClientApp" in clientapp({**os.environ, **other}, "--help").stdout


HOLD = """
import os, time
from server.clientapps import fast_clientapps
with fast_clientapps(dict(os.environ)) as environment:
    print(environment["PATH"], flush=True)
    time.sleep(3600)
"""


def test_it_ends_with_whoever_started_it():
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline()
    (starter,) = psutil.Process(holder.pid).children()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    deadline = time.monotonic() + 60
    while starter.is_running() and starter.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
