"""The SuperLink's list of sites, kept equal to a folder of public keys."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from server.certificates import public_fingerprint
from server.flower import Connection

_TIMEOUT_SECONDS = 120
_NO_ANSWER = "no-answer"
SITES_FILE = "BOUQUET_SITES"
"""Environment variable of the SuperLink and its ServerApps: the record of the sites registered there."""


def registered_sites() -> dict[str, dict[str, str]]:
    """Node id -> site and key fingerprint at the SuperLink of this process; empty where anyone may join."""
    path = os.environ.get(SITES_FILE)
    return dict(json.loads(Path(path).read_text())) if path and Path(path).exists() else {}


class Register:
    """Registers the keys that appear in a folder and unregisters those that leave it.

    ``record`` holds what is registered, node id -> {"site": name, "key": fingerprint}; it belongs to the SuperLink's
    database beside it.
    """

    def __init__(self, connection: Connection, folder: Path, record: Path, tell: Callable[[str], None]) -> None:
        """Watch ``folder`` for files NAME.pub; ``tell`` takes one line for people."""
        self.connection = connection
        self.folder = folder
        self.record = record
        self.tell = tell
        self._failed: set[tuple[str, str]] = set()
        self.sites: dict[str, dict[str, str]] = json.loads(record.read_text()) if record.exists() else {}

    def sync(self) -> None:
        """Bring the SuperLink up to date; what fails is told once.

        A key that cannot be added is tried again when its file changes, one that cannot be removed every time.
        """
        wanted = self._wanted()
        for node, facts in list(self.sites.items()):
            if wanted.get(facts["key"]) != facts["site"]:
                self._unregister(node, facts)
        present = {facts["key"] for facts in self.sites.values()}
        for key, site in wanted.items():
            if key not in present and (site, key) not in self._failed:
                self._add(site, key)

    def _wanted(self) -> dict[str, str]:
        """Fingerprint -> site."""
        wanted: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.pub")):
            try:
                key = public_fingerprint(path)
            except ValueError as error:
                self._tell_once(path.stem, str(error))
                continue
            if wanted.setdefault(key, path.stem) != path.stem:
                self._tell_once(path.stem, f"{path} is the key of {wanted[key]} already: each site needs its own")
        return wanted

    def _add(self, site: str, key: str) -> None:
        path = self.folder / f"{site}.pub"
        answer = self._flwr("register", str(path), "bouquet", "--name", site)
        if "node-id" not in answer:
            hint = "a key that was removed cannot come back: bouquet certs --replace makes a new one"
            if _NO_ANSWER in answer:
                self._tell_once(site, f"{site} could not be registered yet, is tried again: {answer[_NO_ANSWER]}")
                return
            self._failed.add((site, key))
            self.tell(f"{site} could not be registered: {answer.get('error-message', answer)} ({hint})")
            return
        self.sites[str(answer["node-id"])] = {"site": site, "key": key}
        self._save()
        self.tell(f"{site} may join, with key {key}")

    def _unregister(self, node: str, facts: dict[str, str]) -> None:
        answer = self._flwr("unregister", node, "bouquet")
        if "node-id" not in answer:
            why = answer.get(_NO_ANSWER) or answer.get("error-message", answer)
            self._tell_once(
                facts["site"], f"{facts['site']} could NOT be removed, may still join, is tried again: {why}"
            )
            return
        del self.sites[node]
        self._save()
        self.tell(f"{facts['site']} may no longer join with key {facts['key']}")

    def _flwr(self, command: str, *words: str) -> dict[str, object]:
        """Answer of ``flwr supernode COMMAND``; a foreign one as its ``error-message``, none as ``_NO_ANSWER``."""
        try:
            done = subprocess.run(  # noqa: S603
                self.connection.command("supernode", command, *words, "--format", "json"),
                env=dict(self.connection.environment), cwd=self.connection.environment["FLWR_HOME"],
                capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {_NO_ANSWER: f"no answer in {_TIMEOUT_SECONDS} s"}
        try:
            return dict(json.loads(done.stdout))
        except ValueError:
            return {"error-message": (done.stdout + done.stderr).strip()[-300:]}

    def _tell_once(self, site: str, text: str) -> None:
        if (site, text) not in self._failed:
            self._failed.add((site, text))
            self.tell(text)

    def _save(self) -> None:
        scratch = self.record.with_suffix(".new")
        scratch.write_text(json.dumps(self.sites, indent=1) + "\n")
        scratch.rename(self.record)
