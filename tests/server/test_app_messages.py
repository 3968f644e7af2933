"""What whole runs send, and what they never do: every message between the ServerApp and its ClientApps."""

from __future__ import annotations

import json

import numpy as np

from client.assemble import simulated_site
from client.grafting.grafts import is_graft_array
from client.messages import EVALUATE, JOIN, TRAIN, decode_request, decode_update, payload_bytes
from client.private import under
from conf.compose import load_config
from tests.server.conftest import ROUTER_LOCAL, SITES, measured, model_of


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
