"""A real browser: opens a page, runs the body of a function in it, and gives back what that returned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from server.report.page import render
from server.report.runs import read_runs
from strategies.fedavg import FedAvg
from tests.server.report.folders import write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ERRORS = "<head><script>window.failed = []; addEventListener('error', (event) => failed.push(event.message));</script>"
HELPERS = """
const cells = () => [...document.querySelectorAll("table.cells")].map((table) => [...table.tBodies[0].rows].map(
  (row) => [...row.cells].slice(1).map((cell) => [cell.className, cell.textContent])));
const point = (cell) => cell.dispatchEvent(new PointerEvent("pointerover", { bubbles: true, pointerType: "mouse" }));
const press = (key, more = {}) =>
  document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, ...more }));
const readout = () => document.getElementById("readout").textContent;
"""


LAYER = "model.layers.1.mlp"
"""Of four experts, after one of twenty."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    layers = {"model.layers.0.mlp": 20, LAYER: 4}
    return read_runs([
        write_run(folder / "fc_moe", layers=layers), write_run(folder / "fedavg", FedAvg(), rounds=2, layers=layers),
    ])  # fmt: skip


@pytest.fixture
def browse(request, tmp_path):
    """Runs the body of a function in the opened page, by default that of ``runs``; what it returned."""
    if BROWSER is None:
        pytest.skip("no Chromium here")

    def result_of(script, *options, page=None):
        probe = (
            f"<script>document.body.dataset.result = JSON.stringify((() => {{{HELPERS}{script}}})());</script></body>"
        )
        text = (page or render(request.getfixturevalue("runs"))).replace("<head>", ERRORS, 1)
        head, _, tail = text.rpartition("</body>")
        (tmp_path / "page.html").write_text(head + probe + tail)
        words = [BROWSER, "--headless", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", *options]
        words += ["--no-sandbox"] if os.geteuid() == 0 else []
        address = (tmp_path / "page.html").as_uri()
        run = subprocess.run([*words, "--dump-dom", address], capture_output=True, text=True, timeout=60, check=True)
        return json.loads(body_of(run.stdout)["data-result"])

    return result_of


def body_of(dom):
    found = {}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "body":
                found.update(attributes)

    Reader().feed(dom)
    return found
