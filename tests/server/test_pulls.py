"""In processes of their own: Flower takes the pause when it is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from server.pulls import FIRST_PAUSE_SECONDS

ROOT = Path(__file__).parents[2]

SUPERNODE = """
import contextlib, sys
from server.supernode import main
sys.argv = ["flower-supernode", "--help"]
with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
    main()
"""
CLIENTAPPS = """
import os, socket, subprocess, sys, tempfile
from server.clientapps import main
with socket.socket(socket.AF_UNIX) as listener, subprocess.Popen(["true"]) as parent:
    listener.bind(tempfile.mkdtemp() + "/socket")
    listener.listen()
    os.dup2(listener.fileno(), 0)
    sys.argv = ["clientapps", str(parent.pid), tempfile.mkdtemp()]
    main()
"""
PULL = """
import time
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, pull_objects

missing = ["second", "first"]
def pull(name):
    if missing:
        raise ObjectUnavailableError(missing.pop())
    return name.encode()

began = time.perf_counter()
assert pull_objects(["part"], pull) == {"part": b"part"}
print(time.perf_counter() - began)
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("process", [SUPERNODE, CLIENTAPPS])
def test_a_part_that_is_on_its_way_is_asked_for_again_soon(process):
    """The third time is after 0.06 s, give or take the fifth that Flower draws; by Flower's default it is after 3 s."""
    finished = python(process + PULL)
    assert finished.returncode == 0, finished.stderr
    assert 0.8 * 3 * FIRST_PAUSE_SECONDS <= float(finished.stdout) < 1


def test_too_late_is_an_error():
    finished = python("import flwr.supernode.cli\nfrom server.pulls import ask_again_soon\nask_again_soon()")
    assert "is imported already" in finished.stderr
