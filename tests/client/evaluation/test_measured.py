"""Numbers on their way from a site: as they were, and refused if they cannot be."""

import json
import math

import pytest

from client.evaluation.measured import ExpertUse, Measured, RelativeCost, Score, Scored

SCORE = Score(loss=1.5, num_tokens=9, num_examples=3, rouge_l=0.25, num_answers=2)
WHOLE = Measured(
    scores=(Scored(model="base", on="bank", score=SCORE), Scored(model="personal", on="*general*", score=Score())),
    cost=RelativeCost(flops=1.25, seconds=1.5),
    routing={"model.layers.0.mlp": ExpertUse((0.75, 0.25))},
)


@pytest.mark.parametrize("measured", [WHOLE, Measured(scores=())])
def test_what_was_measured_comes_back(measured):
    assert Measured.from_json(json.loads(json.dumps(measured.to_json()))) == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": math.nan}, "loss must lie between 0 and inf, got nan"),
        ({"loss": math.inf}, "loss must lie between 0 and inf, got inf"),
        ({"rouge_l": 1.01}, "rouge_l must lie between 0 and 1, got 1.01"),
        ({"accuracy": -0.1}, "accuracy must lie between 0 and 1, got -0.1"),
        ({"num_questions": -1}, "num_questions must be >= 0, got -1"),
        ({"loss": "text of a site"}, "could not convert string to float"),
    ],
)
def test_numbers_that_cannot_be_are_refused(change, message):
    values = WHOLE.to_json()
    values["scores"][0]["score"] |= change
    with pytest.raises(ValueError, match=message):
        Measured.from_json(values)


def test_unknown_models_and_costs_are_refused():
    values = WHOLE.to_json()
    values["scores"][0]["model"] = "best"
    with pytest.raises(ValueError, match="model must be base, global or personal, got 'best'"):
        Measured.from_json(values)
    with pytest.raises(ValueError, match="relative cost in seconds must be positive, got 0"):
        RelativeCost(flops=1.0, seconds=0.0)
    values = WHOLE.to_json()
    values["routing"]["model.layers.0.mlp"] = {"shares": [0.75, 0.5]}
    with pytest.raises(ValueError, match="shares of experts must lie between 0 and 1 and sum to 1"):
        Measured.from_json(values)
