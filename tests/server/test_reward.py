"""``bouquet reward train``: a head from a file of pairs, and how well it does on objectives it was not trained for."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from client.alignment.reward_models import LinearHead
from server.launch import cli

COLUMNS = [
    "data.prompt_column=prompt", "data.context_column=null", "data.response_column=chosen",
    "data.rejected_column=rejected", "data.objective_column=objective", "data.split_column=split",
]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Loud answers are preferred under one objective and not under the other; a third has nothing held out."""
    rows = []
    for number in range(16):
        loud, quiet, split = f"{number}!!!", f"no {number}", "test" if number % 4 == 0 else "train"
        for objective, chosen, rejected in (("loud", loud, quiet), ("quiet", quiet, loud)):
            rows.append({"objective": objective, "chosen": chosen, "rejected": rejected, "split": split})
        rows.append({"objective": "other", "chosen": loud, "rejected": quiet, "split": "train"})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row | {"prompt": "Say it."}) + "\n" for row in rows))
    return path


def test_accuracy_is_told_for_the_held_out_pairs_of_other_objectives(pairs, tiny_base, tmp_path):
    """The same pairs the other way round: one is right where the other is wrong."""
    words = [
        f"data.path={pairs}", *COLUMNS, "model.source=hub", f"model.name={tiny_base}", "data.template=plain",
        "data.max_length=48", "device=cpu",
    ]  # fmt: skip
    result = CliRunner().invoke(cli, ["reward", "train", str(tmp_path / "head"), "--objective", "loud", *words])
    assert result.exit_code == 0, result.exception
    head = LinearHead.load(tmp_path / "head")
    found = head.facts.accuracy
    assert (head.facts.objective, head.facts.num_pairs, found.keys()) == (
        "loud", 12, {"training", "held_out", "held_out/quiet"},
    )  # fmt: skip
    assert found["held_out"] > 0.5
    assert found["held_out/quiet"] == pytest.approx(1 - found["held_out"])
    assert f"held_out/quiet {found['held_out/quiet']:.3f}" in result.output
