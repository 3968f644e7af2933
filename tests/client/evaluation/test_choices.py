"""Multiple choice against transformers' own loss of each option."""

import pytest
import torch

from benchmarks.word_base import word_tokenizer
from client.base_model import load_base
from client.evaluation.choices import Question, accuracy, encoded, questions_of
from client.evaluation.examination import one_adapter
from client.model import AdaptedModel
from client.text import Example
from conf.model import LoraConfig
from conf.schema import Config, DataConfig, EvalConfig, Template, Truncation
from tests.client.local_training import noisy
from tests.client.tiny_models import save_tiny_base

DATA = DataConfig(template=Template.plain, max_length=40)
OPTIONS = [("red", "a very long green answer"), ("x", "yy", "zzz"), ("no", "yes"), ("cat", "dog", "cow", "owl")]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    config = save_tiny_base(tmp_path_factory.mktemp("base"), "olmoe")
    return AdaptedModel(load_base(config, torch.device("cpu")), config, LoraConfig(rank=2))


@pytest.fixture(scope="module")
def adapter(adapted):
    return noisy(adapted.initial_adapter(0), deviation=0.3)


def naive_choice(adapted, adapter, question):
    """The option whose tokens, end of sequence included, have the least mean loss behind the prompt."""
    adapted.load_adapter(adapter)
    adapted.model.eval()
    prompt = [257, *f"{question.prompt}\n".encode()]
    losses = []
    for option in question.options:
        answer = [*option.encode(), 258]
        labels = [-100] * len(prompt) + answer
        with torch.no_grad():
            output = adapted.model(input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([labels]))
        losses.append(output.loss.item())
    return losses.index(min(losses))


@pytest.mark.parametrize("change", [{}, {"packing": True}, {"truncation": Truncation.drop}])
def test_accuracy_counts_the_options_of_least_loss_per_token(adapted, adapter, change):
    """Two questions are asked for what the model chooses, two for something else."""
    questions = [Question(f"Ask {n}", "", options, 0) for n, options in enumerate(OPTIONS)]
    chosen = [naive_choice(adapted, adapter, question) for question in questions]
    wanted = [chosen[0], chosen[1], 1 - chosen[2], (chosen[3] + 1) % 4]
    asked = [Question(f"Ask {n}", "", options, wanted[n]) for n, options in enumerate(OPTIONS)]
    data = DataConfig(**{"template": Template.plain, "max_length": 40, **change})
    config = Config(eval=EvalConfig(batch_size=4))
    losses = one_adapter(adapted, adapter, config).losses
    assert accuracy(losses, encoded("*choices*", asked, adapted.tokenizer, data)) == 0.5


UNKNOWN = Question("Ask", "", ("zebra", "yak", "red"), 2)
"""Two options that a vocabulary without them takes for the same word."""


def test_question_whose_options_are_the_same_tokens_is_left_out_and_counted(caplog):
    asked = [UNKNOWN, Question("Ask", "", ("red", "blue"), 0), Question("Ask", "", ("blue yak", "blue zebra"), 1)]
    (kept,) = encoded("*piqa*", asked, word_tokenizer(["ask", "red", "blue"]), DATA)
    assert len({tuple(option.input_ids) for option in kept.options}) == 2
    assert caplog.messages == ["*piqa*: 2 of 3 questions left out: 2 with two options of the same tokens"]


def test_question_with_an_option_that_is_cut_is_left_out_and_counted(adapted, caplog):
    """Of 40 tokens one begins the text and one ends the option: 38 bytes fit, and a prompt of none."""
    asked = [Question("Ask", "", ("no", "y" * length), 0) for length in (39, 38, 60)]
    kept = encoded("*choices*", asked, adapted.tokenizer, DATA)
    assert [[len(option.input_ids) for option in question.options] for question in kept] == [[8, 40]]
    message = "*choices*: 2 of 3 questions left out: 2 with an option without tokens or cut by data.max_length=40"
    assert caplog.messages == [message]


def test_option_without_tokens_leaves_its_question_out():
    """A word tokenizer has none for a blank."""
    tokenizer = word_tokenizer(["ask", "red"])
    assert encoded("*choices*", [Question("Ask", "", ("red", " "), 0)], tokenizer, DATA) == []


def test_examples_become_questions_between_the_options_that_there_are():
    examples = [Example("a", "x", "no"), Example("b", "", "perhaps"), Example("c", "", "yes")]
    assert questions_of(examples, ["yes", "no"]) == [
        Question("a", "x", ("yes", "no"), 1), Question("c", "", ("yes", "no"), 0)
    ]  # fmt: skip
    assert questions_of(examples, []) == []


def test_no_questions_are_an_error():
    with pytest.raises(ValueError, match="no questions to answer"):
        accuracy(lambda sequences: [], [])
