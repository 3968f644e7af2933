"""The ClientApp at a real site: what it needs to be told, and what it tells nobody."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from client.answer import node_of
from client.embedded import embedded_rows
from client.failures import is_ours
from client.messages import JOIN, TRAIN, Request, decode_joined, decode_update, encode_request, site_of
from conf.compose import load_config, settings_hash
from conf.schema import Config, Device, FederationConfig, Mode
from tests.client.tiny_models import save_tiny_base
from tests.server.loopback import Loopback, Node

REAL = Config(federation=FederationConfig(mode=Mode.remote))


def test_real_site_reads_its_node_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    node = node_of({"site": "ward", "data": "~/x.csv", "private": "~/p", "device": "cpu"}, REAL)
    assert (node.site, node.data, node.private) == ("ward", str(tmp_path / "x.csv"), tmp_path / "p")
    assert node.device is Device.cpu


def test_real_site_keeps_its_private_state_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("BOUQUET_PRIVATE", str(tmp_path))
    assert node_of({"site": "ward", "data": "x.csv"}, REAL).private == tmp_path
    monkeypatch.delenv("BOUQUET_PRIVATE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(node_of({"site": "ward", "data": "x.csv"}, REAL).private) == "/home/someone/.local/share/bouquet/private"


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({"data": "x.csv"}, r"^the node config needs site=\.\.\.: flower-supernode --node-config 'site=\"NAME\" data="),
        ({"site": "ward"}, r"^the node config needs data=\.\.\.: flower-supernode --node-config"),
        ({"site": "ward", "data": ""}, r"^the node config needs data="),
        (
            {"site": "w", "data": "x", "device": "gpu"},
            r"^node config device must be one of auto, cpu, cuda, got 'gpu'$",
        ),
        (
            {"site": "w", "data": "x", "devcie": "cuda"},
            r"^node config devcie=\.\.\. is unknown: one of site, data, private",
        ),
        ({"site": "w", "data": "x", "worker": "no"}, r"^node config worker must be on or off, got 'no'$"),
    ],
)
def test_missing_or_wrong_node_config_is_refused_with_the_way_to_give_it(node_config, message):
    with pytest.raises(ValueError, match=message):
        node_of(node_config, REAL)


def test_simulated_nodes_are_the_sites_in_the_order_of_their_names():
    config = load_config("data.num_examples=60")
    nodes = [node_of({"partition-id": number, "num-partitions": 4}, config) for number in range(4)]
    assert [node.site for node in nodes] == ["bank", "clinic", "court", "workshop"]
    assert nodes[0].data is nodes[0].private is None
    with pytest.raises(ValueError, match="^3 simulated nodes for 4 sites$"):
        node_of({"partition-id": 0, "num-partitions": 3}, config)


def test_real_site_does_not_take_part_in_a_simulation():
    with pytest.raises(ValueError, match="not a simulated one: the run needs federation=remote"):
        node_of({"site": "ward", "data": "x.csv"}, load_config("data.num_examples=60"))


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    save_tiny_base(base, "olmoe")
    return (
        f"federation=remote partition=files model.source=hub model.name={base} lora.rank=2 device=cpu "
        "train.max_steps=1 train.batch_size=2"
    )


@pytest.fixture
def ask(overrides, tmp_path):
    """Sends one message to a site of its own file; returns the reply."""

    def reply_to(kind, rows, name="ward.jsonl", run="r1", **node_config):
        (tmp_path / name).write_bytes(rows)
        grid = Loopback(overrides)
        node = grid.connect(Node({"site": "ward", "data": str(tmp_path / name), "worker": "off", **node_config}))
        request = Request(run=run, server_round=1, settings_hash=settings_hash(load_config(overrides)))
        (message_id,) = grid.push_messages([encode_request(kind, node, request)])
        (reply,) = grid.pull_messages([message_id])
        return reply

    return reply_to


GOOD = "".join(json.dumps(row) + "\n" for row in embedded_rows(40, seed=0)).encode()


def test_site_says_who_it_is_and_how_much_it_has(ask, overrides):
    """40 rows, of which a fifth is held out."""
    sender, joined = decode_joined(ask(JOIN, GOOD))
    assert (sender.site, joined.num_examples) == ("ward", 32)
    assert sender.settings_hash == settings_hash(load_config(overrides))
    assert sender.base_model_loads >= 1


def test_what_is_wrong_with_the_data_is_told_in_the_sites_own_log(ask, caplog):
    """A path or a value of a column may say more than the server should know."""
    reply = ask(JOIN, GOOD, name="ward.txt", run="r2")
    assert site_of(reply) == "ward"
    with pytest.raises(ValueError, match=r"^the data of site 'ward' cannot be used; the reason is in the site's log$"):
        decode_joined(reply)
    assert "ward.txt must end in one of " in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_sites_own_device_wins_over_the_runs(ask):
    """The run says cpu; here the site asks for what its machine does not have."""
    with pytest.raises(ValueError, match="^device=cuda, but torch sees no CUDA device here"):
        decode_joined(ask(JOIN, GOOD, run="r7", device="cuda"))


def test_adapter_of_another_model_is_refused_by_site(ask, tmp_path):
    reply = ask(TRAIN, GOOD, run="r3", private=str(tmp_path / "private"))
    with pytest.raises(ValueError, match="site 'ward' received arrays other than the shared ones"):
        decode_update(reply)


def test_library_error_is_told_by_kind_alone_and_in_full_in_the_sites_own_log(ask, tmp_path, caplog):
    """A folder where the private file should be: the operating system words that, and could as well quote the data."""
    (tmp_path / "private" / "r4" / "ward.safetensors").mkdir(parents=True)
    with caplog.at_level(logging.ERROR, logger="bouquet.client"):
        reply = ask(TRAIN, GOOD, run="r4", private=str(tmp_path / "private"))
    with pytest.raises(ValueError, match=r"^OSError \(details in the site's log\)$"):
        decode_update(reply)
    assert "site ward failed" in caplog.text
    assert "No such device" in caplog.text


def test_value_error_of_a_library_is_not_taken_for_ours():
    """``json`` quotes no data here, but its ValueErrors are as foreign as those that do."""
    with pytest.raises(ValueError, match="Expecting value") as caught:
        json.loads("secret")
    assert not is_ours(caught.value)
    with pytest.raises(ValueError, match="rounds must be >= 1") as caught:
        load_config("rounds=0")
    assert is_ours(caught.value)


@pytest.mark.parametrize("run", ["../../elsewhere", "a/b", "", "."])
def test_server_cannot_choose_where_private_state_lies(ask, run):
    with pytest.raises(ValueError, match=r"^the run must be named by letters and digits, got "):
        decode_joined(ask(JOIN, GOOD, run=run))


def test_request_under_other_settings_is_refused_with_both_hashes(ask, overrides, tmp_path):
    grid = Loopback(overrides)
    (tmp_path / "ward.jsonl").write_bytes(GOOD)
    node = grid.connect(Node({"site": "ward", "data": str(tmp_path / "ward.jsonl"), "worker": "off"}))
    request = Request(run="r5", server_round=0, settings_hash="0" * 64)
    (message_id,) = grid.push_messages([encode_request(JOIN, node, request)])
    (reply,) = grid.pull_messages([message_id])
    here = settings_hash(load_config(overrides))[:12]
    with pytest.raises(ValueError, match=rf"^settings hash {here} here, 000000000000 at the server$"):
        decode_joined(reply)


def test_settings_that_cannot_be_read_are_told_under_the_nodes_name(overrides):
    grid = Loopback("rounds=none")
    node = grid.connect(Node({"site": "ward", "data": "x.csv"}))
    (message_id,) = grid.push_messages(
        [encode_request(JOIN, node, Request(run="r6", server_round=0, settings_hash=""))]
    )
    (reply,) = grid.pull_messages([message_id])
    assert site_of(reply) == "ward"
    with pytest.raises(ValueError, match="^rounds must be a whole number, got 'none'$"):
        decode_joined(reply)
