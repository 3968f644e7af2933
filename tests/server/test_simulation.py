"""Whole runs in Flower's simulation, started and stopped as a user does."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from server.flower import local_superlink
from tests.server.commands import BIN, SMALL, bouquet, leftovers, rows, run_folder, summary

pytestmark = [pytest.mark.simulation, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The command of ``make run``, shorter, with the matrix, and SCAFFOLD, which sends arrays beside the adapter."""
    folder = tmp_path_factory.mktemp("sweep")
    words = (*SMALL, "eval.matrix=true", "eval.num_answers=1", "eval.max_new_tokens=4")
    return bouquet("run", "-m", "strategy=fc_moe,fedavg,local_only,scaffold", *words, cwd=folder, timeout=900)


def test_sweep_ends_with_a_table_and_the_comparison_folder(sweep):
    assert sweep.returncode == 0, sweep.stdout + sweep.stderr
    folder = run_folder(sweep.stdout)
    assert sorted(path.name for path in folder.iterdir()) == ["fc_moe", "fedavg", "local_only", "scaffold"]
    table = sweep.stdout[sweep.stdout.index("held-out loss") :]
    for name in ("fc_moe", "fedavg", "local_only", "scaffold"):
        assert f"{summary(folder / name)['global_loss']:.4f}" in table


def test_run_folder_holds_everything(sweep):
    folder = run_folder(sweep.stdout) / "fc_moe"
    result = summary(folder)
    assert result["status"] == "completed"
    assert result["rounds"] == 2
    assert result["bytes_up"] == sum(row["bytes_up"] for row in rows(folder, "site")) > 0
    assert all(loads == 1 for loads in result["base_model_loads"].values())
    assert len(rows(folder, "site")) == 2 * 4
    assert [row["round"] for row in rows(folder, "round")] == [0, 1, 2]
    lines = [json.loads(line) for line in (folder / "diagnostics/rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2]
    assert all("rule" in layer for layer in lines[1]["layers"].values())
    assert "strategy:" in (folder / "config.yaml").read_text()


def test_every_run_has_its_evaluation_matrix_and_a_line_in_the_tables(sweep):
    folder = run_folder(sweep.stdout)
    tables = sweep.stdout[sweep.stdout.index("each model on every site's own held-out data") :]
    for name, model in (("fc_moe", "global"), ("local_only", "personal")):
        evaluation = json.loads((folder / name / "evaluation.json").read_text())
        tested = {(score["of"], score["on"]) for score in evaluation["scores"] if score["model"] == model}
        assert len(tested) == (4 if model == "global" else 16)
        mean = evaluation["summary"][model]["loss"]["mean"]
        losses = summary(folder / name)["site_loss"].values()
        assert mean == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert f"{mean:.4f}" in tables


def test_local_only_sends_nothing(sweep):
    result = summary(run_folder(sweep.stdout) / "local_only")
    assert result["bytes_up"] == result["bytes_down"] == 0
    assert result["global_loss"] is not None


def test_control_variates_travel_beside_the_adapter(sweep):
    """Twice the bytes up; down, only training takes them along, and evaluation gets the adapter alone."""
    plain, corrected = (summary(run_folder(sweep.stdout) / name) for name in ("fedavg", "scaffold"))
    assert corrected["status"] == "completed"
    assert corrected["bytes_up"] / plain["bytes_up"] == pytest.approx(2, rel=0.02)
    assert corrected["bytes_down"] / plain["bytes_down"] == pytest.approx(1.5, rel=0.02)
    start, *_, last = rows(run_folder(sweep.stdout) / "scaffold", "round")
    assert last["global_loss"] < start["global_loss"]


def test_adapter_loads_in_stock_peft(sweep):
    folder = run_folder(sweep.stdout) / "fedavg"
    path = summary(folder)["base_model"]["path"]
    base = AutoModelForCausalLM.from_pretrained(path)
    tokens = torch.arange(10).unsqueeze(0)
    before = base(tokens).logits
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    assert not torch.equal(before, adapted(tokens).logits)


def test_nothing_is_left_running(sweep):
    assert leftovers() == []


def test_failing_run_says_why_and_exits_1(tmp_path):
    failed = bouquet("run", *SMALL, "train.learning_rate=1e30", "train.max_grad_norm=1e30", "output=bad", cwd=tmp_path)
    assert failed.returncode == 1
    assert "round 1" in failed.stderr
    assert "bank" in failed.stderr
    assert summary(tmp_path / "bad")["status"] == "failed"


def heed_interrupts():
    """What a shell started in the background ignores, its children do too."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 20), (signal.SIGHUP, 1)], ids=["Ctrl-C", "hang-up"])
def test_interrupted_run_leaves_nothing_behind_however_often_it_is_interrupted(tmp_path, number, times):
    scratch = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    process = subprocess.Popen(
        [str(BIN / "bouquet"), "run", "rounds=500", "output=long"], env=os.environ | {"TMPDIR": str(scratch)},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heed_interrupts,  # noqa: PLW1509
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (tmp_path / "long" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130, output
    assert "interrupted" in output
    assert leftovers() == []
    assert list(scratch.glob("bouquet-*")) == []
    shutil.rmtree(scratch)


def test_flwr_run_needs_as_many_nodes_as_sites_and_then_works(tmp_path):
    overrides = shlex.join(["strategy=fc_moe", "partition=dirichlet", "partition.alpha=0.5", *SMALL])

    def flwr_run(connection, num_nodes, output):
        return subprocess.run(
            [
                *connection.command("run"), os.fspath(BIN.parents[1]), "bouquet", "--stream",
                "--run-config", f'overrides="{overrides} output={tmp_path / output}"',
                "--federation-config", f"num-supernodes={num_nodes}",
            ],
            env=dict(connection.environment), capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip

    with local_superlink(1) as connection:
        wrong = flwr_run(connection, 2, "wrong")
        assert "2 simulated nodes, but these settings make 4 sites" in wrong.stdout
        assert "--federation-config 'num-supernodes=4'" in wrong.stdout
        assert summary(tmp_path / "wrong")["status"] == "failed"
        right = flwr_run(connection, 4, "right")
        assert summary(tmp_path / "right")["status"] == "completed", right.stdout
