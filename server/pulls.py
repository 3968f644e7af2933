"""How soon a process of Flower asks again for a part of a message that is still on its way.

A message is announced before its parts have all arrived, and Flower 1.41 asks for a missing one again after 1 s, then
2, then 4: a large adapter costs seconds that it need not. There is no setting for it.
"""

from __future__ import annotations

import sys

from flwr.supercore import constant

FIRST_PAUSE_SECONDS = 0.02
"""Before a part is asked for the second time; doubled each time, up to Flower's own limit of 10 s."""
_TAKEN_BY = "flwr.supercore.inflatable.inflatable_utils"


def ask_again_soon() -> None:
    """Set it for this process, before the code that takes it as the default of an argument is imported.

    Raises:
        RuntimeError: If that code has been imported already.
    """
    if _TAKEN_BY in sys.modules:
        raise RuntimeError(f"{_TAKEN_BY} is imported already: its defaults are set")
    constant.PULL_INITIAL_BACKOFF = FIRST_PAUSE_SECONDS  # type: ignore[assignment]
