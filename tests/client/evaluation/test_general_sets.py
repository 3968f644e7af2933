"""General sets out of files: which rows, which columns, and what is wrong with them by the setting's name."""

import json

import pytest

from client.evaluation.choices import Question
from client.evaluation.general_sets import CHOICES, GENERAL, general_sets
from client.text import Example
from conf.schema import ChoicesConfig, Config, EvalConfig

ROWS = [
    {"kind": "arc", "question": "Which is red?", "choices": ["rose", "sky"], "answer": "0"},
    {"kind": "piqa", "question": "How to sit?", "choices": ["standing", "on a chair"], "answer": "1"},
    {"kind": "arc", "question": "Which is wet?", "choices": ["stone", "sun", "rain"], "answer": 2},
]


def config_of(seed=0, max_examples=None, general_path=None, **choices):
    return Config(
        seed=seed,
        eval=EvalConfig(max_examples=max_examples, general_path=general_path, choices=ChoicesConfig(**choices)),
    )


@pytest.fixture
def sets_of(tmp_path):
    def found(rows, seed=0, **choices):
        (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return general_sets(config_of(seed, path=str(tmp_path / "asked.jsonl"), **choices))

    return found


def test_without_files_there_are_no_sets():
    assert general_sets(config_of()) == {}


def test_table_of_questions_is_one_set_or_one_for_each_name(sets_of):
    rows = [{**row, "answer": int(row["answer"])} for row in ROWS]
    (name, whole), *others = sets_of(rows).items()
    assert (name, others, whole.examples) == (CHOICES, [], ())
    assert whole.questions[2] == Question("Which is wet?", "", ("stone", "sun", "rain"), 2)
    named = sets_of(rows, name_column="kind")
    assert {name: len(test.questions) for name, test in named.items()} == {"*arc*": 2, "*piqa*": 1}
    assert sets_of(rows, name_column="kind", names=["piqa"]).keys() == {"*piqa*"}


def test_limit_draws_the_same_rows_of_each_set_every_time(sets_of):
    rows = [{"question": str(number), "choices": ["a", "b"], "answer": 0} for number in range(50)]
    drawn = [question.prompt for question in sets_of(rows, max_questions=10)[CHOICES].questions]
    assert drawn == sorted(drawn, key=int)
    assert drawn == [question.prompt for question in sets_of(rows, max_questions=10)[CHOICES].questions]
    assert drawn != [str(number) for number in range(10)]
    other = sets_of(rows, seed=1, max_questions=10)[CHOICES].questions
    assert drawn != [question.prompt for question in other]


def test_general_examples_are_read_with_the_datas_columns_and_limited(tmp_path):
    rows = [{"instruction": f"Say {number}.", "context": "", "response": str(number)} for number in range(9)]
    (tmp_path / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = general_sets(config_of(general_path=str(tmp_path / "general.jsonl"), max_examples=4))[GENERAL]
    assert len(test.examples) == 4
    assert set(test.examples) <= {Example(row["instruction"], "", row["response"]) for row in rows}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({}, {"answer_column": "right"}, "eval.choices.answer_column='right' is not a column of"),
        ({"choices": ["alone"]}, {}, "eval.choices.options_column='choices': row 1 of .* needs a list of at least two"),
        ({"choices": ["a", " "]}, {}, "row 1 of .* needs a list of at least two texts"),
        ({"answer": 2}, {}, r"row 1 of .* must tell the right option's place, 0 to 1, got 2"),
        ({"answer": -1}, {}, "must tell the right option's place, 0 to 1, got -1"),
        ({}, {"name_column": "question", "names": ["x"]}, r"has no question of \['x'\]"),
    ],
)
def test_what_is_no_question_is_refused_by_setting_and_row(sets_of, change, settings, message):
    rows = [{"question": "?", "choices": ["a", "b"], "answer": 0} for _ in range(3)]
    rows[1] |= change
    with pytest.raises(ValueError, match=message):
        sets_of(rows, **settings)


def test_missing_file_is_told_by_its_setting(tmp_path):
    missing = str(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="eval.choices.path=.*nowhere.jsonl: there is no such file"):
        general_sets(config_of(path=missing))
    with pytest.raises(ValueError, match="eval.general_path=.*nowhere.jsonl: there is no such file"):
        general_sets(config_of(general_path=missing))
