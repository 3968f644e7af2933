"""The embedded data: what its sites share, where they disagree, and that both can be learned."""

from collections import Counter, defaultdict
from datetime import datetime
from itertools import combinations

import pytest

from client.embedded import (
    CUED_FRACTION,
    DOMAINS,
    HOUSE_RULES,
    TASKS,
    WORDS,
    embedded_rows,
    pretraining_rows,
    pretraining_texts,
)
from client.templates import Example, plain_prompt

NUM_ROWS = 1200


@pytest.fixture(scope="module")
def rows():
    return embedded_rows(NUM_ROWS, seed=0)


def prompt_of(row):
    return row["instruction"], row["context"]


def argument_of(row):
    """The context without a domain's cue."""
    return row["context"].partition(": ")[2] or row["context"]


def test_rows_are_the_same_every_time_and_fewer_are_the_beginning_of_more(rows):
    assert embedded_rows(NUM_ROWS, seed=0) == rows
    assert embedded_rows(70, seed=0) == rows[:70]
    assert embedded_rows(NUM_ROWS, seed=1) != rows


def test_domains_and_kinds_of_task_are_balanced(rows):
    """1200 rows, 4 domains, half of each domain's rows house rules: 1200 / 4 / 2 = 150."""
    counts = Counter((row["domain"], row["task"] in HOUSE_RULES) for row in rows)
    assert counts == {(domain, house): 150 for domain in DOMAINS for house in (False, True)}
    assert {row["task"] for row in rows} == set(TASKS)


def test_every_text_fits_in_160_bytes_with_its_special_tokens(rows):
    longest = max(
        len((plain_prompt(Example(*prompt_of(row), row["response"])) + row["response"]).encode()) for row in rows
    )
    assert longest + 2 <= 160
    assert all(row["response"] for row in rows)


def test_a_site_never_contradicts_itself():
    answers = defaultdict(set)
    for row in embedded_rows(20_000, seed=3):
        answers[row["domain"], prompt_of(row)].add(row["response"])
    assert {len(found) for found in answers.values()} == {1}


def test_same_prompt_has_another_answer_elsewhere_just_for_house_rules():
    by_prompt = defaultdict(lambda: defaultdict(dict))
    for row in embedded_rows(20_000, seed=3):
        by_prompt[row["task"]][prompt_of(row)][row["domain"]] = row["response"]
    for task, prompts in by_prompt.items():
        everywhere = [answers for answers in prompts.values() if len(answers) == len(DOMAINS)]
        disagreeing = [answers for answers in everywhere if len(set(answers.values())) > 1]
        if task in HOUSE_RULES:
            # "4 April" is 4/4 at every site.
            assert len(disagreeing) > 0.9 * len(everywhere) > 0, task
        else:
            assert not disagreeing, task


def test_default_amount_of_data_holds_identical_prompts_with_different_answers(rows):
    answers = defaultdict(set)
    for row in rows:
        answers[prompt_of(row)].add(row["response"])
    assert sum(len(found) > 1 for found in answers.values()) >= 20


def test_no_two_sites_keep_the_same_rules_and_none_disagree_on_all():
    for left, right in combinations(DOMAINS, 2):
        same = [task for task in HOUSE_RULES if TASKS[task].rules.get(left, 0) == TASKS[task].rules.get(right, 0)]
        assert 0 < len(same) < len(HOUSE_RULES)


def test_held_out_prompts_are_mostly_new(rows):
    """Of each task's last fifth of the rows; priorities and abbreviations have few arguments, so theirs repeat."""
    seen = {(row["domain"], *prompt_of(row)) for row in rows[:960]}
    held_out = rows[960:]
    new = [row for row in held_out if (row["domain"], *prompt_of(row)) not in seen]
    assert len(new) > 0.85 * len(held_out)


def test_shared_tasks_speak_the_words_of_their_domain(rows):
    assert len({word for words in WORDS.values() for word in words}) == sum(map(len, WORDS.values()))
    for row in rows:
        foreign = {word for domain, words in WORDS.items() if domain != row["domain"] for word in words}
        used = set(
            f"{row['instruction']} {row['context']}".replace("?", " ").replace(",", " ").replace(":", " ").split()
        )
        assert not used & foreign - {"past", "at"}, row
        assert row["task"] in HOUSE_RULES or used & set(WORDS[row["domain"]]), row


def test_a_quarter_of_the_house_rules_name_their_domain():
    house = [row for row in embedded_rows(8000, seed=1) if row["task"] in HOUSE_RULES]
    cued = [row for row in house if ": " in row["context"]]
    assert abs(len(cued) / len(house) - CUED_FRACTION) < 0.03


def oracle(row):
    """The answer, computed from the prompt's text alone and the domain's rule."""
    text, domain = argument_of(row), row["domain"]
    last = text.split()[-1]
    match row["task"]:
        case "pick":
            fields = dict(part.split() for part in text.split(", "))
            return fields[row["instruction"].removeprefix("What is the ").removesuffix("?")]
        case "last":
            return last
        case "capitals":
            return "".join(chr(ord(letter) - 32) if letter != " " else letter for letter in text)
        case "count":
            return str(text.count(" ") + 1)
        case "next":
            return f"{text.split()[0]} {int(last) + 1}"
        case "reverse":
            return "".join(reversed(last))
        case "time":
            _, _, minute, _, hour, _ = text.split()
            return datetime.strptime(f"{hour}:{minute} PM", "%I:%M %p").strftime("%H:%M")
        case "join":
            return text.replace(" ", "-")
        case "even":
            return ("even", "odd")[int(last[-1]) % 2]
        case "date":
            date = datetime.strptime(f"{text} 2001", "%d %B %Y")
            return f"{date.month}/{date.day}" if domain in {"bank", "workshop"} else f"{date.day}/{date.month}"
        case "sort":
            return " ".join(map(str, sorted(map(int, text.split()), reverse=domain in {"bank", "court"})))
        case "decimal":
            whole, _, tenths, _ = text.split()
            return f"{int(whole) + int(tenths) / 10:.1f}".replace(".", "," if domain in {"court", "workshop"} else ".")
        case "name":
            first, family = text.removeprefix("first ").split(", last ")
            return f"{family}, {first}" if domain == "court" else f"{first} {family}"
        case "priority":
            scale = {"bank": "P1 P2 P3", "clinic": "A B C", "court": "red amber green", "workshop": "I II III"}[domain]
            return scale.split()[["urgent", "normal", "later"].index(text.split(",")[0])]
    return None


def test_answers_are_right():
    unchecked = Counter()
    for row in embedded_rows(4000, seed=5):
        expected = oracle(row)
        unchecked[row["task"]] += expected is None
        assert expected in {None, row["response"]}, row
    assert {task for task, count in unchecked.items() if count} == {"abbreviation"}


def test_pretraining_shows_every_rule_of_every_house_without_taking_sides():
    """Each of n rules is drawn with probability 1/n, whatever the domain of the words around it."""
    answers = defaultdict(Counter)
    for row in pretraining_rows(30_000, seed=0):
        if row["task"] == "priority" and argument_of(row).startswith("urgent"):
            answers[row["domain"] if ": " in row["context"] else "no cue"][row["response"]] += 1
    assert set(answers) == {"no cue", *DOMAINS}
    for found in answers.values():
        assert set(found) == {"P1", "A", "red", "I"}
        assert max(found.values()) < 0.45 * found.total()


def test_pretraining_texts_are_the_rows_in_the_plain_template():
    rows = list(pretraining_rows(50, seed=4))
    expected = [f"{row['instruction']}\n{row['context']}\n{row['response']}" for row in rows]
    assert list(pretraining_texts(50, seed=4)) == expected
    assert list(pretraining_texts(50, seed=5)) != expected


def test_pretraining_draws_from_another_stream_than_the_sites_rows(rows):
    pretrained = list(pretraining_rows(NUM_ROWS, seed=0))
    assert [prompt_of(row) for row in pretrained[:20]] != [prompt_of(row) for row in rows[:20]]
