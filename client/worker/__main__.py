"""``python -m client.worker KEY LOG IDLE_SECONDS``, with the listening socket as standard input."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Leave the caller's session, then serve: the worker outlives the process that Flower started for a message."""
    if os.fork():
        os._exit(0)
    os.setsid()
    from client.worker.serve import run_worker  # noqa: PLC0415 - torch takes seconds, for which nobody waits here

    key, log, idle_seconds = sys.argv[1:]
    run_worker(key, log, float(idle_seconds))


if __name__ == "__main__":
    main()
