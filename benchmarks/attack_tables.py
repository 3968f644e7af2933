"""The tables of the attack bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NO_ATTACK = "none"
DIFFERENT = "honest but different"
HARM_LOSS = 0.02
"""An attack does harm that leaves the undefended benign loss more than this share above the attack-free run's."""
HARM_SUCCESS = 0.1
"""Or whose backdoor answers this share of triggered prompts more than the attack-free run does."""
PROMISED_UP_TO = 0.3

Run = Mapping[str, Any]


def rows(results: Mapping[str, Any]) -> str:
    """What each defence does against the attacks that do harm; then every attack, a table for each fraction."""
    runs = results["runs"]
    sites, seeds = results["sites"], len({run["seed"] for run in runs})
    attacked = [run for run in runs if run["attack"] != DIFFERENT]
    lines = [
        f"{sites} sites, {seeds} seeds. An attack does harm (*) at a fraction if the undefended benign loss ends more "
        f"than {HARM_LOSS:.0%} above that of the attack-free run, or {HARM_SUCCESS:.0%} more of the triggered prompts "
        "get the backdoor's answer.",
        "",
        *_summary(attacked, [run for run in runs if run["attack"] in {NO_ATTACK, DIFFERENT}]),
    ]
    for fraction in sorted({run["fraction"] for run in attacked}):
        lines += _table(f"{sites} sites, {fraction:.0%} contaminated", _at(attacked, fraction=fraction))
    lines += _table(f"{sites} sites, nobody attacks, a tenth is {DIFFERENT}", _at(runs, attack=DIFFERENT))
    return "\n".join(lines) + "\n"


def does_harm(undefended: Sequence[Run]) -> bool:
    """Whether an attack does harm, from its runs without a defence at one fraction."""
    success = [run["success"] - run["clean_success"] for run in undefended if "success" in run]
    return _loss_change(undefended) > HARM_LOSS or bool(success and np.mean(success) >= HARM_SUCCESS)


def harmful(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Attacks and fractions that do harm."""
    cells = sorted({(run["fraction"], run["attack"]) for run in runs if run["attack"] != NO_ATTACK})
    return [(a, f) for f, a in cells if does_harm(_at(runs, attack=a, fraction=f, defence="none"))]


def _summary(attacked: Sequence[Run], peaceful: Sequence[Run]) -> list[str]:
    cells = harmful(attacked)
    parts = {
        f"up to {PROMISED_UP_TO:.0%}": [cell for cell in cells if cell[1] <= PROMISED_UP_TO],
        "beyond": [cell for cell in cells if cell[1] > PROMISED_UP_TO],
    }
    lines = []
    for told, chosen in parts.items():
        if not chosen:
            continue
        names = ", ".join(f"{a} at {f:.0%}" for a, f in chosen)
        lines += [
            f"Against the {len(chosen)} that do harm {told} ({names}):",
            "",
            "| defence | recall | lowest | false alarms | benign loss, mean | worst | false alarms without attack |",
            "|---|---|---|---|---|---|---|",
        ]
        for defence in dict.fromkeys(run["defence"] for run in attacked):
            of_cells = [_at(attacked, attack=a, fraction=f, defence=defence) for a, f in chosen]
            changes = [100 * _loss_change(runs) for runs in of_cells]
            recalls = [_mean(runs, "recall") for runs in of_cells]
            flat = [run for runs in of_cells for run in runs]
            lines.append(
                f"| {defence} | {_shown(_mean(flat, 'recall'))} | {_shown(min(recalls))} | "
                f"{_shown(_mean(flat, 'false_alarms'))} | {np.mean(changes):+.1f} % | {max(changes):+.1f} % | "
                f"{_shown(_mean(_at(peaceful, defence=defence), 'false_alarms'))} |"
            )
        lines.append("")
    return lines


def _table(title: str, runs: Sequence[Run]) -> list[str]:
    if not runs:
        return []
    defences = list(dict.fromkeys(run["defence"] for run in runs))
    marked = {attack for attack, _ in harmful(runs)}
    lines = [
        f"{title}: benign loss against attack-free FedAvg, percent; (recall / false alarms) where sites are left out; "
        "success of the backdoor in brackets.",
        "",
        f"| attack | {' | '.join(defences)} |",
        "|---" * (len(defences) + 1) + "|",
    ]
    for attack in dict.fromkeys(run["attack"] for run in runs):
        cells = [_cell(_at(runs, attack=attack, defence=name)) for name in defences]
        lines.append(f"| {attack}{' *' * (attack in marked)} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(runs: Sequence[Run]) -> str:
    text = f"{100 * _loss_change(runs):+.1f}"
    if "false_alarms" in runs[0]:
        text += f" ({_shown(_mean(runs, 'recall'))} / {_shown(_mean(runs, 'false_alarms'))})"
    if "success" in runs[0]:
        text += f" [{_shown(_mean(runs, 'success'))}]"
    return text


def _at(runs: Sequence[Run], **wanted: Any) -> list[Run]:
    return [run for run in runs if all(run[key] == value for key, value in wanted.items())]


def _loss_change(runs: Sequence[Run]) -> float:
    """Mean over seeds of the benign loss over that of the attack-free run, minus 1."""
    return float(np.mean([run["loss"] / run["clean_loss"] - 1 for run in runs]))


def _mean(runs: Sequence[Run], key: str) -> float:
    """Mean of what there is of it; nan if nothing."""
    values = [run[key] for run in runs if run.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"
