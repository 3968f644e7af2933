"""Whole runs of the ServerApp over real ClientApps in this process: what they leave behind, what they never send."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex

import numpy as np
import pytest
import torch
from flwr.common.config import parse_config_args
from peft import PeftModel
from transformers import AutoModelForCausalLM

import server.app
from client.assemble import pooled_held_out, simulated_site
from client.embedded import embedded_rows
from client.evaluation.held_out import held_out_loss
from client.grafting.grafts import is_graft_array
from client.messages import EVALUATE, JOIN, TRAIN, decode_losses, decode_request, decode_update, payload_bytes
from client.model import adapted_model
from client.private import under
from client.site import POOLED, shared_arrays
from client.text import encode
from conf.compose import load_config, settings_hash
from server.record import adapter_sha256
from tests.client.tiny_models import random_tokens
from tests.server.conftest import SITES
from tests.server.loopback import Loopback, Node, run_server, simulation

ROUTER_LOCAL = "strategy=fc_moe model.router=local train.optimizer_state=keep method.retention.kind=orthogonal"


def plain_federation(config, folder):
    """The same run without Flower: sites and strategy in two loops."""
    sites = [simulated_site(config, name, folder) for name in SITES]
    adapter = shared_arrays(sites[0].adapted.initial_adapter(config.seed), config)
    state = config.strategy.init_state(adapter)
    for server_round in range(1, config.rounds + 1):
        broadcast = config.strategy.broadcast(state)
        updates = [site.train(server_round, adapter, broadcast) for site in sites]
        aggregation = config.strategy.aggregate(adapter, state, updates)
        adapter, state = aggregation.adapter, aggregation.state
    return {**model_of(config).initial_adapter(config.seed), **adapter}


def model_of(config):
    return adapted_model(config.model, config.lora, torch.device("cpu"))


def measured(result):
    """Site -> what it answered to the last evaluation."""
    replies = [sent.message() for sent in result.grid.sent if sent.up and sent.kind == EVALUATE]
    return {sender.site: losses for sender, losses in map(decode_losses, replies)}


WITHOUT_FLOWER = [
    "strategy=fc_moe", "strategy=fedyogi train.optimizer_state=keep", ROUTER_LOCAL,
    "strategy=fedmoe model.router=averaged", "strategy=fedalign_moe rounds=3", "strategy=scaffold rounds=3",
    "strategy=pfl_moe", "strategy=flex", "strategy=fc_moe method=flex model.experts=frozen",
]  # fmt: skip


@pytest.mark.parametrize("words", WITHOUT_FLOWER)
def test_run_without_flower_gives_the_same_adapter(honest, tmp_path, words):
    result = honest(words)
    adapter = plain_federation(load_config(result.grid.overrides), tmp_path / "private")
    assert adapter_sha256(adapter) == result.summary["adapter_sha256"]


@pytest.mark.parametrize("words", ["strategy=fc_moe", ROUTER_LOCAL])
def test_adapter_loads_in_stock_peft_and_computes_the_same(honest, tiny_base, tmp_path, words):
    """With a router trained in full, too: PEFT keeps that in ``modules_to_save``."""
    result = honest(words)
    config = load_config(result.grid.overrides)
    adapted = model_of(config)
    adapted.load_adapter(plain_federation(config, tmp_path / "private"))
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with torch.no_grad():
        before = base(random_tokens()).logits
        theirs = PeftModel.from_pretrained(base, result.folder.path / "adapter").eval()(random_tokens()).logits
        ours = adapted.model.eval()(random_tokens()).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (theirs - before).abs().max() > 1e-3
    peft_config = json.loads((result.folder.path / "adapter" / "adapter_config.json").read_text())
    assert peft_config["base_model_name_or_path"] == result.summary["base_model"]["path"] == str(tiny_base)


def test_summary_holds_what_it_promises(fc_moe_run):
    config, summary = load_config(fc_moe_run.grid.overrides), fc_moe_run.summary
    assert (summary["status"], summary["error"]) == ("completed", None)
    assert (summary["strategy"], summary["rounds"], summary["seed"], summary["num_sites"]) == ("fc_moe", 2, 0, 4)
    assert summary["settings_hash"] == settings_hash(config)
    assert summary["base_model"]["sha256"] == model_of(config).base.identity.sha256
    assert summary["versions"].keys() >= {"flwr", "torch", "transformers", "peft"}
    here = f"{platform.node()}:{os.getpid()}"
    assert summary["base_model_loads"].keys() == {here, f"{here} (server)"}
    assert summary["wall_seconds"] > 0
    assert sorted(summary["site_loss"]) == SITES


def test_run_folder_holds_everything(fc_moe_run):
    folder = fc_moe_run.folder.path
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert present >= {
        "config.yaml", "metrics.jsonl", "summary.json", "diagnostics/rounds.jsonl",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
    }  # fmt: skip
    assert {f"private/{site}.safetensors" for site in SITES} <= present


def test_global_loss_is_the_token_weighted_mean_of_the_sites(fc_moe_run):
    """On all sites' held-out data together: sum_k T_k loss_k / sum_k T_k with T_k response tokens of site k."""
    own = {site: losses[site] for site, losses in measured(fc_moe_run).items()}
    assert {site: loss.loss for site, loss in own.items()} == fc_moe_run.summary["site_loss"]
    tokens = sum(loss.num_tokens for loss in own.values())
    mean = sum(loss.num_tokens * loss.loss for loss in own.values()) / tokens
    assert fc_moe_run.summary["global_loss"] == pytest.approx(mean, rel=1e-6)


def test_bytes_are_those_of_the_arrays_in_the_messages(fc_moe_run):
    """Down: the adapter with each train and evaluate message; up: the adapter and the token counts of each update."""
    summary, grid = fc_moe_run.summary, fc_moe_run.grid
    num_rounds, num_sites, num_layers, num_experts = 2, 4, 1, 4
    adapter_bytes = grid.payload(TRAIN, up=False) // (num_rounds * num_sites)
    assert summary["bytes_down"] == num_rounds * num_sites * 2 * adapter_bytes
    layout = json.dumps([["model.layers.0.mlp", "float64", [num_experts]]])
    counts = 8 + len(layout) + num_layers * num_experts * 8
    assert summary["bytes_up"] == grid.payload(TRAIN, up=True) == num_rounds * num_sites * (adapter_bytes + counts)
    assert grid.payload(EVALUATE, up=True) == grid.payload(JOIN, up=True) == grid.payload(JOIN, up=False) == 0


def test_rows_hold_what_the_run_folder_promises(fc_moe_run):
    start, first, second = fc_moe_run.rounds()
    assert [row["round"] for row in (start, first, second)] == [0, 1, 2]
    assert start["train_loss"] is None
    assert start["global_loss"] > 0
    assert first["aggregation_gap"] >= 0
    promised = {"train_loss", "own_loss", "loss", "num_tokens", "num_steps", "num_examples", "bytes_up", "bytes_down"}
    assert all(promised <= row.keys() for site in SITES for row in fc_moe_run.site_rows(site))
    of_first = [fc_moe_run.site_rows(site)[0] for site in SITES]
    weights = [row["num_examples"] for row in of_first]
    assert first["train_loss"] == pytest.approx(np.average([row["train_loss"] for row in of_first], weights=weights))


def test_diagnostics_tell_who_conflicted_about_what(fc_moe_run):
    first, second = fc_moe_run.folder.diagnostics()
    assert (first["round"], second["round"]) == (1, 2)
    assert first["aggregation_gap"] == fc_moe_run.rounds()[1]["aggregation_gap"]
    assert second["sites"] == SITES
    for layer in second["layers"].values():
        rule = layer["rule"]
        assert np.shape(rule["conflict"]) == np.shape(rule["weight"]) == np.shape(layer["tokens"]) == (4, 4)
        assert len(layer["scale"]) == len(rule["scale"]) == 4


def test_every_strategy_leaves_the_same_diagnostics(fc_moe_run, honest):
    """Both start from the same adapter and data, so the first round's updates are the same."""
    first, under_fedavg = fc_moe_run.folder.diagnostics()[0], honest("strategy=fedavg").folder.diagnostics()[0]
    for name, layer in under_fedavg["layers"].items():
        of_fc_moe = first["layers"][name]
        assert "rule" not in layer
        assert {key: layer[key] for key in ("cosine", "length", "pairs", "kept", "tokens")} == {
            key: of_fc_moe[key] for key in ("cosine", "length", "pairs", "kept", "tokens")
        }


def test_bytes_by_kind_are_those_of_the_adapters_in_the_messages(fc_moe_run):
    """What is left of the bytes up are the token counts, and of those down only what names and shapes take."""
    for row in fc_moe_run.rounds()[1:]:
        kinds = row["bytes_by_kind"]
        assert kinds["up"].keys() == kinds["down"].keys() == {"experts", "attention"}
        assert sum(kinds["down"].values()) == 2 * sum(kinds["up"].values())
        assert 0 < row["bytes_up"] - sum(kinds["up"].values()) < 0.2 * row["bytes_up"]


def test_local_only_sends_no_adapter_in_either_direction(honest):
    result = honest("strategy=local_only")
    assert result.error is None
    assert result.summary["bytes_down"] == result.summary["bytes_up"] == 0
    for sent in result.grid.sent:
        assert not sent.message().content.array_records.get("adapter")
        assert b"lora_" not in sent.content


def test_local_only_has_the_mean_of_the_sites_pooled_losses_as_global_loss(honest):
    result = honest("strategy=local_only")
    assert [row["round"] for row in result.rounds()] == [1, 2]  # there is no global model to measure at the start
    pooled = [losses[POOLED].loss for losses in measured(result).values()]
    assert len(set(pooled)) == 4  # each site has a model of its own
    assert result.summary["global_loss"] == pytest.approx(np.mean(pooled))
    assert result.summary["site_loss"] == {site: losses[site].loss for site, losses in measured(result).items()}


def test_centralised_is_one_site_that_knows_each_sites_loss(honest):
    result = honest("strategy=centralised", num_sites=1)
    assert result.error is None
    assert result.summary["num_sites"] == 1
    assert sorted(result.summary["site_loss"]) == SITES
    assert len(pooled_held_out(load_config(result.grid.overrides))) == 2 * 4
    row, _ = result.site_rows("centralised")
    assert row["num_examples"] == sum(honest("rounds=1").site_rows(site)[0]["num_examples"] for site in SITES)


def test_what_is_private_never_crosses_the_wire(honest):
    """Neither the router's name nor, once trained, its bytes; nor Adam's moments, nor the last expert updates."""
    result = honest(ROUTER_LOCAL)
    config = load_config(result.grid.overrides)
    routers = [name for name in model_of(config).initial_adapter(0) if name.endswith("mlp.gate.weight")]
    assert len(routers) == 1
    private = [simulated_site(config, site, result.folder.path / "private").store.load() for site in SITES]
    for arrays in private:
        assert all(f"own/{router}" in arrays for router in routers)
        assert {name.partition("/")[0] for name in arrays} == {"own", "optimizer", "fc_moe"}
    # What a site received last is kept too, but it was the server's; arrays of zeros are no secret.
    secret = [
        (name, array.tobytes())
        for arrays in private
        for name, array in arrays.items()
        if not name.startswith("fc_moe/received/") and np.count_nonzero(array) > 4
    ]
    assert len(secret) > 4 * len(routers)
    for sent in result.grid.sent:
        assert not [name for name, content in secret if content in sent.content]
        assert b"gate.weight" not in sent.content
        assert b"optimizer/" not in sent.content


def test_no_expert_and_no_graft_crosses_the_wire(honest):
    """In neither direction: only LoRA on attention, and no bytes of a graft."""
    result = honest("strategy=flex train.optimizer_state=keep")
    config = load_config(result.grid.overrides)
    secret = {}
    for site in SITES:
        private = simulated_site(config, site, result.folder.path / "private").store.load()
        of_graft = {name: array for name, array in private.items() if is_graft_array(name)}
        assert any(name.startswith("optimizer/") for name in of_graft)
        secret |= {(site, name): array.tobytes() for name, array in of_graft.items() if np.count_nonzero(array) > 4}
    assert len(secret) >= 2 * 3 * len(SITES)
    num_updates = 0
    for sent in result.grid.sent:
        if sent.kind == TRAIN:
            adapter = decode_update(sent.message())[1].adapter if sent.up else decode_request(sent.message()).adapter
            assert adapter
            assert all(".self_attn." in name for name in adapter)
        num_updates += sent.up and sent.kind == TRAIN
        assert not [name for name, content in secret.items() if content in sent.content]
        assert b".graft." not in sent.content
        assert b".experts." not in sent.content
    assert num_updates == 2 * len(SITES)


def test_scaffold_sends_adapter_c_and_changes_of_c_i_but_no_c_i(honest):
    """Down, c beside the adapter, and only for training; up, how much the site's own c_i changed.

    All changes of a site add up to its c_i, and the first one that is not 0 (of A in the second round, since B = 0
    before) is c_i itself; any later c_i is nowhere on the wire.
    """
    result = honest("strategy=scaffold rounds=3")
    config = load_config(result.grid.overrides)
    shared = model_of(config).initial_adapter(0).keys()
    controls = {f"control/{name}" for name in shared}
    received, replies = [], {site: [] for site in SITES}
    for message, sent in ((sent.message(), sent) for sent in result.grid.sent):
        if sent.up and sent.kind == TRAIN:
            sender, update = decode_update(message)
            replies[sender.site].append(update)
            assert (update.adapter.keys(), update.extras.keys()) == (shared, controls)
            assert update.metrics.keys() == OF_EVERY_METHOD
        elif not sent.up and sent.kind != JOIN:
            _, adapter, broadcast = decode_request(message)
            assert (adapter.keys(), broadcast.keys()) == (shared, controls if sent.kind == TRAIN else set())
            received += [(int(message.metadata.group_id) - 1, broadcast)] if broadcast else []
        else:
            assert payload_bytes(message) == 0
    assert [len(updates) for updates in replies.values()] == [3] * len(SITES)
    weights = [updates[0].num_examples for updates in replies.values()]
    for num_rounds, control in received:
        for name, c in control.items():
            own = [sum((u.extras[name] for u in updates[:num_rounds]), 0 * c) for updates in replies.values()]
            np.testing.assert_allclose(c, np.average(own, axis=0, weights=weights), atol=1e-6)
    secret = {}
    for site, updates in replies.items():
        store = simulated_site(config, site, result.folder.path / "private").store
        before, kept = (under("scaffold/control/", arrays) for arrays in (store.load(before_round=3), store.load()))
        assert kept.keys() == before.keys() == shared
        for name in shared:
            np.testing.assert_array_equal(updates[-1].extras[f"control/{name}"], kept[name] - before[name])
            secret |= {(site, name): kept[name].tobytes()} if is_told_apart(kept[name]) else {}
    assert len(secret) == len(SITES) * len(shared)
    for sent in result.grid.sent:
        assert not [name for name, content in secret.items() if content in sent.content]
        assert b"scaffold/" not in sent.content


def test_firm_sends_adapter_and_rewards_but_no_critic_no_lambda_and_no_moments(honest):
    result = honest(
        "strategy=firm method.estimator=ppo method.send_weights=false method.rewards=[length,format] "
        "method.max_new_tokens=4 method.eval_prompts=1 train.optimizer_state=keep"
    )
    assert result.error is None
    config = load_config(result.grid.overrides)
    secret = {}
    for site in SITES:
        kept = simulated_site(config, site, result.folder.path / "private").store.load()
        assert {name.rpartition("/")[0] for name in kept} >= {"firm", "firm/critic"}
        assert any(name.startswith("optimizer/") for name in kept)
        secret |= {(site, name): array.tobytes() for name, array in kept.items() if is_told_apart(array)}
    assert {name for _, name in secret} >= {"firm/weights", "firm/critic/weight"}
    measured_of_samples = {"reward/length", "reward/format", "kl", "completion_tokens"}
    updates = [decode_update(sent.message())[1] for sent in result.grid.sent if sent.up and sent.kind == TRAIN]
    assert len(updates) == 2 * len(SITES)
    for update in updates:
        assert update.adapter.keys() == model_of(config).initial_adapter(0).keys()
        assert update.extras == {}
        assert update.metrics.keys() - OF_EVERY_METHOD == measured_of_samples
    for site, losses in measured(result).items():
        assert losses[site].metrics.keys() == {f"held_out_{name}" for name in measured_of_samples}
    for sent in result.grid.sent:
        assert not [name for name, content in secret.items() if content in sent.content]
        assert not [word for word in (b"critic/", b"lambda/", b"optimizer/", b"firm/") if word in sent.content]


def is_told_apart(array):
    """Whether its bytes could only be its own: the two weights of objectives are enough, unless they are round."""
    return np.count_nonzero(array) > 4 or (array.dtype == np.float64 and np.any(array % 2.0**-20))


OF_EVERY_METHOD = {
    "train_loss", "own_loss", "num_tokens", "num_steps", "micro_batch", "train_seconds", "tokens_per_second",
    "peak_memory_bytes", "flop_utilization",
}  # fmt: skip


def test_sites_losses_are_personal_and_the_global_one_is_that_of_the_shared_part(honest):
    result = honest("strategy=flex train.optimizer_state=keep")
    config = load_config(result.grid.overrides)
    adapted = model_of(config)
    shared = adapted.read_peft(result.folder.path / "adapter")
    pooled = encode(pooled_held_out(config), adapted.tokenizer, config.data)
    assert result.summary["global_loss"] == pytest.approx(held_out_loss(adapted, shared, pooled, 16).loss)
    for site in SITES:
        own = simulated_site(config, site, result.folder.path / "private")
        assert result.summary["site_loss"][site] == own.evaluate(shared)[site].loss
        alone = simulated_site(config, site, result.folder.path / "nothing")
        assert result.summary["site_loss"][site] != alone.evaluate(shared)[site].loss


@pytest.mark.parametrize(
    ("num_nodes", "words"), [(2, "seed=1"), (5, '"data.filter.domain=[bank, clinic, court, workshop]"')]
)
def test_wrong_number_of_nodes_is_refused_with_the_exact_command(run, monkeypatch, num_nodes, words):
    monkeypatch.setattr(server.app, "NODES_APPEAR_SECONDS", 0.0)
    result = run(words, num_sites=num_nodes)
    assert isinstance(result.error, ValueError)
    message, _, command = str(result.error).partition("; run: ")
    assert message == f"{num_nodes} simulated nodes, but these settings make 4 sites"
    flag, flwr, verb, app, *options = shlex.split(command)
    assert flag == "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"
    assert (flwr, verb, app) == ("flwr", "run", ".")
    assert parse_config_args([options[options.index("--federation-config") + 1]]) == {"num-supernodes": 4}
    again = parse_config_args([options[options.index("--run-config") + 1]])["overrides"]
    assert settings_hash(load_config(again)) == settings_hash(load_config(result.grid.overrides))
    assert result.summary["status"] == "failed"
    assert result.summary["error"] == str(result.error)


def test_more_sites_needed_than_the_data_have_are_refused_before_the_first_round(run):
    result = run("federation.min_sites=5")
    assert str(result.error).startswith("the number of sites, 4, is below federation.min_sites=5")
    assert result.summary["rounds"] == 0
    assert result.grid.sent == []


def test_folder_that_holds_a_run_is_refused_and_left_as_it_is(small, fc_moe_run):
    before = {path: path.read_bytes() for path in fc_moe_run.folder.path.rglob("*") if path.is_file()}
    result = run_server(simulation(small, 4), fc_moe_run.folder.path)
    assert re.search("already holds a run: choose another folder", str(result.error))
    assert {path: path.read_bytes() for path in fc_moe_run.folder.path.rglob("*") if path.is_file()} == before


def test_site_with_other_settings_is_refused_by_name_before_the_first_round(run):
    def change(grid):
        list(grid.nodes.values())[2].overrides = f"{grid.overrides} lora.alpha=3"

    result = run(change=change)
    theirs, ours = settings_hash(load_config(f"{result.grid.overrides} lora.alpha=3")), result.summary["settings_hash"]
    assert re.match(r"3 of 4 needed sites joined .*: court refused: ", str(result.error))
    assert f"settings hash {theirs[:12]} here, {ours[:12]} at the server" in str(result.error)
    assert (result.summary["status"], result.summary["rounds"]) == ("failed", 0)


@pytest.fixture(scope="module")
def site_files(tmp_path_factory):
    """Three sites' files, of 10, 20 and 30 rows."""
    folder = tmp_path_factory.mktemp("sites")
    for number, site in enumerate(SITES[:3], start=1):
        rows = [row for row in embedded_rows(120, seed=0) if row["domain"] == site][: 10 * number]
        (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def remote_run(small, site_files, tmp_path_factory):
    """Three real sites, each with its own file and private folder; the server has held-out data of its own."""
    folder = tmp_path_factory.mktemp("remote")
    grid = Loopback(
        f"{small} strategy=fc_moe partition=files federation=remote federation.superlink=host:1 "
        "federation.min_sites=3 eval.max_examples=null worker=off"
    )
    for site in SITES[:3][::-1]:
        data, private = site_files / f"{site}.jsonl", folder / f"home of {site}"
        grid.connect(Node({"site": site, "data": str(data), "private": str(private)}))
    return run_server(grid, folder / "run")


def test_real_sites_give_the_adapter_of_their_simulation(small, remote_run, site_files, tmp_path):
    assert remote_run.error is None
    words = f"{small} strategy=fc_moe partition=files data.path={site_files} eval.max_examples=null"
    simulated = run_server(simulation(words, 3), tmp_path / "run")
    for key in ("adapter_sha256", "site_loss", "settings_hash", "bytes_up", "bytes_down"):
        assert remote_run.summary[key] == simulated.summary[key], key


def test_without_data_at_the_server_the_global_loss_is_the_example_weighted_mean(remote_run):
    own = [losses[site] for site, losses in measured(remote_run).items()]
    weights = [loss.num_examples for loss in own]
    assert sorted(weights) == [2, 4, 6]
    assert remote_run.summary["global_loss"] == pytest.approx(np.average([loss.loss for loss in own], weights=weights))
    assert remote_run.rounds()[0]["round"] == 1  # nothing could be measured before


def test_real_sites_keep_their_private_state_at_home(remote_run):
    requests = [decode_request(sent.message())[0] for sent in remote_run.grid.sent if not sent.up]
    assert {request.private_root for request in requests} == {""}
    assert not (remote_run.folder.path / "private").exists()
    for site in SITES[:3]:
        home = remote_run.folder.path.parent / f"home of {site}"
        assert [path.name for path in home.rglob("*.safetensors")] == [f"{site}.safetensors"]
        assert not any(str(home).encode() in sent.content for sent in remote_run.grid.sent)


def test_server_with_held_out_data_measures_the_global_loss_itself(small, site_files, remote_run, tmp_path):
    grid = Loopback(f"{remote_run.grid.overrides} eval.path={site_files}/bank.jsonl rounds=1")
    for node in remote_run.grid.nodes.values():
        grid.connect(node)
    result = run_server(grid, tmp_path / "run")
    start, first = result.rounds()
    assert start["global_loss"] > 0
    weights = [losses[site].num_examples for site, losses in measured(result).items()]
    mean = np.average([losses[site].loss for site, losses in measured(result).items()], weights=weights)
    assert first["global_loss"] != pytest.approx(mean)
