"""Flower's SuperNode, which looks for messages more often for a while after the last one, and for their parts sooner.

Flower 1.41 waits 3 s between two looks, and the server's next request always comes just after a look: twice a round,
most of what a small round takes outside training. A site that waits for days keeps to Flower's pace. ``python -m
server.supernode`` takes the arguments of ``flower-supernode``.
"""

from __future__ import annotations

import math
import time
from typing import Any

from server.pulls import ask_again_soon

POLL_SECONDS = 0.25
"""Between looks, as long as messages are expected."""
EAGER_SECONDS = 60.0
"""How long after a message that is."""
_FLOWERS_PAUSE = 3.0
"""What Flower's loop sleeps when there was no message; while one is worked on, its sleeps are shorter."""


class EagerTime:
    """What Flower's loop takes for the module ``time``."""

    def __init__(self) -> None:
        self._worked_on = -math.inf

    def sleep(self, seconds: float) -> None:
        """Sleep, less long between two looks that follow a message."""
        if seconds < _FLOWERS_PAUSE:
            self._worked_on = time.monotonic()
        elif time.monotonic() - self._worked_on < EAGER_SECONDS:
            seconds = POLL_SECONDS
        time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def main() -> None:
    """Run Flower's command."""
    ask_again_soon()
    from flwr.supernode import start_client_internal  # noqa: PLC0415 - imports what that is for
    from flwr.supernode.cli import flower_supernode  # noqa: PLC0415

    # A constant in the middle of a function: there is nothing else to hold on to.
    vars(start_client_internal)["time"] = EagerTime()
    flower_supernode()


if __name__ == "__main__":
    main()
