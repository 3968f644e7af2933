"""Commands in the documentation, the images and the units exist, with the options they are given."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
import yaml

from server.launch import cli

ROOT = Path(__file__).parents[1]
WRITTEN = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").iterdir() if path.suffix != ".png"),
    *sorted((ROOT / "docker").iterdir()),
]


def commands(path):
    """Word lists of all ``bouquet ...`` commands, lines joined at a backslash."""
    text = path.read_text().replace('"$bouquet"', "bouquet").replace('", "', " ").replace("\\\n", " ")
    for line in text.splitlines():
        for match in re.finditer(r"(?:^|[\s/\[\"])bouquet\"? ((?:[a-z-]+ )?.*)", line):
            yield match.group(1).split()


def command_of(words):
    """The typer command that ``words`` name, and the words after it; None for prose."""
    found = typer.main.get_command(cli)
    rest = list(words)
    while rest and hasattr(found, "commands"):
        if rest[0] not in found.commands:
            return None, rest
        found = found.commands[rest.pop(0)]
    return (None if hasattr(found, "commands") else found), rest


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.name)
def test_documented_options_exist(path):
    for words in commands(path):
        command, rest = command_of(words)
        if command is None:
            continue
        known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        rest = rest[: next((index for index, word in enumerate(rest) if word in ("&&", "|", ">", "#")), len(rest))]
        used = {re.match(r"--[a-z-]+", word).group() for word in rest if re.match(r"--[a-z]", word)}
        assert used <= known, f"{' '.join(words)}: {sorted(used - known)}"


def test_every_command_that_serves_is_documented():
    written = {tuple(words[:2]) for path in WRITTEN for words in commands(path)}
    assert {("server", "up"), ("site", "up")} <= written


@pytest.mark.parametrize("path", ["docker/compose.yaml", "docker/compose.gpu.yaml", "docs/kubernetes.yaml"])
def test_manifests_name_each_other_consistently(path):
    documents = list(yaml.safe_load_all((ROOT / path).read_text()))
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    if path == "docker/compose.gpu.yaml":
        assert documents[0]["services"].keys() <= compose["services"].keys()
    elif path == "docker/compose.yaml":
        used = {mount.split(":")[0] for service in compose["services"].values() for mount in service["volumes"]}
        assert used == {*compose["volumes"], "../outputs"}
    else:
        names = {(document["kind"], document["metadata"]["name"]) for document in documents}
        assert {("Deployment", "bouquet-server"), ("Deployment", "hospital-a"), ("Service", "bouquet-server")} <= names
        claims = re.findall(r"claimName: ([\w-]+)", (ROOT / path).read_text())
        assert {("PersistentVolumeClaim", claim) for claim in claims} <= names
