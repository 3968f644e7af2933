"""Ends what a killed process leaves behind: ``python -m server.watcher MARK [FOLDER]``.

Its standard input is a pipe that the watched process holds open and nobody writes to. It ends with that process,
however that ends.
"""

from __future__ import annotations

import shutil
import sys

from server.flower import end_marked


def main() -> None:
    """Wait for the end of the input; then end the marked processes and remove the folder."""
    mark, *folders = sys.argv[1:]
    sys.stdin.buffer.read()
    end_marked(mark)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
