"""What was tested with other values of a contender's knobs than it stands at now."""

from benchmarks.cells import Outcome
from benchmarks.fc_moe_overtaken import overtaken
from benchmarks.fc_moe_tables import other_values

ROUNDS = {"accuracy": [0.5] * 6, "loss": [1.0] * 6, "sites": {"a": 0.5}, "split": "test"}
RATES = ("train.learning_rate=0.004", "train.learning_rate=0.008")
WHOLE = ("strategy=fc_moe_plus", "strategy.agreement=null")


def row(seed, *settings, **changes):
    return ROUNDS | {"seed": seed, "settings": [*settings]} | changes


def test_rows_belong_to_whose_knobs_differ_alone():
    tested = {
        "fedavgm": Outcome(("strategy=fedavgm", "strategy.learning_rate=1", "strategy.momentum=0.1", RATES[0]), {}),
        "fc_moe": Outcome(("strategy=fc_moe", "method.retention.strength=0.5", RATES[0]), {}),
        "fc_moe_no_importance": Outcome(("strategy=fc_moe", "strategy.importance=uniform", RATES[1]), {}),
        "fc_moe_plus_whole": Outcome((*WHOLE, "strategy.step=2", RATES[0]), {}),
        "fc_moe_plus_whole_step_2": Outcome((*WHOLE, "strategy.step=2", RATES[0]), {}),
        "fc_moe_plus_whole_flatten_0": Outcome((*WHOLE, "strategy.flatten=0", "strategy.step=2", RATES[0]), {}),
        "fc_moe_plus_whole_step_1": Outcome((*WHOLE, "strategy.step=1", RATES[1]), {}),
    }
    unflat = (*WHOLE, "strategy.flatten=0", "strategy.step=2", RATES[1])
    short = (*WHOLE, "strategy.step=1", RATES[0])
    momentum = ("strategy=fedavgm", "strategy.learning_rate=1", "strategy.momentum=0.3", RATES[0])
    uniform = ("strategy=fc_moe", "strategy.importance=uniform", "method.retention.strength=0.5", RATES[0])
    rows = [
        row(0, *momentum),
        row(1, *momentum),
        row(0, *uniform),
        row(0, *short),
        row(0, *unflat),
        row(0, *tested["fc_moe"].settings),
        row(0, "strategy=fc_moe", "strategy.conflict.space=product", RATES[0]),
        row(100, *momentum[:2], "strategy.momentum=0.5", RATES[0], split="validation"),
    ]
    found = overtaken(tested, rows)
    assert [(name, result.settings, [*result.rows]) for name, result in found] == [
        ("fc_moe_no_importance", uniform, [0]),
        ("fc_moe_plus_whole_flatten_0", unflat, [0]),
        ("fc_moe_plus_whole_step_1", short, [0]),
        ("fedavgm", momentum, [0, 1]),
    ]


def test_a_part_that_is_left_out_is_no_value_of_the_knob_that_sets_it():
    """Whole steps are rows of theirs, though the tuned rule, which is nearer, searches its agreement."""
    unflat = (*WHOLE, "strategy.flatten=0", "strategy.step=2", RATES[0])
    tested = {
        "fc_moe_plus": Outcome((WHOLE[0], "strategy.flatten=0", "strategy.step=2", RATES[0]), {}),
        "fc_moe_plus_whole": Outcome((*WHOLE, "strategy.step=1", RATES[1]), {}),
    }
    found = overtaken(tested, [row(0, *unflat)])
    assert [name for name, _ in found] == ["fc_moe_plus_whole"]
    assert "agreement=null, flatten=0, step=2, lr=0.004" in other_values(tested, found).replace("(end)", "")
    assert not overtaken({"fc_moe_plus": tested["fc_moe_plus"]}, [row(0, *unflat)])


def test_table_pairs_them_with_who_stands():
    chosen = Outcome(("strategy=fedavg", RATES[1]), {seed: row(seed, "", accuracy=[0.4] * 6) for seed in (0, 1)})
    before = [("fedavg", Outcome(("strategy=fedavg", RATES[0]), {seed: row(seed, "") for seed in (0, 1, 2)}))]
    line = other_values({"fedavg": chosen}, before).splitlines()[-1]
    assert line == "| FedAvg | lr=0.004 | 3 | 50.0 ± 0.0 | +10.0 ± 0.0 |"
    assert other_values({"fedavg": chosen}, []) == ""
