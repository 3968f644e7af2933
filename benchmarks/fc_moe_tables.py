"""From the cells of ``benchmarks.fc_moe`` to its tables: means, intervals, differences paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from benchmarks.cells import Outcome, Row
from benchmarks.contenders import CONTENDERS, Settings
from benchmarks.fc_moe_averaging import MEASURES
from benchmarks.fc_moe_printed import ABLATION
from server.intervals import with_interval

LAST = 5
"""Rounds at the end whose mean is what counts."""
BASELINE = "fedavg"
OURS = "fc_moe_plus"
SUMMARISED = ("fedavg", "fedavg_step", "fedavgm", "fedalign_moe", "fc_moe", "fc_moe_plus", "local_only", "centralised")

_DIGITS = {
    "kept": 2, "negative": 3, "pairs": 3, "step": 2, "factor": 4, "largest_weight": 2, "largest_share": 2
}  # fmt: skip
_TITLES = {"fc_moe": "full"}


def last_rounds(curve: Sequence[float]) -> float:
    """Mean of the last rounds of a curve."""
    return float(np.mean(curve[-LAST:]))


def rounds_to(curve: Sequence[float], target: float, *, higher: bool) -> int | None:
    """First round, from 1, at which the curve is as good as ``target``; None if it never is."""
    reached = [value >= target if higher else value <= target for value in curve]
    return reached.index(True) + 1 if any(reached) else None


def markdown(
    title: str, tested: Mapping[str, Outcome], seeds: Sequence[int], printed: Mapping[str, float] | None = None
) -> str:
    """All tables that there is something to say in, below each other."""
    tables = [
        comparison(title, tested, seeds, printed),
        ablation(tested),
        one_knob_changed(tested),
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
    by_accuracy = _by_accuracy(tested)
    answered = any(row.get("rouge_l") for row in _done(tested))
    columns = [
        "method", _measure(tested), "minus FedAvg", "FC-MoE plus minus it", "last round",
        *(["ROUGE-L"] if answered else ["loss"]), "on sites' own data: mean / worst / spread",
        "rounds to FedAvg's end", "MB", "expert norm", "tuned",
    ]  # fmt: skip
    blank = [""] * (len(columns) - 2)
    lines = {}
    baseline, ours = tested[BASELINE].rows, tested[OURS].rows if OURS in tested else {}
    compared = {name: result for name, result in tested.items() if not CONTENDERS[name].instead}
    for name, result in compared.items():
        cells = _cells(result, baseline, ours, by_accuracy) if result.rows else ["missing", *blank]
        count = f" ({len(result.rows)} of {len(seeds)} seeds)" if 0 < len(result.rows) < len(seeds) else ""
        lines[name] = [CONTENDERS[name].title + count, *cells]
    if printed:
        columns.append("printed, %")
        lines |= {name: [CONTENDERS[name].title, "not compared", *blank] for name in printed if name not in lines}
        for name, cells in lines.items():
            cells.append(f"{100 * printed[name]:.1f}" if name in printed else "")
    return f"{title}, {len(seeds)} seeds\n\n{_table(columns, lines.values())}"


def summary(title: str, tested: Mapping[str, Outcome]) -> str:
    """The project's README in short: who of ``SUMMARISED`` has been run, and what counts first."""
    compared = {name: tested[name] for name in SUMMARISED if name in tested and _good(tested[name].rows)}
    if BASELINE not in compared:
        return ""
    by_accuracy = _by_accuracy(compared)
    columns = ["method", _measure(compared), "minus FedAvg", "sites: mean / worst / spread", "rounds to FedAvg's end"]
    lines = []
    for name, result in compared.items():
        mean, difference, _, _, _, on_sites, rounds, *_ = _cells(result, compared[BASELINE].rows, {}, by_accuracy)
        lines.append([CONTENDERS[name].title, mean, difference, on_sites, rounds])
    counts = sorted({len(result.rows) for result in compared.values()})
    seeds = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return f"{title}, {seeds} seeds\n\n{_table(columns, lines)}"


def ablation(tested: Mapping[str, Outcome]) -> str:
    """The paper's Table II: here and as printed, global / on the sites' own data; empty if nothing was left out.

    Over the seeds that all variants have been run with, of those that have been run at all.
    """
    compared = [name for name in ABLATION if name in tested]
    if not any(name.startswith("fc_moe_no_") for name in compared):
        return ""
    lines = []
    done = [set(_good(tested[name].rows)) for name in compared if _good(tested[name].rows)]
    common = set.intersection(*done) if done else set()
    for name in compared:
        rows = {seed: row for seed, row in _good(tested[name].rows).items() if seed in common}
        ours = "missing"
        if rows and all(row["accuracy"] for row in rows.values()):
            test = [last_rounds(row["accuracy"]) for row in rows.values()]
            local = [float(np.mean(list(row["sites"].values()))) for row in rows.values()]
            ours = f"{with_interval(test, 4)} / {with_interval(local, 4)}"
        lines.append([_TITLES.get(name, CONTENDERS[name].title), ours, *ABLATION[name]])
    return _table(["variant", f"here: test / local, {len(common)} seeds", "printed, AG News", "printed, MMLU"], lines)


def one_knob_changed(tested: Mapping[str, Outcome]) -> str:
    """Those who differ from their leader in one value, beside it: is it flat there? Empty if there are none."""
    leaders = [CONTENDERS[name].follows for name in tested if CONTENDERS[name].instead]
    return "\n\n".join(_around(leader, tested) for leader in dict.fromkeys(filter(None, leaders)))


def _around(leader: str, tested: Mapping[str, Outcome]) -> str:
    followers = [name for name in tested if CONTENDERS[name].follows == leader and CONTENDERS[name].instead]
    by_accuracy = _by_accuracy(tested)
    digits = 1 if by_accuracy else 3
    as_tuned = _values(tested[leader].rows, by_accuracy)
    lines = []
    for name in [leader, *followers]:
        title = f"as tuned: {_tuned(tested[leader].settings)}" if name == leader else CONTENDERS[name].title
        values = _values(tested[name].rows, by_accuracy)
        differences = [value - as_tuned[seed] for seed, value in values.items() if seed in as_tuned]
        failed = len(tested[name].rows) - len(values)
        lines.append([
            title,
            _summary(list(values.values()), digits, failed),
            with_interval(differences, digits, sign="+") if differences and name != leader else "",
        ])  # fmt: skip
    return f"{leader}: one knob changed\n\n{_table(['value', _measure(tested), 'minus as tuned'], lines)}"


def averaging(tested: Mapping[str, Outcome]) -> str:
    """What the rules did to experts, mean over the runs that measured it; empty if none did."""
    lines = []
    for name, result in tested.items():
        runs = [row.get("averaging") or {} for row in _good(result.rows).values()]
        found = [run for run in runs if run.get("kept") is not None]
        if found and not CONTENDERS[name].instead:
            cells = (_mean_of([run[measure] for run in found], digits) for measure, digits in _DIGITS.items())
            lines.append([CONTENDERS[name].title, *cells])
    if not lines:
        return ""
    table = _table(["method", *(MEASURES[measure] for measure in _DIGITS)], lines)
    return f"What aggregation did to experts, mean over rounds, experts and runs\n\n{table}"


def _mean_of(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else ""


def _done(tested: Mapping[str, Outcome]) -> list[Row]:
    return [row for result in tested.values() for row in _good(result.rows).values()]


def _by_accuracy(tested: Mapping[str, Outcome]) -> bool:
    return any(row["accuracy"] for row in _done(tested))


def _measure(tested: Mapping[str, Outcome]) -> str:
    return "test accuracy, %" if _by_accuracy(tested) else "test loss, nats"


def _values(rows: Mapping[int, Row], by_accuracy: bool) -> dict[int, float]:
    """Seed -> what counts, in percent or nats, of the runs that did not diverge."""
    curve, scale = ("accuracy", 100) if by_accuracy else ("loss", 1)
    return {seed: scale * last_rounds(row[curve]) for seed, row in _good(rows).items()}


def _summary(values: Sequence[float], digits: int, failed: int) -> str:
    if not values:
        return "diverged" if failed else "missing"
    return with_interval(values, digits) + (f" ({failed} diverged)" if failed else "")


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *lines])


def _cells(result: Outcome, baseline: Mapping[int, Row], ours: Mapping[int, Row], by_accuracy: bool) -> list[str]:
    rows = _good(result.rows)
    if not rows:
        return ["diverged"] + [""] * 8 + [_tuned(result.settings)]
    curve = "accuracy" if by_accuracy else "loss"
    scale, digits = (100, 1) if by_accuracy else (1, 3)
    values = _values(rows, by_accuracy)
    final = np.mean([scale * row[curve][-1] for row in rows.values()])
    failed = len(result.rows) - len(rows)
    return [
        _summary(list(values.values()), digits, failed),
        _difference(values, _values(baseline, by_accuracy), digits) if result.rows is not baseline else "",
        _difference(_values(ours, by_accuracy), values, digits) if result.rows is not ours else "",
        f"{final:.{digits}f}",
        _rouge(rows) if any(row.get("rouge_l") for row in rows.values()) else _loss(rows),
        _on_sites(rows, by_accuracy, scale, digits),
        _rounds(rows, _good(baseline), curve, higher=by_accuracy),
        f"{np.mean([row['bytes'] for row in rows.values()]) / 1e6:.1f}",
        _norm_growth(rows),
        _tuned(result.settings),
    ]


def _difference(values: Mapping[int, float], others: Mapping[int, float], digits: int) -> str:
    """Of the one to the other, paired by seed."""
    differences = [value - others[seed] for seed, value in values.items() if seed in others]
    return with_interval(differences, digits, sign="+") if differences else ""


def _norm_growth(rows: Mapping[int, Row]) -> str:
    """Of experts trained in full: LoRA's factors tell nothing of their product, which is 0 at the start."""
    if any(row["experts"] == "lora" for row in rows.values()):
        return ""
    return f"x {np.mean([row['expert_norm'][1] / row['expert_norm'][0] for row in rows.values()]):.2f}"


def _loss(rows: Mapping[int, Row]) -> str:
    return f"{np.mean([last_rounds(row['loss']) for row in rows.values()]):.3f}"


def _rouge(rows: Mapping[int, Row]) -> str:
    return with_interval([row["rouge_l"] for row in rows.values()], 3)


def _good(rows: Mapping[int, Row]) -> dict[int, Row]:
    return {seed: row for seed, row in rows.items() if "failed" not in row}


def _on_sites(rows: Mapping[int, Row], by_accuracy: bool, scale: float, digits: int) -> str:
    """Mean, worst and standard deviation over the sites, each averaged over the seeds."""
    sites = [scale * np.array(list(row["sites"].values())) for row in rows.values()]
    worst = [values.min() if by_accuracy else values.max() for values in sites]
    measured = ([values.mean() for values in sites], worst, [values.std() for values in sites])
    return " / ".join(f"{np.mean(found):.{digits}f}" for found in measured)


def _rounds(rows: Mapping[int, Row], baseline: Mapping[int, Row], curve: str, *, higher: bool) -> str:
    """Mean over the seeds that get there, and how many do."""
    needed = [
        rounds_to(row[curve], last_rounds(baseline[seed][curve]), higher=higher)
        for seed, row in rows.items()
        if seed in baseline
    ]
    reached = [count for count in needed if count is not None]
    if not reached:
        return f"never (0 of {len(needed)})"
    return f"{np.mean(reached):.1f}" + (f" ({len(reached)} of {len(needed)})" if len(reached) < len(needed) else "")


def _tuned(settings: Settings) -> str:
    """The tuned values, without group choices."""
    own = [word for word in settings if word.partition("=")[0] in _TUNED]
    return ", ".join(word.replace("train.learning_rate", "lr").removeprefix("strategy.") for word in own)


_TUNED = {"train.learning_rate"} | {knob.key for contender in CONTENDERS.values() for knob in contender.knobs}
