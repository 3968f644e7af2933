"""``bouquet doctor``: a healthy federation passes, and every way to be ill is named with what to change."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from client.assemble import site_model
from client.data import simulated_sites
from client.embedded import embedded_rows
from client.text import encode_prompts
from conf.compose import load_config
from server import checks
from server.certificates import make_certificates
from server.checks import Caution
from server.doctor import Place, _checks, examine
from server.launch import cli
from tests.client.tiny_models import save_tiny_base
from tests.server.commands import write_site_files

DAY = 86400.0


@pytest.fixture
def settings(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small.split()


def findings(words, place=None):
    return {finding.check: finding for finding in examine(words, place or Place())}


def test_healthy_simulation_passes_every_check(settings):
    found = findings(settings)
    assert list(found) == [
        "settings", "versions", "telemetry", "working directory", "base model", "disk", "evaluation sets", "data",
        "memory",
    ]  # fmt: skip
    assert not [finding for finding in found.values() if finding.state == "failed"]
    assert "4 sites, 12 to 12 training examples; label skew 0.75" in found["data"].text
    assert "routed experts in 1 layers" in found["base model"].text


def test_json_and_exit_code_say_the_same(settings):
    fine = CliRunner().invoke(cli, ["doctor", "--json", *settings])
    assert fine.exit_code == 0, fine.output
    assert json.loads(fine.stdout)["ok"] is True
    ill = CliRunner().invoke(cli, ["doctor", "--json", *settings, "federation.min_sites=5"])
    assert ill.exit_code == 1
    told = json.loads(ill.stdout)
    assert told["ok"] is False
    failed = [finding for finding in told["findings"] if finding["state"] == "failed"]
    assert [finding["check"] for finding in failed] == ["data"]
    assert "set federation.min_sites=4 or more sites" in failed[0]["text"]


@pytest.mark.parametrize(
    ("word", "check", "text"),
    [
        ("rounds=0", "settings", "rounds must be >= 1"),
        ("output=/proc/run", "disk", "output /proc/run: 0.0 GiB free"),
        ("model.name=/nowhere", "base model", "model.name=/nowhere is neither a folder here nor a hub model"),
        ("data.path=missing.jsonl", "settings", "needs partition.column"),
        ("device=cuda", "base model", "torch sees no CUDA device here: set device=cpu"),
    ],
)
def test_failure_names_the_setting_to_change(settings, word, check, text):
    import torch

    if word == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    finding = findings([*settings, word])[check]
    assert finding.state == "failed"
    assert text in finding.text


def test_a_damaged_base_model_is_named(settings, tmp_path):
    model = save_tiny_base(tmp_path / "half", "olmoe")
    (tmp_path / "half" / "model.safetensors").write_bytes(b"half")
    found = findings([*settings, f"model.name={model.name}"])["base model"]
    assert (found.state, found.text.startswith(f"{model.name} cannot be read: SafetensorError")) == ("failed", True)


def test_a_file_that_a_check_cannot_open_fails_the_check(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "partition", lambda _: (tmp_path / "no file").read_text())
    found = findings(settings)["data"]
    assert (found.state, found.text) == ("failed", f"[Errno 2] No such file or directory: '{tmp_path}/no file'")


def test_sets_of_the_server_are_read_where_they_lie(settings, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps(row) + "\n" for row in embedded_rows(8, seed=9)))
    words = [*settings, "eval.matrix=true", f"eval.path={general}", f"eval.general_path={general}"]
    assert findings(words)["evaluation sets"].text == "eval.path 8, *general* 2"
    words[-1] = "eval.general_path=/nowhere.jsonl"
    finding = findings(words)["evaluation sets"]
    assert (finding.state, finding.text) == ("failed", "eval.general_path=/nowhere.jsonl: there is no such file")
    elsewhere = [*words, "federation=remote", "federation.superlink=host:1"]
    for place, is_here in ((Place(), False), (Place(certificates=tmp_path), True)):
        checks_there = [check for check, _ in _checks(load_config(elsewhere), elsewhere, place)]
        assert ("evaluation sets" in checks_there) == is_here


def test_run_that_trains_no_expert_is_pointed_out(settings, tmp_path):
    save_tiny_base(tmp_path / "dense", "llama")
    dense = findings([*settings, f"model.name={tmp_path / 'dense'}"])["base model"]
    assert (dense.state, "set model.upcycle.num_experts" in dense.text) == ("warning", True)
    frozen = findings([*settings, "model.experts=frozen"])["base model"]
    assert (frozen.state, "set model.experts=lora" in frozen.text) == ("warning", True)


def test_rewards_are_tried_and_memory_is_that_of_completions(settings, tmp_path):
    words = [*settings, "strategy=firm", "method.max_new_tokens=40", "data.max_length=400"]
    found = findings(words)
    assert found["rewards"].text == "brevity 0.94 to 0.97, format 0.33 to 1"
    prompts = encode_prompts(
        [example for site in simulated_sites(load_config(words)).values() for example in site.train],
        site_model(load_config(words)).tokenizer, load_config(words).data,
    )  # fmt: skip
    assert f" x {max(map(len, prompts)) + 40} tokens" in found["memory"].text
    words = [*words, f"method.rewards=[kind:{tmp_path},format]"]
    finding = findings(words)["rewards"]
    assert (finding.state, f"{tmp_path}" in finding.text) == ("failed", True)
    data = write_site_files(tmp_path / "data", 60)["bank"]
    own = findings(words, Place(name="bank", data=data, home=tmp_path))["rewards"]
    assert (own.state, "unless this site's node config names its own" in own.text) == ("warning", True)


def test_shadowing_folder_is_named(settings, tmp_path):
    (tmp_path / "server").mkdir()
    assert "holds a folder 'server'" in findings(settings)["working directory"].text


def test_training_that_does_not_fit_is_refused_with_numbers(settings, monkeypatch):
    enough = findings(settings)["memory"]
    assert enough.state == "ok"
    assert "training needs" in enough.text
    monkeypatch.setattr(checks, "free_bytes", lambda device: 1 << 20)
    found = findings(settings)["memory"]
    assert found.state == "failed"
    assert re.search(r"0\.[1-5] MiB are free on cpu: set train\.", found.text)


def test_label_skew_by_hand():
    """Sites {a: 3, b: 1} and {a: 1, b: 3}; together a and b are even: each site is a quarter away."""
    assert "0.25 on average, 0.25 at most" in checks.label_skew({"x": {"a": 3, "b": 1}, "y": {"a": 1, "b": 3}})
    assert "0.50 on average, 0.50 at most" in checks.label_skew({"x": {"a": 1}, "y": {"b": 1}})
    assert "0.00 on average, 0.00 at most" in checks.label_skew({"x": {"a": 2, "b": 2}, "y": {"a": 1, "b": 1}})
    assert checks.label_skew({"x": {"a": 3}}) == ""


def test_site_is_examined_with_its_own_data_and_key(settings, tmp_path):
    files = write_site_files(tmp_path / "data", 60)
    make_certificates(tmp_path / "c", ["127.0.0.1"], ["bank"], valid_seconds=DAY)
    own = tmp_path / "c" / "sites" / "bank"
    place = Place(
        name="bank", data=files["bank"], superlink="127.0.0.1:9", root_certificates=own / "ca.crt",
        key=own / "site.key", home=tmp_path,
    )  # fmt: skip
    found = findings(settings, place)
    assert "12 training and 3 held-out examples" in found["data"].text
    assert "is SHA256:" in found["key"].text
    assert (found["superlink"].state, "nothing answers at 127.0.0.1:9" in found["superlink"].text) == ("failed", True)
    (own / "site.key").chmod(0o640)
    assert "chmod 600" in findings(settings, place)["key"].text
    files["bank"].write_text('{"question": "?"}\n')
    assert "'instruction' is not a column" in findings(settings, place)["data"].text


def test_server_is_examined_with_its_certificates(settings, tmp_path):
    make_certificates(tmp_path / "c", ["127.0.0.1"], [], valid_seconds=90 * DAY)
    with pytest.raises(Caution, match="holds no public key, so no site may join"):
        checks.server_certificates(tmp_path / "c" / "server")
    make_certificates(tmp_path / "c", [], ["bank"], valid_seconds=90 * DAY)
    place = Place(certificates=tmp_path / "c" / "server")
    assert "bank may join" in findings(settings, place)["certificates"].text
    make_certificates(tmp_path / "c", [], [], valid_seconds=5 * DAY)
    assert findings(settings, place)["certificates"].state == "warning"
    make_certificates(tmp_path / "c", [], [], valid_seconds=-1)
    assert "server.crt expired on" in findings(settings, place)["certificates"].text


def test_name_without_data_is_refused():
    refused = CliRunner().invoke(cli, ["doctor", "--name", "bank"])
    assert "needs both --name and --data" in str(refused.exception)
