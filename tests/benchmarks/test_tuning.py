"""Tuning: which runs are asked for, and what is chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks.contenders import CONTENDERS, PERSONAL
from benchmarks.tuning import LEARNING_RATE, LEARNING_RATE_BY_LOSS, Contender, Knob, Tuning, tuned
from conf.compose import load_config
from conf.model import RouterTraining

STEP = Knob("strategy.learning_rate", (0.5, 1.0, 1.5, 2.0, 3.0), 1.0)
METHODS = {
    "plain": Contender("plain", ("strategy=fedavg",)),
    "step": Contender("step", ("strategy=fedavgm",), (STEP,)),
    "unsaid": Contender("unsaid", ("strategy=fedavgm",), (replace(STEP, unsaid=1.0),)),
    "swept": Contender("swept", ("strategy=fedavgm",), follows="step", instead={"strategy.learning_rate": 3}),
    "ablation": Contender("ablation", ("strategy=fedavgm", "strategy.momentum=0"), follows="step"),
    "retuned": Contender(
        "retuned", ("strategy=fedavgm", "strategy.momentum=0"), follows="step", retunes=("train.learning_rate",)
    ),
}


def search(name, truth, methods=METHODS):
    """Tune against a function of (learning rate, step); every score that is asked for, and the end."""
    known = {}
    while True:
        tuning = tuned(name, known.get, methods)
        if not tuning.missing:
            return known, tuning
        for settings in tuning.missing:
            assert settings not in known, "asked twice"
            values = dict(word.split("=") for word in settings)
            rate = float(values["train.learning_rate"])
            known[settings] = truth(rate, float(values.get("strategy.learning_rate", 1)))


def test_a_peak_away_from_the_start_is_climbed_and_its_far_side_is_not_visited():
    known, tuning = search("plain", lambda rate, step: -abs(math.log(rate / 1e-3)))
    assert tuning.settings == ("strategy=fedavg", "train.learning_rate=0.001")
    assert {settings[1].split("=")[1] for settings in known} == {"0.004", "0.002", "0.008", "0.001", "0.0005"}


def test_learning_rate_is_looked_at_again_with_the_knob_that_was_chosen():
    """A step of 2 is best and rate x step = 8e-3: at a step of 1 the rate is 8e-3, and then twice too large."""
    _, tuning = search("step", lambda rate, step: -2 * abs(math.log(step / 2)) - abs(math.log(rate * step / 8e-3)))
    assert tuning.settings == ("strategy=fedavgm", "strategy.learning_rate=2", "train.learning_rate=0.004")


def test_equal_scores_move_nothing():
    _, tuning = search("step", lambda rate, step: 1.0)
    assert tuning.settings[1:] == ("strategy.learning_rate=1", f"train.learning_rate={LEARNING_RATE.start:g}")


def test_diverged_runs_are_never_chosen():
    _, tuning = search("plain", lambda rate, step: -math.inf if rate > 2e-3 else -rate)
    assert tuning.settings[1] == "train.learning_rate=6.25e-05"


def test_who_follows_gets_the_leaders_values_under_its_own_settings_and_asks_for_no_run_of_its_own():
    known, tuning = search("ablation", lambda rate, step: -abs(step - 2))
    leader = search("step", lambda rate, step: -abs(step - 2))[1]
    assert tuning.settings == ("strategy=fedavgm", "strategy.momentum=0", *leader.settings[1:])
    assert all("strategy.momentum=0" not in settings for settings in known)


def test_a_variant_tunes_its_own_rate_from_the_leaders_and_keeps_the_rest():
    """The leader's peak is at a step of 2 and a rate of 4e-3, the variant's at a step of 3 and a rate of 1e-3."""
    asked = []

    def truth(settings):
        values = dict(word.split("=") for word in settings)
        rate, step = float(values["train.learning_rate"]), float(values["strategy.learning_rate"])
        is_variant = "strategy.momentum" in values
        asked.append((is_variant, rate, step))
        peak = (1e-3, 3) if is_variant else (4e-3, 2)
        return -abs(math.log(rate / peak[0])) - abs(math.log(step / peak[1]))

    known = {}
    while (tuning := tuned("retuned", known.get, METHODS)).missing:
        known |= {settings: truth(settings) for settings in tuning.missing}
    own = ("strategy=fedavgm", "strategy.momentum=0")
    assert tuning.settings == (*own, "strategy.learning_rate=2", "train.learning_rate=0.001")
    of_variant = [(rate, step) for is_variant, rate, step in asked if is_variant]
    assert sorted(of_variant) == [(5e-4, 2), (1e-3, 2), (2e-3, 2), (4e-3, 2), (8e-3, 2)]
    assert asked == sorted(asked, key=lambda each: each[0])  # the leader first
    control = METHODS | {"control": Contender("control", ("strategy=fedavgm",), follows="retuned")}
    settings = ("strategy=fedavgm", "strategy.learning_rate=2", "train.learning_rate=0.001")
    assert tuned("control", known.get, control) == Tuning(settings, ())


def test_variants_of_fc_moe_tune_their_rate_and_another_retention_its_strength():
    retunes = {name: contender.retunes for name, contender in CONTENDERS.items() if contender.follows == "fc_moe"}
    both = {"fc_moe_filtered", "fc_moe_orthogonal"}
    for name, keys in retunes.items():
        strength = ("method.retention.strength",) if name in both else ()
        assert keys == ("train.learning_rate", *strength), name
    assert {"fc_moe_no_projection", "fc_moe_pairwise", "fc_moe_guarded", *both} < retunes.keys()
    leaders, without_a_part = ("fc_moe_plus_as_shipped", "fc_moe_plus_whole"), ("step_1", "flatten_0", "momentum_0")
    off = {f"{leader}_{part}" for leader in leaders for part in without_a_part}
    assert {name for name in CONTENDERS.keys() - retunes.keys() if CONTENDERS[name].retunes} == off
    assert all(CONTENDERS[name].retunes == ("train.learning_rate",) for name in off)
    for contender in CONTENDERS.values():
        leader = CONTENDERS[contender.follows] if contender.follows else contender
        assert {*contender.retunes} <= {knob.key for knob in (LEARNING_RATE, *leader.knobs)}


def test_grids_of_tables_that_were_complete_are_those_they_were_tuned_over():
    """FC-MoE's benchmark went on to wider ones, in which all of these values are."""
    values = {
        "fedprox": (1e-3, 1e-2, 1e-1, 1.0),
        "fedadam": (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
        "fedavgm": (0.25, 0.5, 1.0),
        "fc_moe": (0.1, 0.3, 0.5, 0.8),
    }
    assert {name: PERSONAL[name].knobs[0].values for name in values} == values
    for name in ("fedprox", "fedadam", "fc_moe"):
        assert set(values[name]) < set(CONTENDERS[name].knobs[0].values)


@pytest.mark.parametrize(
    ("name", "control", "key"),
    [
        ("fc_moe_plus_whole", "fc_moe_plus_mean", "ridge"),
        ("fc_moe_plus", "fc_moe_plus_whole", "agreement"),
        ("fc_moe_plus_as_shipped", "fc_moe_plus_whole_as_shipped", "agreement"),
    ],
)
def test_controls_of_fc_moe_plus_lack_one_part_of_it(name, control, key):
    ours, without = (load_config(CONTENDERS[one].settings) for one in (name, control))
    assert getattr(without.strategy, key) is None
    assert replace(without, strategy=ours.strategy) == ours
    assert replace(without.strategy, **{key: getattr(ours.strategy, key)}) == ours.strategy
    tuned_by_ours_alone = {"strategy.ridge", "strategy.agreement"}
    assert tuple(knob for knob in CONTENDERS[name].knobs if knob.key not in tuned_by_ours_alone) == (
        CONTENDERS[control].knobs
    )


def test_fc_moe_plus_as_shipped_has_the_defaults_and_shares_its_runs_where_those_are_what_is_tuned():
    shipped = CONTENDERS["fc_moe_plus_as_shipped"]
    values = [f"{knob.key}={knob.start:g}" for knob in shipped.knobs]
    assert load_config([*shipped.settings, *values]) == load_config(shipped.settings)
    everyone_alike = {
        name: tuned(name, lambda _: 0.0, CONTENDERS).settings for name in ("fc_moe_plus", "fc_moe_plus_as_shipped")
    }
    assert len(set(everyone_alike.values())) == 1


def test_the_noise_bar_is_fedavg_with_its_step_changed_by_a_thousandth():
    noise, fedavgm = (load_config(CONTENDERS[name].settings).strategy for name in ("noise", "fedavgm"))
    assert noise == replace(fedavgm, momentum=0.0, learning_rate=1.001)
    assert CONTENDERS["noise"].follows == "fedavg"


def test_controls_of_fedavg_differ_in_what_they_are_called_by():
    fedavg = load_config(CONTENDERS["fedavg"].settings)
    for router in RouterTraining:
        if router is not RouterTraining.frozen:
            control = load_config(CONTENDERS[f"fedavg_router_{router.name}"].settings)
            assert control == replace(fedavg, model=replace(fedavg.model, router=router))
    assert load_config(CONTENDERS["fedalign_moe"].settings).model.router is RouterTraining.local
    assert CONTENDERS["fedavgm_step"].settings == CONTENDERS["fedavgm"].settings
    assert CONTENDERS["fedavgm_step"].knobs == (*CONTENDERS["fedavg_step"].knobs, *CONTENDERS["fedavgm"].knobs)


def test_a_value_that_changes_nothing_shares_its_runs_with_those_who_lack_the_knob():
    known, tuning = search("unsaid", lambda rate, step: -abs(rate - 4e-3))
    plain = {("strategy=fedavgm", *settings[1:]) for settings in search("plain", lambda rate, step: 1.0)[0]}
    assert plain <= known.keys()
    assert tuning.settings == ("strategy=fedavgm", "train.learning_rate=0.004")
    assert any("strategy.learning_rate=1.5" in settings for settings in known)


def test_a_value_instead_of_the_tuned_one_wins_and_changes_nothing_else():
    """The leader's step is 2; at the value that it has itself, settings are the leader's to the letter."""
    _, tuning = search("swept", lambda rate, step: -abs(step - 2))
    leader = search("step", lambda rate, step: -abs(step - 2))[1]
    assert tuning.settings == ("strategy=fedavgm", "strategy.learning_rate=3", leader.settings[2])
    same = METHODS | {"swept": replace(METHODS["swept"], instead={"strategy.learning_rate": 2})}
    assert search("swept", lambda rate, step: -abs(step - 2), same)[1].settings == leader.settings


@pytest.mark.parametrize("name", [*CONTENDERS, *sorted(PERSONAL.keys() - CONTENDERS.keys())])
def test_settings_of_every_contender_are_valid_wherever_its_knobs_stand(name):
    contenders = CONTENDERS if name in CONTENDERS else PERSONAL
    contender = contenders[name]
    leader = contenders[contender.follows or name]
    for knob in (LEARNING_RATE, *leader.knobs):
        assert list(knob.values) == sorted(knob.values)
        assert knob.start in knob.values
    lowest = [f"{knob.key}={knob.values[0]:g}" for knob in leader.knobs]
    highest = [f"{knob.key}={knob.values[-1]:g}" for knob in leader.knobs]
    experts = ["model.experts=lora"] if name in CONTENDERS else []
    instead = [f"{key}={value}" for key, value in contender.instead.items()]
    for values in (lowest, highest):
        load_config([*experts, *contender.settings, *values, *instead])


def test_what_is_left_unsaid_is_what_settings_say_anyway():
    for contender in CONTENDERS.values():
        for knob in (knob for knob in contender.knobs if knob.unsaid is not None):
            said = load_config([*contender.settings, f"{knob.key}={knob.unsaid:g}"])
            assert said == load_config(contender.settings)


def test_two_ways_uphill_the_better_end_counts():
    """Valleys of loss at 5e-4 and 8e-3: alone the way from 4e-3 ends in the second, wherever the first is."""
    ends = {}
    for depth in (0.5, 2.0):
        truth = {2.5e-4: -1.0, 5e-4: depth, 1e-3: -1.0, 2e-3: -2.0, 4e-3: 0.0, 8e-3: 1.0, 1.6e-2: 0.0}
        for knob in (LEARNING_RATE, LEARNING_RATE_BY_LOSS):
            known = {}
            while (tuning := tuned("plain", known.get, METHODS, knob)).missing:
                assert len(set(tuning.missing)) == len(tuning.missing)
                assert not known.keys() & {*tuning.missing}, "asked twice"
                known |= {each: truth[float(each[1].split("=")[1])] for each in tuning.missing}
            ends[depth, knob.second_start] = float(tuning.settings[1].split("=")[1])
    assert ends == {(0.5, None): 8e-3, (2.0, None): 8e-3, (0.5, 5e-4): 8e-3, (2.0, 5e-4): 5e-4}
