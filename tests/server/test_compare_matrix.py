"""Matrices of several runs as tables: seeds together, the base once, general sets in columns."""

from __future__ import annotations

import io
import math

from rich.console import Console

from client.evaluation.measured import ExpertUse, Measured, RelativeCost, Score, Scored
from server.compare_matrix import by_seeds, matrix_tables
from server.evaluation import put_together
from server.record import RunFolder, evaluation_json


def write_run(path, seed, losses, general=2.0, rank=8, use=None, flops=None):
    folder = RunFolder(path)
    folder.create()
    folder.write_text("config.yaml", f"lora:\n  rank: {rank}\nseed: {seed}\noutput: {path}\n")
    rows = [_test("global", site, loss) for site, loss in losses.items()]
    rows += [_test("base", site, 5.0) for site in losses] + [_test("global", "*general*", general)]
    cost = None if flops is None else RelativeCost(flops=flops, seconds=2 * flops)
    measured = {"a": Measured(scores=(), cost=cost, routing={} if use is None else {"layer": use})}
    folder.write_text("evaluation.json", evaluation_json(put_together(measured, rows)))
    return path


def _test(model, on, loss):
    return Scored(model=model, on=on, score=Score(loss=loss, num_tokens=1, num_examples=1))


def shown(folders):
    console = Console(file=io.StringIO(), width=200)
    console.print(*matrix_tables(folders))
    return console.file.getvalue()


def cells(table, *words):
    line = next(line for line in table.splitlines() if all(word in line for word in words))
    return [cell.strip() for cell in line.strip("│┃").split("│")]


def test_runs_that_differ_in_the_seed_alone_are_one_line_with_an_interval(tmp_path):
    """Means over sites 1, 2, 3: t(2) = 4.303, so 2 +- 4.303 / sqrt(3) = 2.4843; the worst is always b, 0.5 above."""
    names = [f"fedavg,seed={seed}" for seed in range(3)]
    folders = [write_run(tmp_path / name, seed, {"a": seed + 0.5, "b": seed + 1.5}) for seed, name in enumerate(names)]
    table = shown([*folders, write_run(tmp_path / "other", 0, {"a": 1.0, "b": 1.0}, rank=4)])
    half = 4.303 / math.sqrt(3)
    assert cells(table, "fedavg")[:6] == [
        "fedavg (3 seeds)", "global", f"2.0000 ± {half:.4f}", f"2.5000 ± {half:.4f} (b)", "0.5000 ± 0.0000",
        "1.0000 ± 0.0000",
    ]  # fmt: skip
    assert cells(table, "other")[2:] == ["1.0000", "1.0000 (a)", "0.0000", "0.0000", "2.0000"]
    assert [group.names for group in by_seeds(folders)] == [names]


def test_base_that_all_runs_agree_on_stands_once(tmp_path):
    folders = [write_run(tmp_path / name, 0, {"a": 1.0}, rank=rank) for rank, name in ((4, "x"), (8, "y"))]
    table = shown(folders)
    assert sum("base" in line for line in table.splitlines()) == 1
    assert cells(table, "base")[2] == "5.0000"


def test_use_of_experts_and_cost_stand_with_an_interval_where_they_are_known(tmp_path):
    """Shares 0.5 and 0.75 of two seeds: t(1) = 12.706, so 0.625 +- 12.706 * 0.25 / 2 = 1.588; time is twice 1.25."""
    folders = [
        write_run(tmp_path / f"flex,seed={seed}", seed, {"a": 1.0}, use=use, flops=1.25)
        for seed, use in enumerate((ExpertUse((0.5, 0.5)), ExpertUse((0.75, 0.25))))
    ]
    table = shown([*folders, write_run(tmp_path / "local", 0, {"a": 1.0}, rank=4)])
    row = cells(table[table.index("busiest") :], "flex (2 seeds)")
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    mean, half = (1 + entropy) / 2, 12.706 * (1 - entropy) / 2
    assert row[1:] == [f"{mean:.3f} ± {half:.3f}", "0.625 ± 1.588", "1.250 ± 0.000", "2.500 ± 0.000"]
    assert "local" not in table[table.index("busiest") :]
    assert "busiest" not in shown([tmp_path / "local"])


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / day / "flex", 0, {"a": 1.0}, rank=rank) for rank, day in ((4, "mon"), (8, "tue"))]
    table = shown(folders)
    assert cells(table, "mon/flex")[1] == cells(table, "tue/flex")[1] == "global"


def test_runs_without_a_matrix_make_no_table(tmp_path):
    RunFolder(tmp_path / "plain").create()
    assert matrix_tables([tmp_path / "plain"]) == []
