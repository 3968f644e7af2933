"""Limits of control groups: by hand from files, and a real group where this machine lets us make one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from client.cgroups import free_of_cgroups


def group(folder, names, limit, used, reclaimable):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {reclaimable}\n")


V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("names", "line", "below"), [(V2, "0::/job/step", ""), (V1, "4:cpu,memory:/job/step", "memory")]
)
def test_tightest_limit_of_the_group_and_those_around_it(tmp_path, names, line, below):
    """300 of the job's 1000 are used, 50 of them can be had back: 750; the step itself may take 900 - 100."""
    own, root = tmp_path / "own", tmp_path / "mount" / below
    own.write_text(f"9:cpuset:/\n{line}\n")
    group(root / "job", names, 1000, 300, 50)
    group(root / "job" / "step", names, 900, 100, 0)
    assert free_of_cgroups(own, tmp_path / "mount") == 750
    group(root / "job" / "step", names, 350, 340, 0)
    assert free_of_cgroups(own, tmp_path / "mount") == 10
    group(root / "job" / "step", names, 350, 400, 0)
    assert free_of_cgroups(own, tmp_path / "mount") == 0


def test_in_a_container_the_root_is_the_group(tmp_path):
    (tmp_path / "own").write_text("0::/docker/4711\n")
    group(tmp_path / "mount", V2, 500, 100, 0)
    assert free_of_cgroups(tmp_path / "own", tmp_path / "mount") == 400


def test_without_a_limit_or_without_groups_it_is_infinite(tmp_path):
    assert free_of_cgroups(tmp_path / "none", tmp_path) == math.inf
    (tmp_path / "own").write_text("0::/a\n")
    assert free_of_cgroups(tmp_path / "own", tmp_path / "mount") == math.inf
    group(tmp_path / "mount" / "a", V2, "max", 100, 0)
    assert free_of_cgroups(tmp_path / "own", tmp_path / "mount") == math.inf


def test_a_process_of_a_real_group_sees_its_limit():
    root, limit = Path("/sys/fs/cgroup"), 300 * 2**20
    own = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), "0::/")
    version_1 = ":memory:" in own
    folder = (root / "memory" if version_1 else root) / f"bouquet-test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit))
    except OSError as error:
        if folder.exists():
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    code = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "from client.cgroups import free_of_cgroups; print(free_of_cgroups())"
    )
    try:
        found = subprocess.run(
            [sys.executable, "-c", code, os.fspath(folder / "cgroup.procs")],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
    finally:
        folder.rmdir()
    assert 200 * 2**20 < float(found.stdout) < limit
