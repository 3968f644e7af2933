"""What a site says when it could not do what was asked: enough to act on, nothing of its data."""

from __future__ import annotations

import re

_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/][^/'\":;,\n]*/)+")
"""Of an absolute path: everything but the file's name."""
_OUR_PACKAGES = ("client", "conf", "strategies")


class WorkerEndedError(RuntimeError):
    """The worker process ended before it had answered."""


def reason_of(error: Exception) -> str:
    """What may leave the site about an error: the text if we worded it, without its folders, else its type only."""
    if not is_ours(error):
        return f"{type(error).__name__} (details in the site's log)"
    return _FOLDERS.sub("", str(error))


def is_ours(error: Exception) -> bool:
    """Whether our code raised it to be read: a library's exception may quote the site's data, which stays here."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = str(trace.tb_frame.f_globals.get("__name__", "")) if trace is not None else ""
    return isinstance(error, ValueError | WorkerEndedError) and module.partition(".")[0] in _OUR_PACKAGES
