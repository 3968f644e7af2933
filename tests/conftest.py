"""For all tests: no network, no telemetry, one thread, and caches and workers' sockets that outlive nothing."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import hypothesis

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "BOUQUET_CACHE" not in os.environ:
    os.environ["BOUQUET_CACHE"] = tempfile.mkdtemp(prefix="bouquet-test-cache-")
    atexit.register(shutil.rmtree, os.environ["BOUQUET_CACHE"], ignore_errors=True)
# Short, for the paths of sockets.
os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="bouquet-test-")
atexit.register(shutil.rmtree, os.environ["XDG_RUNTIME_DIR"], ignore_errors=True)
# An example may take as long as a busy machine needs.
hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")
