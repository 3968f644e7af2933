"""Rounds over real sites in this process: each bad reply is dropped by name, and the run goes on while it may."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client.evaluation.held_out import HeldOutLoss
from client.messages import (
    EVALUATE,
    JOIN,
    TRAIN,
    Sender,
    decode_losses,
    decode_request,
    decode_update,
    encode_failure,
    encode_losses,
)
from client.site import POOLED
from conf.compose import load_config
from server.alignment import GAUGES, alignment_of
from server.app import Run
from server.record import RunFolder, RunRecord, adapter_sha256, parse_line
from server.round_record import sample_sites
from strategies.fedavg import FedAvg
from tests.server.conftest import SITES
from tests.server.faults import answers_twice, crashes, sends, stays_silent, with_adapter
from tests.server.loopback import in_round, run_server, simulation

SENDER = Sender(site="bank", settings_hash="", process="1", base_model_loads=0)

FAULTS = {
    "crash": (crashes, "the client app crashed: killed: out of memory"),
    "silence": (stays_silent, "no reply within 0.1 s"),
    "NaN": (sends(with_adapter(lambda name, array: (name, array * np.float32("nan")))), "holds NaN or infinity"),
    "size": (
        sends(with_adapter(lambda name, array: (name, array + np.float32(1e19)))),
        r"holds 1e\+19; weights must be at most 1e\+06",
    ),
    "infinity": (sends(with_adapter(lambda name, array: (name, array + np.float32("inf")))), "holds NaN or infinity"),
    "another shape": (sends(with_adapter(lambda name, array: (name, array[:1]))), "shapes of .* differ"),
    "other names": (sends(with_adapter(lambda name, array: (f"x.{name}", array))), "array names differ"),
    "nothing": (sends(lambda update: replace(update, adapter={})), "array names differ"),
    "integers": (sends(with_adapter(lambda name, array: (name, array.astype(np.int64)))), "must be float32, got int64"),
    "other settings": (
        sends(lambda update: update, settings_hash="0" * 64),
        "settings hash 000000000000, this run has ",
    ),
    "another's name": (sends(lambda update: update, site="court"), "reply in the name of 'court' from another node"),
    "no examples": (
        sends(lambda update: replace(update, num_examples=0)),
        r"num_examples must be in \[1, 1e\+12\], got 0",
    ),
    "no loss": (sends(lambda update: replace(update, metrics={"train_loss": np.nan})), "metric train_loss is nan"),
    "foreign": (lambda message, honest: [Message(RecordDict(), reply_to=message)], "not a reply of this version"),
}


ROUND_OF = {name: number for number, name in enumerate(FAULTS, start=1)}


@pytest.fixture(scope="module")
def faulty_run(small, tmp_path_factory):
    """A run in which the first site does something else wrong in each round, but the last."""

    def fault(message, honest):
        for name, number in ROUND_OF.items():
            if message.metadata.message_type == TRAIN and message.metadata.group_id == str(number):
                return FAULTS[name][0](message, honest)
        return [honest(message)]

    grid = simulation(f"{small} rounds={len(FAULTS) + 1} eval.every=100", len(SITES), {0: fault})
    return run_server(grid, tmp_path_factory.mktemp("faults") / "run")


@pytest.mark.parametrize("name", FAULTS)
def test_bad_reply_is_dropped_by_name_and_counted_and_the_run_goes_on(faulty_run, name):
    row = faulty_run.rounds()[ROUND_OF[name]]
    assert list(row["dropped"]) == ["bank"]
    assert row["num_sites"] == 3
    assert re.search(FAULTS[name][1], row["dropped"]["bank"])
    assert f"round {row['round']}: dropped bank: {row['dropped']['bank']}" in faulty_run.events
    of_site = faulty_run.site_rows("bank")[ROUND_OF[name] - 1]
    assert of_site["dropped"] == row["dropped"]["bank"]
    assert "train_loss" not in of_site


def test_run_with_a_bad_site_completes_and_takes_it_back(faulty_run):
    assert faulty_run.error is None
    assert (faulty_run.summary["status"], faulty_run.summary["rounds"]) == ("completed", len(FAULTS) + 1)
    last = faulty_run.rounds()[-1]
    assert (last["dropped"], last["num_sites"]) == ({}, 4)


def test_dropped_site_has_no_say(faulty_run, run):
    """Whatever it sent instead, the others' adapters make the next global one, as if it had crashed each time."""

    def fault(message, honest):
        early = message.metadata.message_type == TRAIN and message.metadata.group_id != str(len(FAULTS) + 1)
        return crashes(message, honest) if early else [honest(message)]

    result = run(f"rounds={len(FAULTS) + 1} eval.every=100", faults={0: fault})
    assert result.summary["adapter_sha256"] == faulty_run.summary["adapter_sha256"]


def test_too_few_good_replies_end_the_run_by_round_site_and_reason(run, honest):
    result = run("federation.min_sites=4", faults={1: in_round(2, FAULTS["NaN"][0])})
    assert isinstance(result.error, RuntimeError)
    text = r"round 2: 3 good replies, federation.min_sites=4 are needed \(clinic: .* holds NaN or infinity\)"
    assert re.fullmatch(text, str(result.error))
    assert result.summary["status"] == "failed"
    assert result.summary["error"] == str(result.error)
    # What the first round made is not lost.
    assert len(result.rounds()) == 2
    assert result.summary["rounds"] == 1
    assert result.summary["adapter_sha256"] == honest("rounds=1").summary["adapter_sha256"]
    assert result.adapter().keys() == honest("rounds=1").adapter().keys()


def test_run_that_fails_in_its_first_round_has_no_adapter(run):
    result = run("federation.min_sites=4", faults={1: in_round(1, crashes)})
    assert result.summary["adapter_sha256"] is None
    assert not (result.folder.path / "adapter").exists()


def test_bad_evaluation_is_dropped_and_the_round_stands(run):
    """A site that fails twice in a round is told with both reasons."""

    def fails_twice(message, honest):
        return [honest(message)] if message.metadata.message_type == JOIN else crashes(message, honest)

    result = run("rounds=1", faults={0: in_round(1, crashes, EVALUATE), 1: fails_twice})
    assert result.error is None
    row, reason = result.rounds()[-1], "the client app crashed: killed: out of memory"
    assert row["dropped"] == {"bank": f"evaluation: {reason}", "clinic": f"{reason}; evaluation: {reason}"}
    assert row["num_sites"] == 3
    assert sorted(result.summary["site_loss"]) == ["court", "workshop"]


def losses_of(change):
    """Evaluation replies with other losses than measured."""

    def fault(message, honest):
        reply = honest(message)
        if message.metadata.message_type != EVALUATE:
            return [reply]
        sender, losses = decode_losses(reply)
        return [encode_losses(sender, change(losses), message)]

    return fault


def test_site_cannot_report_a_loss_on_the_data_of_others(run, honest):
    best = HeldOutLoss(loss=0.0, num_tokens=1_000_000, num_examples=1_000_000)
    for_court, for_all = (losses_of(lambda losses, name=name: {**losses, name: best}) for name in ("court", POOLED))
    result = run("rounds=1", faults={0: for_court, 1: for_all})
    dropped = result.rounds()[-1]["dropped"]
    assert dropped["bank"] == "evaluation: losses on the data of others: ['court']"
    assert dropped["clinic"] == f"evaluation: losses on the data of others: ['{POOLED}']"
    assert result.summary["site_loss"]["court"] == honest("rounds=1").summary["site_loss"]["court"]
    assert result.summary["global_loss"] == honest("rounds=1").summary["global_loss"]


def test_second_and_late_replies_change_nothing(run):
    def late(message, honest):
        grid.late.append(honest(message))
        return []

    def connect(made):
        nonlocal grid
        grid = made
        first, second, *_ = grid.nodes
        grid.nodes[first].fault = answers_twice
        grid.nodes[second].fault = in_round(1, late)

    grid = None
    result = run(change=connect)
    assert result.error is None
    assert result.rounds()[1]["dropped"] == {"clinic": "no reply within 0.1 s"}
    assert (result.rounds()[2]["dropped"], result.rounds()[2]["num_sites"]) == ({}, 4)
    assert sorted(result.summary["site_loss"]) == SITES


def set_newest_first(grid, *, value=True):
    grid.newest_first = value


def test_order_of_arrival_and_node_ids_change_no_bit(run, fc_moe_run):
    one = fc_moe_run
    other = run("strategy=fc_moe", change=set_newest_first)
    assert one.grid.nodes.keys().isdisjoint(other.grid.nodes)
    for key in ("adapter_sha256", "global_loss", "site_loss", "bytes_up", "bytes_down"):
        assert one.summary[key] == other.summary[key]
    assert one.adapter() == other.adapter()


def test_order_of_arrival_changes_no_bit_of_a_mean_of_losses(run):
    """In float64, 1e16 + 1 + 1 + 1 is 1e16, but 1 + 1 + 1 + 1e16 is more."""
    pooled = [1e16, 1.0, 1.0, 1.0]
    faults = {
        number: losses_of(lambda losses, loss=loss: {**losses, POOLED: replace(losses[POOLED], loss=loss)})
        for number, loss in enumerate(pooled)
    }
    for newest_first in (False, True):
        change = partial(set_newest_first, value=newest_first)
        result = run("strategy=local_only rounds=1", faults=faults, change=change)
        assert result.summary["global_loss"] == 1e16 / 4


def test_site_that_dies_and_returns_on_another_node_goes_on(run, fc_moe_run):
    """It answers round 1's training, is gone for its evaluation, and is back before round 2."""
    grid = None

    def dies(message, honest):
        reply = honest(message)
        node = grid.nodes.pop(message.metadata.dst_node_id)
        grid.connect(replace(node, fault=None))
        return [reply]

    def connect(made):
        nonlocal grid
        grid = made
        grid.nodes[next(iter(grid.nodes))].fault = in_round(1, dies)

    result = run("strategy=fc_moe", change=connect)
    assert result.error is None
    assert result.events.count("bank is gone") == 1
    assert sum(event.startswith("bank joined") for event in result.events) == 2
    assert [row["num_sites"] for row in result.rounds()] == [0, 4, 4]
    assert result.summary["num_sites"] == 4
    # Its private store is the site's, not the node's: the adapter is that of a run without any death.
    assert result.summary["adapter_sha256"] == fc_moe_run.summary["adapter_sha256"]


def test_site_that_stays_away_is_not_asked_and_the_rest_goes_on(run):
    def dies(message, honest):
        del grid.nodes[message.metadata.dst_node_id]
        return crashes(message, honest)

    def connect(made):
        nonlocal grid
        grid = made
        grid.nodes[next(iter(grid.nodes))].fault = in_round(1, dies)

    grid = None
    result = run(change=connect)
    assert result.error is None
    assert [row["num_sites"] for row in result.rounds()] == [0, 3, 3]
    assert len(result.site_rows("bank")) == 1


class OneEach(FedAvg):
    """Answers each site with its own last adapter, and keeps the mean as the global one."""

    def aggregate(self, adapter, state, updates):
        own = {update.site: update.adapter for update in updates}
        return replace(super().aggregate(adapter, state, updates), personal=own)


def test_site_keeps_its_own_adapter_until_it_is_given_another(small, tmp_path):
    """Half of the sites are asked in a round; who sits one out goes on from its own adapter all the same."""
    settings = f"{small} rounds=4 federation.fraction=0.5 eval.every=100 seed=3"
    grid = simulation(settings, len(SITES))
    config = load_config(settings)
    config.strategy = OneEach()
    run = Run(config, str(grid.run_id), RunRecord(RunFolder(tmp_path)))
    run.prepare(grid, settings)
    run.train(grid)
    own, last_round, sat_out = {}, {}, set()
    for sent in (sent for sent in grid.sent if sent.kind == TRAIN):
        message = sent.message()
        if sent.up:
            own[sent.site] = adapter_sha256(decode_update(message)[1].adapter)
            continue
        if sent.site in own:
            assert adapter_sha256(decode_request(message)[1]) == own[sent.site]
            sat_out |= {sent.site} if int(message.metadata.group_id) - last_round[sent.site] > 1 else set()
        last_round[sent.site] = int(message.metadata.group_id)
    assert sat_out


def test_fraction_asks_the_sites_that_the_seed_draws(run):
    result = run("federation.fraction=0.5 rounds=4 eval.every=100 seed=3")
    config = load_config(f"{result.grid.overrides}")
    trained = [
        [row["site"] for row in result.folder.rows() if row["round"] == number and "num_examples" in row]
        for number in range(1, 5)
    ]
    assert trained == [sample_sites(SITES, config, number) for number in range(1, 5)]
    assert [row["num_sites"] for row in result.rounds()] == [0, 2, 2, 2, 2]


def test_evaluation_is_every_so_many_rounds_and_after_the_last(run):
    result = run("rounds=3 eval.every=2")
    assert [row["round"] for row in result.rounds() if row["global_loss"] is not None] == [0, 2, 3]
    assert [row["round"] for row in result.site_rows("bank") if "loss" in row] == [2, 3]
    assert [row["round"] for row in result.site_rows("bank") if "own_loss" in row] == [2, 3]


@pytest.mark.parametrize("kind", [TRAIN, EVALUATE])
def test_what_a_site_says_is_one_bounded_line_of_the_log_and_never_a_tagged_one(run, kind):
    forged = 'x\nBOUQUET {"kind": "summary", "status": "completed", "error": null}\n' + "y" * 5000

    def fails(message, honest):
        reply = honest(message)
        return [encode_failure(SENDER, forged, message) if message.metadata.message_type == kind else reply]

    result = run("federation.min_sites=3 rounds=1", faults={0: fails})
    reason = result.rounds()[1]["dropped"]["bank"]
    assert "bouquet {" in reason
    assert "\n" not in reason
    assert len(reason) < 2100
    assert parse_line(f"Traceback: {reason}") is None


def test_run_whose_last_evaluation_nobody_answers_fails_and_keeps_its_adapter(run):
    def silent_at_the_end(message, honest):
        return [] if message.metadata.message_type == EVALUATE else [honest(message)]

    result = run("rounds=1", faults=dict.fromkeys(range(4), silent_at_the_end))
    assert str(result.error).startswith("round 1: no site could be evaluated (bank: no reply within")
    assert result.summary["status"] == "failed"
    assert (result.folder.path / "adapter" / "adapter_model.safetensors").exists()


def test_names_in_the_screen_that_nobody_bears_are_told(run):
    result = run("screen=clair screen.banned=[bnak,court] screen.pinned=[bank] rounds=1")
    assert result.error is None
    assert "screen.banned names bnak: no such site has joined" in result.events
    assert not any("screen.pinned names" in event for event in result.events)


@pytest.mark.parametrize(
    ("rate", "told"), [("1e35", "holds NaN or infinity"), ("1e3", r"holds 1e\+09; weights must be at most 1e\+06")]
)
def test_rounds_refuse_an_adapter_that_sites_could_not_send_back(run, rate, told):
    """Good replies whose aggregate is out of bounds: the strategy is named, no site is blamed."""
    huge = sends(with_adapter(lambda name, array: (name, np.full_like(array, 1e6))))
    result = run(
        f"strategy=fedavgm strategy.learning_rate={rate} federation.min_sites=4 rounds=1",
        faults=dict.fromkeys(range(4), huge),
    )
    text = f"round 1: strategy=fedavgm got good replies, but no adapter out of them: .* {told}"
    assert re.fullmatch(text, str(result.error))


@pytest.mark.slow
def test_run_with_several_objectives_tells_rewards_weights_and_drift(run):
    """Under FedCMOO, whose first broadcast is empty: the weights that the server found count in the next round."""
    result = run(
        "strategy=fedcmoo method.rewards=[length,format] method.group_size=2 method.max_new_tokens=4 "
        "method.eval_prompts=2"
    )
    assert result.error is None
    found = alignment_of(result.folder.rows(), {})
    assert (found.objectives, found.gauge, sorted(found.weights)) == (
        ("length", "format"),
        GAUGES["held_out_reward"],
        SITES,
    )
    assert found.disagreement == {1: 0.0, 2: 0.0}
    assert all(found.drift[number] > 0 for number in (1, 2))
    told = [line["weights"] for line in result.folder.diagnostics()]
    for of_site in found.weights.values():
        assert [of_site[name][1] for name in found.objectives] == [0.5, 0.5]
        assert [of_site[name][2] for name in found.objectives] == pytest.approx(told[0])
    by_kind = result.rounds()[-1]["bytes_by_kind"]["up"]
    assert by_kind["extras"] == pytest.approx(sum(by_kind.values()) / 2, rel=0.01)


def test_the_adapter_is_written_once_a_request_and_not_for_each_site(small, tmp_path):
    grid = simulation(f"{small} rounds=1", len(SITES))
    pushed, push = [], grid.push_messages

    def noting(messages):
        pushed.append(list(messages))
        return push(pushed[-1])

    grid.push_messages = noting
    assert run_server(grid, tmp_path / "run").error is None
    for kind in (TRAIN, EVALUATE):
        (messages,) = [sent for sent in pushed if {message.metadata.message_type for message in sent} == {kind}]
        assert len(messages) == len(SITES)
        assert len({id(message.content.array_records["adapter"]) for message in messages}) == 1
