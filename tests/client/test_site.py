"""A site's round: what it trains from, what it sends, what it keeps, and that it goes on after a restart."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM

from client.base_model import base_model_loads
from client.evaluation.held_out import held_out_loss
from client.methods import method_for
from client.model import adapted_model
from client.private import PrivateStore
from client.site import POOLED, Site, shared_arrays
from client.text import Example, collate, encode
from client.training import train
from conf.methods import FcMoeConfig, LocalOnlyConfig, PflMoeConfig, RetentionConfig, RetentionKind, SftConfig
from conf.model import LoraConfig, RouterTraining
from conf.schema import Config, OptimizerState, TrainConfig, Truncation
from conf.seeds import generator_for
from strategies.fedavg import FedAvg
from tests.client.local_training import live_tensor_bytes
from tests.client.tiny_models import save_tiny_base

METRICS = {
    "train_loss", "num_tokens", "num_steps", "micro_batch", "train_seconds", "own_loss",
    "tokens_per_second", "peak_memory_bytes", "flop_utilization",
}  # fmt: skip
COLOURS = ["red", "green", "blue", "grey", "pink"]
TRAIN = [Example(f"Name colour {number}.", "", colour) for number, colour in enumerate(COLOURS)]
HELD_OUT = [Example("Name colour 7.", "", "teal"), Example("Name colour 8.", "the sky", "azure")]


@pytest.fixture(scope="module")
def base_config(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")


@pytest.fixture
def config(base_config):
    return settings_for(base_config)


def settings_for(base_config, method=None, router=RouterTraining.frozen, **train_settings):
    return Config(
        model=replace(base_config, router=router),
        method=method or SftConfig(),
        lora=LoraConfig(rank=2),
        train=TrainConfig(**{"batch_size": 2, "max_steps": 4, "learning_rate": 1e-2, **train_settings}),
    )


def make_site(config, folder, name="here", held_out=None, train=TRAIN):
    graft = method_for(config.method).graft
    adapted = adapted_model(config.model, config.lora, torch.device("cpu"), graft)
    store = PrivateStore(folder, name, adapted.base.identity.sha256)
    sets = held_out or {name: HELD_OUT}
    return Site(name, train, sets, adapted=adapted, config=config, store=store)


def first_global(site):
    return shared_arrays(site.adapted.initial_adapter(site.config.seed), site.config)


def noisy(adapter, seed):
    """What the server might send next: the last adapter, moved by the other sites."""
    generator = np.random.default_rng(seed)
    return {name: (a + generator.normal(0, 0.05, a.shape)).astype(np.float32) for name, a in adapter.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def differ(left, right):
    return any(not np.array_equal(left[name], right[name]) for name in left)


def plain_fine_tuning(folder, base_path, tokenizer, config, num_rounds):
    """The textbook loop on stock PEFT, from the adapter saved in ``folder``: what a user would write without us."""
    base = AutoModelForCausalLM.from_pretrained(base_path)
    model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).train()
    sequences = encode(TRAIN, tokenizer, config.data)
    for server_round in range(1, num_rounds + 1):
        generator = generator_for(config.seed, "train", server_round, "here")
        order = [*generator.permutation(5), *generator.permutation(5)]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adamw = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
        # Five examples in batches of two are steps of 2, 2 and 1; the fourth step opens the second epoch.
        for chosen in (order[0:2], order[2:4], order[4:5], order[5:7]):
            batch = collate([sequences[index] for index in chosen], tokenizer.pad_token_id)
            del batch["token_mask"]
            adamw.zero_grad()
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            adamw.step()
    model.save_pretrained(folder / "trained")
    return safetensors.numpy.load_file(folder / "trained" / "adapter_model.safetensors")


@pytest.mark.parametrize("router", [RouterTraining.frozen, RouterTraining.averaged])
def test_one_site_federation_equals_plain_fine_tuning(base_config, tmp_path, router):
    """Two rounds of FedAvg over one site against the textbook loop with a fresh AdamW for each round."""
    config = settings_for(base_config, router=router)
    site = make_site(config, tmp_path / "private")
    adapter = first_global(site)
    site.adapted.save_peft(adapter, tmp_path / "start")
    for server_round in (1, 2):
        adapter = FedAvg().aggregate(adapter, {}, [site.train(server_round, adapter)]).adapter
    site.adapted.save_peft(adapter, tmp_path / "ours")
    ours = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    expected = plain_fine_tuning(tmp_path / "start", base_config.name, site.adapted.tokenizer, config, num_rounds=2)
    assert ours.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(ours[name], expected[name], atol=1e-5, err_msg=name)


def fc_moe(kind=RetentionKind.orthogonal):
    return FcMoeConfig(retention=RetentionConfig(kind=kind))


@pytest.mark.parametrize(
    ("method", "router", "optimizer_state"),
    [
        (fc_moe(RetentionKind.paper), RouterTraining.frozen, OptimizerState.reset),
        (fc_moe(RetentionKind.orthogonal), RouterTraining.local, OptimizerState.keep),
        (LocalOnlyConfig(), RouterTraining.averaged, OptimizerState.keep),
        (PflMoeConfig(), RouterTraining.local, OptimizerState.reset),
    ],
)
def test_a_restarted_site_goes_on_as_if_it_had_never_stopped(base_config, tmp_path, method, router, optimizer_state):
    """Three rounds by one object, and by a new one a round with another site's round on the same model between."""
    config = settings_for(base_config, method, router, optimizer_state=optimizer_state)
    site = make_site(config, tmp_path / "whole")
    received = first_global(site)
    for server_round in (1, 2, 3):
        update = site.train(server_round, received)
        restarted = make_site(config, tmp_path / "restarted").train(server_round, received)
        assert_same(restarted.adapter, update.adapter)
        assert_same(restarted.expert_tokens, update.expert_tokens)
        assert restarted.metrics["train_loss"] == update.metrics["train_loss"]
        make_site(config, tmp_path / "restarted", name="neighbour").train(server_round, received)
        received = noisy(update.adapter, seed=server_round)
    assert_same(make_site(config, tmp_path / "restarted").store.load(), site.store.load())
    assert make_site(config, tmp_path / "restarted").evaluate(received) == site.evaluate(received)


@pytest.mark.parametrize("method", [SftConfig(), fc_moe(), PflMoeConfig(), LocalOnlyConfig()])
def test_nothing_private_is_in_the_update(base_config, tmp_path, method):
    """Router kept local, moments kept, retention on: the update holds the shared arrays by name and no other."""
    config = settings_for(base_config, method, RouterTraining.local, optimizer_state=OptimizerState.keep)
    site = make_site(config, tmp_path)
    received = first_global(site)
    for server_round in (1, 2):
        update = site.train(server_round, received, evaluate_own=True)
        received = noisy(update.adapter, seed=0)
        assert update.adapter.keys() == first_global(site).keys()
        assert not any("gate.weight" in name for name in update.adapter)
        # Whoever shares nothing does not tell how its text was routed either.
        assert update.expert_tokens.keys() == (site.adapted.layers.keys() if update.adapter else set())
        assert update.metrics.keys() == METRICS
    private = site.store.load()
    assert {"own/model.layers.0.mlp.gate.weight", "optimizer/step/model.layers.0.mlp.gate.weight"} <= private.keys()
    assert bool(update.adapter) == (method.name != "local_only")


def test_a_router_kept_local_goes_on_from_the_sites_own(base_config, tmp_path):
    config = settings_for(base_config, router=RouterTraining.local)
    site = make_site(config, tmp_path)
    name, received = "model.layers.0.mlp.gate.weight", first_global(site)
    before = site.adapted.initial_adapter(0)[name]
    assert name not in received
    site.train(1, received)
    after = site.store.load()[f"own/{name}"]
    assert not np.array_equal(after, before)
    evaluated = site.evaluate(received)["here"]
    completed = {**site.adapted.initial_adapter(0), **received, name: after}
    completed |= {other: site.store.load()[f"own/{other}"] for other in completed if other.endswith("gate.weight")}
    sequences = encode(HELD_OUT, site.adapted.tokenizer, config.data)
    assert evaluated == held_out_loss(site.adapted, completed, sequences, config.eval.batch_size)


def test_local_only_trains_its_own_adapter_round_after_round_and_uses_it(base_config, tmp_path):
    """Two rounds with moments kept, each an epoch, equal two calls of ``train`` that hand on adapter and moments."""
    config = settings_for(base_config, LocalOnlyConfig(), optimizer_state=OptimizerState.keep)
    site = make_site(config, tmp_path)
    initial_loss = site.evaluate({})["here"]
    updates = [site.train(server_round, {}, evaluate_own=True) for server_round in (1, 2)]
    assert updates[0].adapter == updates[1].adapter == {}
    adapter, optimizer = site.adapted.initial_adapter(0), {}
    sequences = encode(TRAIN, site.adapted.tokenizer, config.data)
    for server_round in (1, 2):
        generator = generator_for(0, "train", server_round, "here")
        arguments = {"start": adapter, "anchor": {}, "optimizer": optimizer, "config": config.train}
        result = train(site.adapted, sequences, generator=generator, **arguments)
        adapter, optimizer = result.adapter, result.optimizer
    assert_same({name: site.store.load()[f"own/{name}"] for name in adapter}, adapter)
    assert site.evaluate({})["here"].loss == updates[1].metrics["own_loss"] < initial_loss.loss


def test_proximal_anchor_is_what_was_received_also_when_training_starts_elsewhere(base_config, tmp_path):
    """In round 2 FC-MoE starts from re-anchored experts; FedProx still pulls towards the global ones."""
    method = fc_moe(RetentionKind.paper)
    config = settings_for(base_config, method, proximal_mu=5.0)
    site = make_site(config, tmp_path)
    received = noisy(first_global(site), seed=0)
    site.train(1, received)
    private, second = site.store.load(), noisy(received, seed=1)
    start = site.method.start(second, private)
    assert differ(start, second)
    update = site.train(2, second)
    expected = train(
        site.adapted,
        encode(TRAIN, site.adapted.tokenizer, config.data),
        start=start,
        anchor=second,
        optimizer={},
        config=config.train,
        generator=generator_for(0, "train", 2, "here"),
    )
    assert_same(update.adapter, expected.adapter)


def test_remembered_update_is_counted_from_the_received_adapter(base_config, tmp_path):
    """Step 4 of the paper's round: what re-anchoring added is part of the update."""
    site = make_site(settings_for(base_config, fc_moe(RetentionKind.paper)), tmp_path)
    received = noisy(first_global(site), seed=0)
    site.train(1, received)
    received = noisy(received, seed=1)
    trained = site.train(2, received).adapter
    name = "model.layers.0.mlp.experts.down_proj.lora_B"
    np.testing.assert_array_equal(site.store.load()[f"fc_moe/update/{name}"], trained[name] - received[name])


def test_rounds_and_sites_draw_different_orders(config, tmp_path):
    site = make_site(config, tmp_path)
    received = first_global(site)
    first = site.train(1, received).adapter
    assert_same(site.train(1, received).adapter, first)
    assert differ(site.train(2, received).adapter, first)
    assert differ(make_site(config, tmp_path, name="elsewhere").train(1, received).adapter, first)


def test_virtual_clients_of_a_process_share_one_base_and_leave_no_tensor_behind(config, tmp_path):
    """Fifty sites, each a round with its moments kept: after each, the process holds the tensors it held after one."""
    settings = replace(config, train=replace(config.train, max_steps=1, optimizer_state=OptimizerState.keep))
    sites = [make_site(settings, tmp_path, name=f"site-{number:02}") for number in range(50)]
    received, loads = first_global(sites[0]), base_model_loads()
    assert len({id(site.adapted) for site in sites}) == 1
    held = []
    for site in sites:
        site.train(1, received)
        if site in (sites[0], sites[1], sites[-1]):
            held.append(live_tensor_bytes())
    assert held[0] == held[1] == held[-1]
    assert base_model_loads() == loads


def test_plain_fine_tuning_keeps_nothing_at_the_site(config, tmp_path):
    site = make_site(config, tmp_path / "private")
    site.train(1, first_global(site))
    assert not (tmp_path / "private").exists()


def test_every_held_out_set_is_evaluated_and_own_loss_leaves_the_pooled_one_out(config, tmp_path):
    """A centralised site holds a set for each original site: its own loss is their token-weighted mean."""
    sets = {"site-00": HELD_OUT[:1], "site-01": HELD_OUT[1:], POOLED: TRAIN}
    site = make_site(config, tmp_path, name="centralised", held_out=sets)
    update = site.train(1, first_global(site), evaluate_own=True)
    losses = site.evaluate(update.adapter)
    assert list(losses) == ["site-00", "site-01", POOLED]
    assert [losses[name].num_examples for name in losses] == [1, 1, 5]
    own = [losses["site-00"], losses["site-01"]]
    mean = sum(loss.loss * loss.num_tokens for loss in own) / sum(loss.num_tokens for loss in own)
    assert update.metrics["own_loss"] == pytest.approx(mean, rel=1e-5)
    assert update.num_examples == site.num_examples == 5


def test_a_failed_round_leaves_the_store_as_it_was(base_config, tmp_path):
    site = make_site(settings_for(base_config, fc_moe(), optimizer_state=OptimizerState.keep), tmp_path)
    received = first_global(site)
    site.train(1, received)
    before = site.store.load()
    with pytest.raises(ValueError, match="training step 1"):
        site.train(2, {name: np.full_like(array, 1e30) for name, array in received.items()})
    assert_same(site.store.load(), before)


def test_other_arrays_than_the_shared_ones_are_refused_by_name(config, tmp_path):
    site = make_site(config, tmp_path)
    received = first_global(site)
    name, *others = received
    with pytest.raises(ValueError, match=rf"site 'here' received arrays other than the shared ones: \['{name}'\]"):
        site.train(1, {other: received[other] for other in others})
    with pytest.raises(ValueError, match=r"\['foreign'\]"):
        site.evaluate({**received, "foreign": np.ones(1, np.float32)})


def test_what_is_left_out_of_training_has_no_weight(base_config, tmp_path):
    """Two examples are too long to be used: the mean over sites must not count them."""
    long = [Example("Name a very long colour. " * 20, "", colour) for colour in ("red", "blue")]
    config = settings_for(base_config, SftConfig())
    config = replace(config, data=replace(config.data, max_length=400, truncation=Truncation.drop))
    site = make_site(config, tmp_path, train=[*TRAIN, *long])
    assert site.num_examples == len(TRAIN) + 2
    assert site.train(1, first_global(site)).num_examples == len(TRAIN)
