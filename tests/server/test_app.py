"""Whole runs of the ServerApp over real ClientApps in this process: what they leave behind, what is refused."""

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
from client.base_model import process_name
from client.evaluation.held_out import held_out_loss
from client.site import POOLED, shared_arrays
from client.text import encode
from conf.compose import load_config, settings_hash
from server.record import adapter_sha256
from tests.client.tiny_models import random_tokens
from tests.server.conftest import ROUTER_LOCAL, SITES, measured, model_of
from tests.server.loopback import run_server, simulation


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
    here = process_name(os.getpid())
    assert platform.node() not in here
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
