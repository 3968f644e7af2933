"""The runs that settings ask for: their folders, names and what they are told."""

from __future__ import annotations

import json

import pytest

import server.jobs
from conf.compose import load_config
from server.jobs import plan
from server.record import RunFolder


def test_single_run_gets_a_folder_and_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sites").mkdir()
    for name in ("a", "b"):
        rows = [{"instruction": f"{name} {index}", "context": "", "response": "yes"} for index in range(4)]
        (tmp_path / "sites" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    jobs, folder = plan(["partition=files", "data.path=sites", "output=here"], multirun=False)
    assert folder == tmp_path / "here"
    assert jobs[0].num_sites == 2
    assert jobs[0].overrides == (
        "partition=files", "data.path=sites", f"data.path='{tmp_path}/sites'", f"output='{tmp_path}/here'",
    )  # fmt: skip


def test_folders_of_reward_models_become_absolute_and_hub_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "heads" / "kind").mkdir(parents=True)
    jobs, _ = plan(["strategy=firm", "method.rewards=[kind:heads/kind,safe:org/safe,length]"], multirun=False)
    expected = [f"kind:{tmp_path}/heads/kind", "safe:org/safe", "length"]
    assert load_config(jobs[0].overrides).method.rewards == expected


def test_sweep_makes_one_folder_a_run_named_after_what_is_swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs, folder = plan(["strategy=fedavg,fc_moe", "seed=0,1", "output=both"], multirun=True)
    assert folder == tmp_path / "both"
    assert [job.output.name for job in jobs] == ["fedavg,seed=0", "fedavg,seed=1", "fc_moe,seed=0", "fc_moe,seed=1"]
    assert [job.config.seed for job in jobs] == [0, 1, 0, 1]


def test_sweep_with_one_wrong_value_starts_nothing():
    with pytest.raises(ValueError, match=r"rounds must be >= 1, got 0"):
        plan(["rounds=1,0"], multirun=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["federation=remote", "federation.superlink=a:1,b:2"],
            r"^federation\.superlink is a:1 and b:2 in one sweep, whose runs share a SuperLink$",
        ),
        (["federation=simulation,remote"], r"^federation\.mode is remote and simulation in one sweep"),
        (["seed=0,0"], r"two would be called seed=0: name no value twice$"),
        (["output=a,b"], r"^output=a,b: a sweep has one output"),
    ],
)
def test_runs_of_a_sweep_have_one_superlink_one_output_and_a_folder_each(words, message):
    with pytest.raises(ValueError, match=message):
        plan(words, multirun=True)


def test_folder_of_a_long_value_can_be_made_and_is_no_other_runs(tmp_path):
    long = ",".join(["'" + "é" * 99 + "'"] * 2)
    jobs, _ = plan([f"eval.options=[{long},a],[{long},b]", f"output={tmp_path}"], multirun=True)
    for job in jobs:
        job.output.mkdir()
    assert all(job.output.name.startswith("eval.options=['ééé") for job in jobs)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.quantization=int8"], r"quantization=int8 needs the package torchao: pip install 'bouquet-fl\[int8\]'"),
        (
            ["strategy=firm", "method.rewards=[length,sentiment]"],
            r"method\.rewards=\[sentiment\] needs the package vader",
        ),
    ],
)
def test_library_that_only_some_settings_need_is_missed_before_anything_starts(monkeypatch, words, message):
    monkeypatch.setattr(server.jobs, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        plan(words, multirun=False)


def test_too_few_sites_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match=r"the number of sites, 4, is below federation.min_sites=5"):
        plan(["federation.min_sites=5"], multirun=False)


def test_folder_of_an_earlier_run_is_never_overwritten(tmp_path):
    RunFolder(tmp_path).write_text("config.yaml", "")
    with pytest.raises(ValueError, match=r"already holds a run"):
        plan([f"output={tmp_path}"], multirun=False)


def test_output_with_spaces_and_quotes_survives_the_way_to_the_run(tmp_path):
    output = tmp_path / "it's a run"
    escaped = str(output).replace("'", "\\'")
    jobs, _ = plan([f"output='{escaped}'"], multirun=False)
    assert load_config(jobs[0].overrides).output == str(output)


def test_paths_of_a_remote_run_are_left_to_the_server(tmp_path):
    jobs, _ = plan([f"output={tmp_path}/x", "federation=remote", "eval.path=held_out.jsonl"], multirun=False)
    assert jobs[0].overrides == ("federation=remote", "eval.path=held_out.jsonl")
