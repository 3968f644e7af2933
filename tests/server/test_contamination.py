"""CLAIR and the screen in whole runs over real sites, one of which sends something else than it trained."""

import numpy as np
import pytest

from client.messages import TRAIN, decode_request
from tests.server.faults import sends, with_adapter
from tests.server.loopback import in_round, run_server, simulation

BAD = 5
"""Position of the contaminated site; its name is site-05."""
FIVE_HONEST = "partition=iid partition.num_sites=6 data.num_examples=90"


def noise(name, array):
    drawn = np.random.default_rng(len(name)).normal(size=array.shape)
    return name, (array + drawn).astype(np.float32)


@pytest.fixture(scope="module")
def contaminated(small, tmp_path_factory):
    """Runs in which the last site sends noise in round 1 and behaves from then on."""

    def finished(overrides):
        grid = simulation(f"{small} {FIVE_HONEST} {overrides}", 6, {BAD: in_round(1, sends(with_adapter(noise)))})
        return run_server(grid, tmp_path_factory.mktemp("contaminated") / "run")

    return finished


def rejected(run):
    return {row["round"] for row in run.site_rows("site-05") if row.get("rejected")}


def sent_down(run, kind, server_round):
    """Arrays that each site got, by node."""
    chosen = [
        sent
        for sent in run.grid.sent
        if not sent.up and sent.kind == kind and sent.message().metadata.group_id == str(server_round)
    ]
    return {sent.site: decode_request(sent.message())[1] for sent in chosen}


def test_screen_excludes_a_site_sits_it_out_and_forgives_it(contaminated):
    run = contaminated("strategy=fc_moe screen=clair rounds=3")
    assert run.error is None
    assert rejected(run) == {1, 2}
    assert {row["round"] for site in range(BAD) for row in run.site_rows(f"site-0{site}") if row["rejected"]} == set()
    told = [event for event in run.events if "site-05 is rejected" in event]
    assert len(told) == 2
    assert "more clean rounds are needed" in told[1]
    diagnostics = run.folder.diagnostics()[0]
    assert {"verdicts", "matrices", "layers"} <= diagnostics.keys()


def test_clair_sends_each_accepted_site_its_own_adapter(contaminated):
    run = contaminated("strategy=clair rounds=2")
    assert run.error is None
    # A rejected site goes on from its own adapter, in which the noise still is.
    assert rejected(run) == {1, 2}
    second = list(sent_down(run, TRAIN, 2).values())
    name = next(name for name in second[0] if name.endswith(".lora_B"))
    assert len({arrays[name].tobytes() for arrays in second}) == 6


def test_one_shot_keeps_refined_products_at_whatever_rank_they_have(contaminated):
    run = contaminated("strategy=clair strategy.refined_rank=exact rounds=1")
    assert run.error is None
    assert rejected(run) == {1}
    got = sent_down(run, "evaluate", 1)
    ranks = [next(a.shape[-2] for n, a in arrays.items() if n.endswith(".lora_A")) for arrays in got.values()]
    assert sorted(ranks) == [2, 10, 10, 10, 10, 10]
    assert all(np.isfinite(row["loss"]) for site in range(6) for row in run.site_rows(f"site-0{site}"))
