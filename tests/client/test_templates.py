"""The wording of each template."""

from client.templates import Example, alpaca_prompt, chat_message, plain_prompt

WITH_CONTEXT = Example("Translate to French.", "cat", "chat")
WITHOUT_CONTEXT = Example("Name a colour.", "", "red")


def test_alpaca_prompt_is_stanfords_wording():
    """The two entries of PROMPT_DICT in stanford_alpaca/train.py, filled in."""
    assert alpaca_prompt(WITH_CONTEXT) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nTranslate to French.\n\n### Input:\ncat\n\n### Response:\n"
    )
    assert alpaca_prompt(WITHOUT_CONTEXT) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n"
    )


def test_plain_prompt_is_a_line_each_and_none_for_an_empty_context():
    assert plain_prompt(WITH_CONTEXT) == "Translate to French.\ncat\n"
    assert plain_prompt(WITHOUT_CONTEXT) == "Name a colour.\n"


def test_chat_message_ends_without_a_line_break():
    assert chat_message(WITH_CONTEXT) == "Translate to French.\ncat"
    assert chat_message(WITHOUT_CONTEXT) == "Name a colour."
