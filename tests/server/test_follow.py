"""Following a run by what a process prints, and believing only the run's own summary."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from rich.console import Console

from server.follow import follow
from server.record import RunFolder
from server.view import View

FLOWER = "INFO :      Successfully started run 4711\n"


def printing(text, folder):
    """A process that prints ``text``, as ``flwr run --stream`` does."""
    (folder / "log").write_text(text)
    code = "import shutil, sys; shutil.copyfileobj(open(sys.argv[1]), sys.stdout)"
    return subprocess.Popen([sys.executable, "-c", code, str(folder / "log")], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def followed(tmp_path):
    def outcome(text, copy=None):
        started = []
        with View(Console(file=io.StringIO()), "run") as view:
            ended = follow(printing(text, tmp_path), view, tmp_path / "deep" / "log.txt", copy, started.append)
        return ended, started, (tmp_path / "deep" / "log.txt").read_text()

    return outcome


def test_run_far_away_is_rebuilt_here_and_its_summary_decides(followed, fc_moe_run, tmp_path):
    copy = RunFolder(tmp_path / "copy")
    outcome, started, log = followed(f"{FLOWER}{fc_moe_run.log}INFO : done\n", copy)
    assert outcome.completed
    assert started == ["4711"] == [outcome.run_id]
    assert outcome.summary == fc_moe_run.summary == copy.summary()
    assert copy.rows() == fc_moe_run.folder.rows()
    assert log == f"{FLOWER}INFO : done\n"


def test_a_log_read_again_is_there_once(followed, fc_moe_run, tmp_path):
    copy = RunFolder(tmp_path / "copy")
    followed(f"INFO : first\n{fc_moe_run.log}INFO : cut", copy)
    assert followed(f"INFO : first\n{fc_moe_run.log}INFO : cut off\n", copy)[2] == "INFO : first\nINFO : cut off\n"


def test_a_log_stays_when_nothing_more_can_be_read(followed, fc_moe_run):
    followed(f"INFO : first\n{fc_moe_run.log}")
    assert followed("Error: could not connect\n")[2] == "INFO : first\nError: could not connect\n"


def test_run_that_writes_its_folder_itself_is_only_watched(followed, fc_moe_run, tmp_path):
    outcome, _, _ = followed(fc_moe_run.log)
    assert outcome.completed
    assert not (tmp_path / "copy").exists()


def test_failed_run_is_told_in_its_own_words(followed, run):
    failed = run("federation.min_sites=5")
    outcome, _, _ = followed(FLOWER + failed.log)
    assert not outcome.completed
    assert outcome.error == str(failed.error)


def test_run_without_a_summary_did_not_complete_and_shows_the_end_of_its_log(followed, fc_moe_run):
    """Exit codes are not asked: Flower's is 0 even if the ServerApp raised."""
    head, _, _ = fc_moe_run.log.rpartition('BOUQUET {"kind": "summary"')
    noise = "".join(f"line {number}\n" for number in range(40))
    outcome, _, _ = followed(f"{FLOWER}{head}{noise}Killed\n")
    assert not outcome.completed
    assert outcome.summary is None
    assert outcome.error.startswith("the run ended without a summary; the end of its log:\nline ")
    assert outcome.error.endswith("line 39\nKilled")
    assert "line 3\n" not in outcome.error


def test_submission_that_flower_refuses_is_no_run(followed):
    outcome, started, _ = followed("Error: could not connect\n")
    assert (outcome.run_id, started, outcome.completed) == (None, [], False)
    assert "could not connect" in outcome.error
