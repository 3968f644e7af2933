"""What ``kill -9`` of the one process that a user started leaves behind: nothing."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.server.commands import SMALL, free_port, service, superlink, write_site_files

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]
HOLD = """
import os, subprocess, sys, time
from pathlib import Path
from server.flower import MARK, marked
with marked(Path(sys.argv[1])) as mark:
    apart = ["sh", "-c", "setsid sleep 3600 & exec sleep 3600"]
    subprocess.Popen(apart, env=os.environ | {MARK: mark}, start_new_session=True)
    print("started", flush=True)
    time.sleep(3600)
"""


def all_of(process):
    """What a process has started, and what these have, in whatever session."""
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes):
    deadline = time.monotonic() + 60
    while left := [process for process in processes if is_running(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def is_running(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def kill(process):
    process.kill()
    process.wait()


def commands(processes):
    """Words of their command lines; a process may end meanwhile."""
    words = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            words += process.cmdline()
    return words


def test_marked_processes_and_their_folder_end_with_who_was_killed(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "started\n"
    started = all_of(holder)
    kill(holder)
    assert_gone(started)
    assert not folder.exists()


def test_killed_server_leaves_no_superlink(tmp_path):
    words = ("--insecure", "--host", "127.0.0.1", "--port", str(free_port()), "--home", str(tmp_path / "home"))
    with service(tmp_path, "server", "up", *words) as server_up:
        server_up.wait_for("the SuperLink listens")
        started = all_of(server_up.process)
        assert "server.gate" in commands(started)
        kill(server_up.process)
        assert_gone(started)


def test_killed_site_serves_its_data_no_longer(tmp_path):
    data = str(write_site_files(tmp_path / "data")["bank"])
    with superlink(tmp_path / "superlink") as address:
        words = ("--name", "bank", "--superlink", address, "--data", data, "--insecure", "--home", str(tmp_path / "s"))
        with service(tmp_path / "site", "site", "up", *words) as site_up:
            site_up.wait_for("SuperNode ID:")
            started = all_of(site_up.process)
            assert [word for word in commands(started) if word.endswith("flower-superexec")]
            (start_folder,) = [word for word in commands(started) if "/start-" in word]
            kill(site_up.process)
            assert_gone(started)
            assert not Path(start_folder).exists()


@pytest.mark.simulation
def test_killed_run_leaves_no_simulation_and_no_folder(tmp_path):
    with service(tmp_path, "run", *SMALL, "rounds=1000", "output=run") as run:
        deadline = time.monotonic() + 240
        while not any(word.endswith("/raylet") for word in commands(all_of(run.process))):
            assert time.monotonic() < deadline, run.printed()
            time.sleep(0.2)
        started = all_of(run.process)
        at_watcher = commands(started).index("server.watcher")
        home = Path(commands(started)[at_watcher + 2])
        assert home.is_dir()
        kill(run.process)
        assert_gone(started)
        assert not home.exists()
        assert [word for word in commands(psutil.process_iter()) if str(home) in word] == []
