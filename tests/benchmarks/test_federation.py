"""Runs without Flower."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.federation import Federation, simulated
from conf.compose import load_config
from server.record import adapter_sha256
from strategies.adapters import weighted_mean
from tests.client.tiny_models import save_tiny_base
from tests.server.commands import SMALL, bouquet, run_folder, summary

HEADER_BYTES = 8192
"""Most that a message holds beside arrays."""


def settings(folder, *words):
    base = save_tiny_base(folder / "base", "olmoe")
    return [
        *SMALL, "data.num_examples=40", "train.batch_size=2", "train.max_steps=1", "lora.rank=2",
        f"model.name={base.name}", "model.source=hub", "data.template=plain", *words,
    ]  # fmt: skip


def test_a_round_of_fedavg_is_the_mean_of_what_the_sites_trained(tmp_path):
    federation = simulated(load_config(settings(tmp_path, "strategy=fedavg")), tmp_path / "private")
    before = federation.adapter
    sites = {name: site.train(1, before) for name, site in federation.sites.items()}
    seen = []
    federation.watch = lambda *of_round: seen.append(of_round)
    updates = federation.play()
    assert [update.site for update in updates] == sorted(sites)
    ((received, of_round, aggregation, personal),) = seen
    assert (received is before, of_round is updates, aggregation.adapter is federation.adapter) == (True, True, True)
    assert personal == {}
    mean = weighted_mean([update.adapter for update in sites.values()], [u.num_examples for u in sites.values()])
    for name, array in mean.items():
        np.testing.assert_array_equal(federation.adapter[name], array)
    one = sum(array.nbytes for array in before.values())
    assert federation.bytes_up == federation.bytes_down == len(sites) * one


def test_rounds_end_where_the_settings_say_and_go_on_from_each_other(tmp_path):
    config = load_config(settings(tmp_path, "strategy=fc_moe", "rounds=3"))
    in_pieces, at_once = (simulated(config, tmp_path / name) for name in ("pieces", "once"))
    in_pieces.play()
    first = in_pieces.adapter
    assert len(list(in_pieces.rounds())) == 2
    assert len(list(at_once.rounds())) == 3
    assert adapter_sha256(in_pieces.adapter) == adapter_sha256(at_once.adapter) != adapter_sha256(first)


def test_site_keeps_its_own_adapter_until_it_is_given_another(tmp_path):
    config = load_config(settings(tmp_path, "strategy=clair", "federation.fraction=0.5", "rounds=3"))
    federation = simulated(config, tmp_path / "private")
    given: dict[str, str] = {}
    for updates in federation.rounds():
        asked = {update.site for update in updates}
        kept = {site: adapter_sha256(federation.received(site)) for site in given.keys() | asked}
        assert {site: sha for site, sha in kept.items() if site not in asked} == {
            site: sha for site, sha in given.items() if site not in asked
        }
        given |= kept
    assert adapter_sha256(federation.adapter) not in given.values()


def test_a_site_that_shares_nothing_leaves_the_whole_adapter_as_it_began(tmp_path):
    config = load_config(settings(tmp_path, "strategy=local_only"))
    federation: Federation = simulated(config, tmp_path / "private")
    federation.play()
    assert federation.adapter == {}
    assert federation.bytes_up == 0
    assert adapter_sha256(federation.whole_adapter()) == adapter_sha256(federation.adapted.initial_adapter(0))


@pytest.mark.simulation
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "words",
    [
        ["strategy=fc_moe", "federation.fraction=0.75", "model.experts=full"],
        ["strategy=fc_moe_plus", "rounds=3"],  # remembers its last step
        ["strategy=fedalign_moe"],  # sends more than adapters, both ways
        ["strategy=scaffold"],  # keeps something at the server and at the sites
        ["strategy=fedadam"],  # moments at the server
        ["strategy=pfl_moe"],  # a model of its own at each site, and a gate that mixes
        ["strategy=centralised"],  # one site
    ],
    ids=lambda words: words[0],
)
def test_it_ends_with_the_adapter_of_a_run_in_flower(tmp_path, words):
    words = settings(tmp_path, *words, "train.learning_rate=1e-2")
    run = bouquet("run", *words, f"output={tmp_path / 'run'}", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    federation = simulated(load_config(words), tmp_path / "private")
    assert list(federation.rounds())
    found = summary(run_folder(run.stdout))
    assert adapter_sha256(federation.whole_adapter()) == found["adapter_sha256"]
    # Messages have headers, and a run sends the adapter once more to be evaluated.
    replies = 2 * len(federation.sites) * federation.config.rounds
    assert federation.bytes_up < found["bytes_up"] < federation.bytes_up + replies * HEADER_BYTES
    assert federation.bytes_down < found["bytes_down"]
