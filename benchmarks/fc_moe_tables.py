"""From the cells of ``benchmarks.fc_moe`` to its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.cells import Outcome, Row
from benchmarks.contenders import CONTENDERS
from benchmarks.fc_moe_averaging import MEASURES
from benchmarks.fc_moe_numbers import BySeed, good, growth, last_rounds, on_sites, results
from benchmarks.fc_moe_printed import ABLATION
from benchmarks.fc_moe_told import (
    BASELINE,
    ROUNDS,
    difference,
    digits_of,
    done,
    judged_by_accuracy,
    mean_of_known,
    mean_told,
    measure_of,
    rounds_told,
    summed_up,
    titled,
)
from benchmarks.render import as_table
from benchmarks.tuning import LEARNING_RATE, led

OURS = "fc_moe_plus_as_shipped"
SUMMARISED = (
    "fedavg", "fedavg_step", "fedavgm", "fedalign_moe", "fc_moe", "fc_moe_plus", "fc_moe_plus_as_shipped", "local_only",
    "centralised",
)  # fmt: skip

_DIGITS = {
    "kept": 2, "negative": 3, "opposed": 3, "pairs": 3, "step": 2, "factor": 4, "largest_weight": 2, "largest_share": 2
}  # fmt: skip
_FULL = "fc_moe"
_TITLES = {_FULL: "full"}


def markdown(
    title: str,
    tested: Mapping[str, Outcome],
    seeds: Sequence[int],
    printed: Mapping[str, float] | None = None,
    before: Sequence[tuple[str, Outcome]] = (),
) -> str:
    """All tables that there is something to say in, below each other; ``before`` is what was ``overtaken``."""
    tables = [
        comparison(title, tested, seeds, printed),
        sites(tested),
        ablation(tested),
        one_knob_changed(tested),
        other_values(tested, before),
        averaging(tested),
    ]
    return "\n\n".join(filter(None, tables))


def comparison(
    title: str, tested: Mapping[str, Outcome], seeds: Sequence[int], printed: Mapping[str, float] | None = None
) -> str:
    """A line for each contender with its own knobs, with ``missing`` where it has not been run.

    Args:
        title: Of the table.
        tested: Contender -> what is known of it; one of them is ``BASELINE``.
        seeds: That it is to be run with.
        printed: Contender -> accuracy that a paper prints, for a column of its own; those not compared here get a line.
    """
    by_accuracy = judged_by_accuracy(tested)
    answered = any(row.get("rouge_l") is not None for row in done(tested))
    columns = [
        "method", measure_of(by_accuracy), "minus FedAvg", "FC-MoE plus as shipped, minus it", "last round",
        "ROUGE-L, minus FedAvg's" if answered else "loss, minus FedAvg's", ROUNDS, "MB", "expert growth", "tuned",
    ]  # fmt: skip
    blank = [""] * (len(columns) - 2)
    lines = {}
    baseline, ours = tested[BASELINE].rows, tested[OURS].rows if OURS in tested else {}
    for name, result in _methods(tested).items():
        cells = (
            [*_cells(result, baseline, ours, by_accuracy), _tuned(name, result)] if result.rows else ["missing", *blank]
        )
        lines[name] = [titled(name, result, len(seeds)), *cells]
    if printed:
        columns.append("printed, %")
        lines |= {name: [CONTENDERS[name].title, "not compared", *blank] for name in printed if name not in lines}
        for name, cells in lines.items():
            cells.append(f"{100 * printed[name]:.1f}" if name in printed else "")
    return f"{title}, {len(seeds)} seeds\n\n{as_table(columns, lines.values())}"


def summary(title: str, tested: Mapping[str, Outcome]) -> str:
    """The project's README in short: who of ``SUMMARISED`` has been run, and what counts first."""
    compared = {name: tested[name] for name in SUMMARISED if name in tested and good(tested[name].rows)}
    if BASELINE not in compared:
        return ""
    by_accuracy = judged_by_accuracy(compared)
    columns = ["method", measure_of(by_accuracy), "minus FedAvg", "sites: mean / worst / spread", ROUNDS]
    lines, most = [], _most(compared)
    for name, result in compared.items():
        mean, difference, _, _, _, rounds, *_ = _cells(result, compared[BASELINE].rows, {}, by_accuracy)
        found = (mean_told(values, digits_of(by_accuracy)) for values in on_sites(result.rows, by_accuracy))
        lines.append([titled(name, result, most), mean, difference, " / ".join(found), rounds])
    return f"{title}, {most} seeds\n\n{as_table(columns, lines)}"


def sites(tested: Mapping[str, Outcome]) -> str:
    """Of the model in use at each site on its own data: mean and worst of the sites, and how they differ."""
    by_accuracy = judged_by_accuracy(tested)
    digits, most, lines = digits_of(by_accuracy), _most(tested), []
    baseline = on_sites(tested[BASELINE].rows, by_accuracy)
    for name, result in _methods(tested).items():
        mean, worst, spread = on_sites(result.rows, by_accuracy)
        cells = [titled(name, result, most)]
        for values, others in ((mean, baseline[0]), (worst, baseline[1])):
            cells += [mean_told(values, digits), difference(values, others, digits) if name != BASELINE else ""]
        if spread:
            lines.append([*cells, mean_told(spread, digits)])
    if not lines:
        return ""
    columns = ["method", "mean of sites", "minus FedAvg", "worst site", "minus FedAvg", "spread over sites"]
    return f"On sites' own data, {'accuracy, %' if by_accuracy else 'loss, nats'}\n\n{as_table(columns, lines)}"


def ablation(tested: Mapping[str, Outcome]) -> str:
    """What is left of FC-MoE without one of its parts; empty if nothing was left out."""
    measured, num_seeds = ablated(tested)
    if not any(name.startswith("fc_moe_no_") for name in measured):
        return ""
    lines = []
    for name, found in measured.items():
        pairs = zip(found, measured.get(_FULL, ({}, {})), strict=True)
        minus = (difference(values, of_full, 4) for values, of_full in pairs if name != _FULL)
        lines.append([variant(name), both_told(found), " / ".join(filter(None, minus))])
    return as_table(["variant", f"test / local, {num_seeds} seeds", "minus full"], lines)


def ablated(tested: Mapping[str, Outcome]) -> tuple[dict[str, tuple[BySeed, BySeed]], int]:
    """Variant -> shares of all test data, and of the sites' own, that are right; and by how many seeds.

    Over the seeds that all variants have been run with, of those that have been run at all.
    """
    compared = [name for name in ABLATION if name in tested]
    done = [set(good(tested[name].rows)) for name in compared if good(tested[name].rows)]
    common = set.intersection(*done) if done else set()
    measured = {}
    for name in compared:
        rows = {seed: row for seed, row in good(tested[name].rows).items() if seed in common and row["accuracy"]}
        test = {seed: last_rounds(row["accuracy"]) for seed, row in rows.items()}
        measured[name] = test, {seed: float(np.mean(list(row["sites"].values()))) for seed, row in rows.items()}
    return measured, len(common)


def variant(name: str) -> str:
    """What it is called beside the others that lack a part."""
    return _TITLES.get(name, CONTENDERS[name].title)


def both_told(found: tuple[BySeed, BySeed]) -> str:
    """Both means with their intervals."""
    return " / ".join(mean_told(values, 4) for values in found if values) or "missing"


def one_knob_changed(tested: Mapping[str, Outcome]) -> str:
    """Those who differ from their leader in one value, beside it: is it flat there? Empty if there are none."""
    leaders = [CONTENDERS[name].follows for name in tested if CONTENDERS[name].instead]
    return "\n\n".join(_around(leader, tested) for leader in dict.fromkeys(filter(None, leaders)))


def _around(leader: str, tested: Mapping[str, Outcome]) -> str:
    followers = [name for name in tested if CONTENDERS[name].follows == leader and CONTENDERS[name].instead]
    by_accuracy = judged_by_accuracy(tested)
    digits = digits_of(by_accuracy)
    as_tuned, most = results(tested[leader].rows, by_accuracy), _most(tested)
    lines = []
    for name in [leader, *followers]:
        is_leader = name == leader
        title = f"as tuned: {_tuned(leader, tested[leader])}" if is_leader else titled(name, tested[name], most)
        values = results(tested[name].rows, by_accuracy)
        failed = len(tested[name].rows) - len(values)
        same_seeds = {seed: as_tuned[seed] for seed in values if seed in as_tuned}
        beside = ["", ""] if is_leader else [mean_told(same_seeds, digits), difference(values, as_tuned, digits)]
        lines.append([title, summed_up(values, digits, failed), *beside])
    columns = ["value", measure_of(by_accuracy), "as tuned, same seeds", "minus as tuned"]
    return f"{leader}: one knob changed\n\n{as_table(columns, lines)}"


def other_values(tested: Mapping[str, Outcome], before: Sequence[tuple[str, Outcome]]) -> str:
    """What was tested of contenders with other values than they stand at; empty if nothing was."""
    by_accuracy = judged_by_accuracy(tested)
    digits, lines = digits_of(by_accuracy), []
    for name, result in before:
        values = results(result.rows, by_accuracy)
        minus = difference(values, results(tested[name].rows, by_accuracy), digits)
        told = summed_up(values, digits, len(result.rows) - len(values))
        contender = CONTENDERS[name]
        title = f"{contender.follows}: {contender.title}" if contender.instead else contender.title
        lines.append([title, _tuned(name, result), str(len(result.rows)), told, minus])
    if not lines:
        return ""
    table = as_table(["method", "values", "seeds", measure_of(by_accuracy), "minus it as it stands"], lines)
    return f"Tested with other values than those that stand now\n\n{table}"


def averaging(tested: Mapping[str, Outcome]) -> str:
    """What the rules did to experts, mean over the runs that measured it; empty if none did."""
    lines, most = [], _most(tested)
    for name, result in _methods(tested).items():
        runs = [row.get("averaging") or {} for row in good(result.rows).values()]
        found = [run for run in runs if run.get("kept") is not None]
        if found:
            cells = (_of_runs(measure, [run.get(measure) for run in found]) for measure in _DIGITS)
            lines.append([titled(name, result, most), *cells])
    if not lines:
        return ""
    table = as_table(["method", *(MEASURES[measure] for measure in _DIGITS)], lines)
    return f"What aggregation did to experts, mean over rounds, experts and runs (step: median of the runs)\n\n{table}"


def _of_runs(measure: str, values: Sequence[float | None]) -> str:
    """Their mean; of the step, which is in lengths of a mean update that may be next to nothing, their median."""
    known = [value for value in values if value is not None]
    if measure == "step" and known:
        return mean_of_known([float(np.median(known))], _DIGITS[measure])
    return mean_of_known(values, _DIGITS[measure])


def _most(tested: Mapping[str, Outcome]) -> int:
    """Seeds of who has been run with most."""
    return max(len(result.rows) for result in tested.values())


def _methods(tested: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """All but those who differ from their leader in one value: they have a table of their own."""
    return {name: result for name, result in tested.items() if not CONTENDERS[name].instead}


def _cells(result: Outcome, baseline: Mapping[int, Row], ours: Mapping[int, Row], by_accuracy: bool) -> list[str]:
    rows = good(result.rows)
    if not rows:
        return ["diverged"] + [""] * 7
    curve, scale = ("accuracy", 100) if by_accuracy else ("loss", 1)
    digits = digits_of(by_accuracy)
    values = results(rows, by_accuracy)
    is_baseline = result.rows is baseline
    compared_to = {} if is_baseline else baseline
    return [
        summed_up(values, digits, failed=len(result.rows) - len(rows)),
        difference(values, results(baseline, by_accuracy), digits) if not is_baseline else "",
        difference(results(ours, by_accuracy), values, digits) if result.rows is not ours else "",
        mean_of_known([scale * row[curve][-1] for row in rows.values()], digits),
        _rouge(rows, compared_to) if _rouge_by_seed(rows) else _loss(rows, compared_to),
        rounds_told(result.rows, baseline, by_accuracy),
        mean_of_known([row["bytes"] / 1e6 for row in rows.values()], 1),
        mean_of_known([growth(row) for row in rows.values()], 2, before="x "),
    ]


def _loss(rows: Mapping[int, Row], baseline: Mapping[int, Row]) -> str:
    """Mean, and what it is beside the baseline's, paired by seed."""
    own = results(rows, by_accuracy=False)
    paired = difference(own, results(baseline, by_accuracy=False), 3)
    return ", ".join(filter(None, [f"{np.mean(list(own.values())):.3f}", paired]))


def _rouge(rows: Mapping[int, Row], baseline: Mapping[int, Row]) -> str:
    """Mean with its interval, and what it is beside the baseline's, paired by seed."""
    own = _rouge_by_seed(rows)
    return ", ".join(filter(None, [mean_told(own, 3), difference(own, _rouge_by_seed(baseline), 3)]))


def _rouge_by_seed(rows: Mapping[int, Row]) -> BySeed:
    return {seed: row["rouge_l"] for seed, row in good(rows).items() if row.get("rouge_l") is not None}


def _tuned(name: str, result: Outcome) -> str:
    """The tuned values, without group choices; ``(end)`` behind one beyond which nothing was tried."""
    knobs = {knob.key: knob for knob in (LEARNING_RATE, *led(CONTENDERS[name], CONTENDERS)[0].knobs)}
    told = []
    for key, _, value in (word.partition("=") for word in result.settings):
        if key in _TUNED:
            grid = knobs[key].values if key in knobs else ()
            # From 0 to 1 is all that most of them can be.
            at_end = len(grid) > 1 and float(value) in {grid[0], grid[-1]} - {0.0, 1.0}
            short = key.replace("train.learning_rate", "lr").removeprefix("strategy.")
            told.append(f"{short}={value}" + (" (end)" if at_end else ""))
    return ", ".join(told)


_TUNED = {LEARNING_RATE.key} | {knob.key for contender in CONTENDERS.values() for knob in contender.knobs}
