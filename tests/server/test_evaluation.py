"""The evaluation matrix: its summary by hand, and in whole runs over simulated and real sites."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from client.assemble import held_out_sets
from client.embedded import embedded_rows
from client.evaluation.held_out import held_out_loss
from client.evaluation.measured import ExpertUse, Measured, RelativeCost, Score, Scored
from client.messages import EVALUATE, decode_measured, encode_losses, payload_bytes
from client.messages import decode_losses as losses_of
from client.model import adapted_model
from client.private import PrivateStore
from client.text import encode
from conf.compose import load_config
from server.evaluation import put_together, routing, summarised
from server.record import RunFolder, apply_line
from tests.server.conftest import SITES
from tests.server.loopback import Loopback, Node, in_round, run_server

MATRIX = "eval.matrix=true eval.num_answers=1 eval.max_new_tokens=2"


def test_put_together_says_who_was_tested_where_and_what_the_sites_have_of_it():
    """Personal losses on own data 1 and 4: mean 2.5, worst 4 at b, std 1.5, spread 3; on the general set 2 and 5."""

    def loss_on(model, on, loss):
        return Scored(model=model, on=on, score=Score(loss=loss, num_tokens=1, num_examples=1))

    measured = {
        "b": Measured(scores=(loss_on("global", "b", 3.0), loss_on("personal", "b", 4.0), loss_on("personal", "a", 9.0),
                              loss_on("personal", "*general*", 5.0)), cost=RelativeCost(flops=1.5, seconds=2.0)),
        "a": Measured(scores=(loss_on("global", "a", 2.0), loss_on("personal", "a", 1.0), loss_on("personal", "b", 8.0),
                              loss_on("personal", "*general*", 2.0))),
    }  # fmt: skip
    whole = put_together(measured, [loss_on("base", "*general*", 0.5)])
    order = [(row["model"], row["of"], row["on"]) for row in whole["scores"]]
    assert order == [
        ("base", None, "*general*"), ("global", None, "a"), ("global", None, "b"),
        ("personal", "a", "a"), ("personal", "a", "b"), ("personal", "a", "*general*"),
        ("personal", "b", "a"), ("personal", "b", "b"), ("personal", "b", "*general*"),
    ]  # fmt: skip
    expected = {"mean": 2.5, "worst": 4.0, "worst_site": "b", "std": 1.5, "spread": 3.0, "general": {"*general*": 3.5}}
    assert whole["summary"]["personal"] == {"loss": expected}
    assert whole["summary"]["base"] == {"loss": {"general": {"*general*": 0.5}}}
    assert whole["cost"] == {"b": {"flops": 1.5, "seconds": 2.0}}
    assert json.loads(json.dumps(whole)) == whole


def test_worst_accuracy_is_the_lowest():
    rows = [{"model": "global", "of": None, "on": site, "loss": None, "rouge_l": None, "accuracy": value}
            for site, value in (("a", 0.5), ("b", 0.25))]  # fmt: skip
    found = summarised(rows)["global"]
    assert found.keys() == {"accuracy"}
    assert (found["accuracy"]["worst"], found["accuracy"]["worst_site"]) == (0.25, "b")


def test_routing_is_that_of_each_site_and_its_mean():
    """All to one expert is no entropy, equal use is 1."""
    uses = {"b": ExpertUse((0.0, 1.0)), "a": ExpertUse((0.5, 0.5))}
    measured = {site: Measured(scores=(), routing={"mlp": use}) for site, use in uses.items()}
    found = routing(measured | {"dense": Measured(scores=())})["mlp"]
    assert (found["entropy"], found["largest_share"], found["load"]) == (pytest.approx(0.5), 1.0, [0.25, 0.75])
    assert found["sites"]["b"] == {"entropy": 0, "largest_share": 1.0, "load": [0.0, 1.0]}
    assert list(found["sites"]) == ["a", "b"]


def matrix_of(result):
    """(model, of, on) -> loss."""
    return {(row["model"], row["of"], row["on"]): row["loss"] for row in result.folder.evaluation()["scores"]}


def naive_losses(result, adapter):
    """On each site's held-out data."""
    config = load_config(result.grid.overrides)
    adapted = adapted_model(config.model, config.lora, torch.device("cpu"))
    whole = {**adapted.initial_adapter(config.seed), **adapter}
    sets = {site: encode(texts, adapted.tokenizer, config.data) for site, texts in held_out_sets(config).items()}
    return {site: held_out_loss(adapted, whole, sequences, 16).loss for site, sequences in sets.items()}


@pytest.mark.slow
def test_fedavg_has_a_base_and_a_global_model_on_everyones_data(honest, tmp_path):
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps(row) + "\n" for row in embedded_rows(8, seed=9)))
    result = honest(f"{MATRIX} eval.general_path={general}")
    assert result.error is None
    found = matrix_of(result)
    sets = [*SITES, "*general*"]
    assert found.keys() == {(model, None, on) for model in ("base", "global") for on in sets}
    for site, loss in naive_losses(result, {}).items():
        assert found["base", None, site] == pytest.approx(loss, rel=1e-5)
    for site in SITES:
        assert found["global", None, site] == pytest.approx(result.summary["site_loss"][site])
    assert result.summary["evaluation"] == result.folder.evaluation()["summary"]
    assert result.summary["evaluation"]["global"]["loss"]["mean"] == pytest.approx(
        np.mean(list(result.summary["site_loss"].values()))
    )
    routed = result.folder.evaluation()["routing"]["model.layers.0.mlp"]
    assert routed["sites"].keys() == set(SITES)


@pytest.mark.slow
def test_use_of_experts_that_nobody_has_drops_the_reply_and_not_the_run(real_sites):
    def invents(message, honest):
        reply = honest(message)
        sender, losses = losses_of(reply)
        use = {"model.layers.0.mlp": ExpertUse((0.5, 0.5)), "model.layers.7.mlp": ExpertUse((1.0,))}
        return [encode_losses(sender, losses, message, Measured(scores=(), routing=use))]

    result = real_sites("rounds=1", in_round(1, invents, EVALUATE))
    (reason,) = result.rounds()[-1]["dropped"].values()
    assert "which are not the model's" in reason
    assert result.error is None
    assert set(result.folder.evaluation()["routing"]["model.layers.0.mlp"]["sites"]) == {"clinic", "court"}


@pytest.mark.slow
def test_run_with_a_matrix_ends_with_the_same_adapter_and_bytes(honest):
    plain, matrix = honest(), honest(MATRIX)
    for key in ("adapter_sha256", "site_loss", "global_loss", "bytes_up", "bytes_down"):
        assert matrix.summary[key] == plain.summary[key], key
    assert "evaluation" not in plain.summary
    assert plain.folder.evaluation() is None


@pytest.mark.slow
def test_sites_alone_give_a_full_matrix_of_their_own_models(honest):
    result = honest(f"strategy=local_only {MATRIX}")
    found = matrix_of(result)
    assert {of for model, of, _ in found if model == "personal"} == set(SITES)
    assert {on for model, _, on in found if model == "personal"} == set(SITES)
    assert not [key for key in found if key[0] == "global"]
    store = PrivateStore(result.folder.path / "private", "clinic", result.summary["base_model"]["sha256"]).load()
    own = {name.removeprefix("own/"): array for name, array in store.items() if name.startswith("own/")}
    for site, loss in naive_losses(result, own).items():
        assert found["personal", "clinic", site] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "is_personal"),
    [
        ("strategy=centralised", False),
        ("strategy=firm method.rewards=[length,format] method.max_new_tokens=2 method.eval_prompts=1", False),
        ("strategy=pfl_moe", True),
        ("strategy=flex", True),
        ("strategy=fc_moe model.router=local", True),
    ],
)
def test_every_strategy_has_a_matrix(honest, words, is_personal):
    result = honest(f"{words} {MATRIX}", num_sites=1 if "centralised" in words else 4)
    assert result.error is None
    found = matrix_of(result)
    assert {on for model, _, on in found if model == "global"} == set(SITES)
    personal = {(of, on) for model, of, on in found if model == "personal"}
    assert personal == ({(of, on) for of in SITES for on in SITES} if is_personal else set())
    costs = result.folder.evaluation()["cost"]
    assert costs.keys() == (set(SITES) if "pfl_moe" in words or "flex" in words else set())
    assert all(1 < cost["flops"] < 2.1 for cost in costs.values())


@pytest.mark.slow
def test_clair_sends_the_global_adapter_with_each_sites_own(honest):
    result = honest(f"strategy=clair {MATRIX}")
    assert result.error is None
    found = matrix_of(result)
    assert {(of, on) for model, of, on in found if model == "personal"} == {(of, on) for of in SITES for on in SITES}
    for site, loss in naive_losses(result, {}).items():
        assert found["base", None, site] == pytest.approx(loss, rel=1e-5)


@pytest.fixture(scope="module")
def real_sites(small, tmp_path_factory):
    """Runs over three real sites, each with a personal router and data of its own."""

    def finished(words="", fault=None):
        folder = tmp_path_factory.mktemp("real")
        grid = Loopback(
            f"{small} strategy=fc_moe model.router=local partition=files federation=remote federation.superlink=host:1 "
            f"federation.min_sites=2 worker=off {MATRIX} {words}"
        )
        for site in SITES[:3]:
            rows = [row for row in embedded_rows(120, seed=0) if row["domain"] == site][:20]
            (folder / f"{site}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            config = {"site": site, "data": str(folder / f"{site}.jsonl"), "private": str(folder / f"home of {site}")}
            grid.connect(Node(config, fault if site == "bank" else None))
        return run_server(grid, folder / "run")

    return finished


@pytest.mark.slow
def test_over_real_sites_a_personal_model_is_tested_at_home_and_numbers_alone_leave(real_sites):
    result = real_sites()
    assert result.error is None
    found = matrix_of(result)
    assert {key for key in found if key[0] == "personal"} == {("personal", site, site) for site in SITES[:3]}
    assert {key for key in found if key[0] == "global"} == {("global", None, site) for site in SITES[:3]}
    replies = [sent.message() for sent in result.grid.sent if sent.up and sent.kind == EVALUATE]
    told = [measured for measured in map(decode_measured, replies) if measured is not None]
    assert len(told) == 3
    assert {payload_bytes(reply) for reply in replies} == {0}
    copy = RunFolder(result.folder.path.parent / "copy")
    for line in result.lines:
        apply_line(line, copy)
    assert copy.evaluation() == result.folder.evaluation()


def test_general_set_that_is_missing_is_told_before_any_site_is_asked(real_sites):
    result = real_sites("eval.general_path=/nowhere.jsonl")
    assert str(result.error) == "eval.general_path=/nowhere.jsonl: there is no such file"
    assert (result.summary["rounds"], result.grid.sent) == (0, [])


@pytest.mark.slow
def test_real_site_that_speaks_of_others_data_is_dropped(real_sites):
    def boasts(message, honest):
        reply = honest(message)
        sender, losses = losses_of(reply)
        test = Scored(model="personal", on="court", score=Score(loss=0.0, num_tokens=1, num_examples=1))
        return [encode_losses(sender, losses, message, Measured(scores=(test,)))]

    result = real_sites("rounds=1", in_round(1, boasts, EVALUATE))
    assert result.rounds()[-1]["dropped"] == {"bank": "evaluation: scores on the data of others: ['court']"}
    assert {of for model, of, _ in matrix_of(result) if model == "personal"} == {"clinic", "court"}
