"""In which settings runs differ."""

from __future__ import annotations

from server.report.differences import differences, incomparable

RUN = {"seed": 0, "output": "a", "data": {"num_examples": 800, "filter": {}}, "train": {"learning_rate": 1e-3}}


def test_differences_are_by_whole_name_without_the_folder():
    other = RUN | {"seed": 1, "output": "b", "train": {"learning_rate": 2e-3, "max_steps": None}}
    assert differences([RUN, other]) == [
        ("seed", ["0", "1"]),
        ("train.learning_rate", ["0.001", "0.002"]),
        ("train.max_steps", ["\u2013", "null"]),
    ]
    assert differences([RUN, RUN]) == differences([RUN]) == differences([]) == []


def test_losses_of_other_data_are_not_comparable():
    other = RUN | {"data": {"num_examples": 400, "filter": {}}, "eval": {"every": 2}}
    assert incomparable([RUN, other]) == "losses may not be comparable: the runs differ in data.num_examples"


def test_other_training_seeds_and_settings_of_one_run_alone_leave_losses_comparable():
    other = RUN | {"seed": 1, "train": {"learning_rate": 2e-3}, "eval": {"every": 2}}
    assert incomparable([RUN, other, {}]) is None


def test_many_differences_are_counted():
    runs = [{"eval": {f"key_{number}": value for number in range(9)}} for value in (0, 1)]
    assert incomparable(runs).endswith("eval.key_4, eval.key_5 and 3 more")
