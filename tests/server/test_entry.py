"""Exit codes and messages at the edge of the process, from its first moment to its last."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INTERRUPTED_LAST = """
import os, signal, sys
from server.entry import main

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=int(sys.argv.pop())):
        kill(process, number)

late = Late()
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_when_all_is_done_is_not_the_exit_code(tmp_path, number):
    """Python takes a program's own handlers away before it takes away its objects."""
    words = [sys.executable, "-c", INTERRUPTED_LAST, "compare", str(tmp_path), str(int(number))]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 2


INTERRUPTED_FIRST = """
import os, signal, sys
from server.entry import main

class Importing:
    def find_spec(self, name, path, target=None):
        if name == "server.launch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Importing())
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
main()
"""


def test_an_interrupt_while_the_command_line_is_imported_is_in_order():
    run = subprocess.run([sys.executable, "-c", INTERRUPTED_FIRST], cwd=ROOT, capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (130, b"\nstopping; this takes some seconds\n")


def test_a_file_that_cannot_be_used_is_named_without_a_traceback(tmp_path):
    code = "from server import entry, launch; launch.cli = lambda: open(sys.argv[1]); entry.main()"
    words = [sys.executable, "-c", f"import sys; {code}", str(tmp_path)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, f"error: {tmp_path}: Is a directory\n")


def test_a_relative_cache_is_where_the_user_is(tmp_path):
    code = "from server import entry, launch; launch.cli = lambda: print(os.environ['BOUQUET_CACHE']); entry.main()"
    words = [sys.executable, "-c", f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    for cache, expected in (("mine", tmp_path / "mine"), ("~/mine", Path.home() / "mine")):
        variables = os.environ | {"BOUQUET_CACHE": cache}
        run = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
        assert run.stdout == f"{expected}\n"
