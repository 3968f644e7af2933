"""The entry point: ready for signals before the command line is imported, which takes a second."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from pathlib import Path

FAILED, BAD_SETTINGS, INTERRUPTED = 1, 2, 130
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CLEANING_SECONDS = 60.0
"""How long after a signal another has no effect."""


def main() -> None:
    """Exit code 0 only if everything asked for was done."""
    _end_in_order()
    _settle_cache()
    try:
        from server.launch import cli  # noqa: PLC0415 - see above

        cli()
    except ValueError as error:
        _fail(str(error), BAD_SETTINGS)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), FAILED)
    except RuntimeError as error:
        _fail(str(error), FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        # All is cleaned up. Python gives up our handlers before it ends: an interrupt then would be the exit code.
        for each in _ENDING:
            signal.signal(each, signal.SIG_IGN)


def _end_in_order() -> None:
    """Ctrl-C, SIGTERM and a closed terminal end what runs; further ones do not cut off what is cleaned up then."""
    cleaning_since = -math.inf

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal cleaning_since
        if time.monotonic() - cleaning_since < _CLEANING_SECONDS:
            return
        cleaning_since = time.monotonic()
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping; this takes some seconds\n")
        raise KeyboardInterrupt

    for each in _ENDING:
        if signal.getsignal(each) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(each, interrupt)


def _settle_cache() -> None:
    """What we start works elsewhere: a relative $BOUQUET_CACHE is made absolute here, where the user wrote it."""
    if cache := os.environ.get("BOUQUET_CACHE"):
        os.environ["BOUQUET_CACHE"] = str(Path(cache).expanduser().absolute())


def _fail(text: str, code: int) -> None:
    from rich.console import Console  # noqa: PLC0415 - as the command line
    from rich.markup import escape  # noqa: PLC0415

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/] {escape(text)}")
    sys.exit(code)
