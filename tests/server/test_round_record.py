"""The rows of a round, and the draw of who is asked in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.methods import SftConfig
from conf.partitions import Natural
from conf.schema import Config, FederationConfig
from server.round_record import RoundRecord, sample_sites
from strategies.fedavg import FedAvg

SITES = [f"site-{number:02d}" for number in range(10)]


def settings(fraction, seed=0, min_sites=1):
    federation = FederationConfig(fraction=fraction, min_sites=min_sites)
    return Config(strategy=FedAvg(), method=SftConfig(), partition=Natural(), federation=federation, seed=seed)


def test_rows_are_the_sites_by_name_and_then_the_rounds():
    record = RoundRecord(3)
    record.site("b").update(num_examples=1, train_loss=4.0, bytes_up=10, bytes_down=3)
    record.site("a").update(num_examples=3, train_loss=2.0, bytes_up=20)
    record.site("c")["dropped"] = record.dropped["c"] = "too late"
    *sites, of_round = record.rows()
    assert [row["site"] for row in sites] == ["a", "b", "c"]
    assert {row["type"] for row in sites} == {"site"}
    assert (
        of_round.items()
        >= {
            "type": "round",
            "round": 3,
            "train_loss": (1 * 4.0 + 3 * 2.0) / 4,
            "num_sites": 2,
            "dropped": {"c": "too late"},
            "bytes_up": 30,
            "bytes_down": 3,
            "global_loss": None,
        }.items()
    )
    assert of_round["seconds"] >= 0


def test_round_that_nobody_trained_in_has_no_loss():
    (row,) = RoundRecord(0).rows()
    assert (row["train_loss"], row["num_sites"]) == (None, 0)


@given(st.floats(0.05, 1.0), st.integers(0, 5), st.integers(1, 20))
def test_sites_drawn_are_sorted_distinct_and_as_many_as_the_fraction(fraction, seed, server_round):
    drawn = sample_sites(SITES, settings(fraction, seed), server_round)
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(SITES)
    assert len(drawn) == max(1, round(fraction * 10))
    assert drawn == sample_sites(SITES, settings(fraction, seed), server_round)


def test_draw_changes_with_round_and_seed_and_reaches_everyone():
    by_round = [tuple(sample_sites(SITES, settings(0.3), number)) for number in range(1, 41)]
    assert len(set(by_round)) > 20
    assert set().union(*by_round) == set(SITES)
    assert by_round != [tuple(sample_sites(SITES, settings(0.3, seed=1), number)) for number in range(1, 41)]


def test_everybody_is_asked_by_default():
    assert sample_sites(SITES, settings(1.0), 1) == SITES


def test_too_few_connected_sites_end_the_run_by_round_and_settings():
    text = r"^round 4: federation.fraction=0.3 of 10 connected sites asks 3, below federation.min_sites=4$"
    with pytest.raises(RuntimeError, match=text):
        sample_sites(SITES, settings(0.3, min_sites=4), 4)
    with pytest.raises(RuntimeError, match=r"^round 1: .* of 0 connected sites asks 0, below federation.min_sites=1$"):
        sample_sites([], settings(1.0), 1)
