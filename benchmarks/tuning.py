"""How what a method needs is found on validation data: knobs, who shares them, and the search over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

Settings = tuple[str, ...]
"""Overrides, key=value."""
PASSES = 2
"""How often all knobs are gone through at most."""


@dataclass(frozen=True)
class Knob:
    """A setting that is tuned: uphill from ``start``, one value at a time, until both neighbours are worse."""

    key: str
    values: tuple[float, ...]
    start: float
    unsaid: float | None = None
    """Value that settings leave out, since it changes nothing: its runs are those without the knob. None: no value."""
    second_start: float | None = None
    """Where the way uphill begins besides; the better of the two ends counts."""


LEARNING_RATE = Knob(
    "train.learning_rate", (6.25e-5, 1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), 4e-3
)
"""Tuned for every method."""
LEARNING_RATE_BY_LOSS = replace(LEARNING_RATE, second_start=5e-4)
"""Where loss is what counts: it has a second valley at low rates, which learn nothing by heart."""


@dataclass(frozen=True)
class Contender:
    """A method under comparison."""

    title: str
    settings: Settings
    knobs: tuple[Knob, ...] = ()
    """Its own, beside the learning rate."""
    follows: str | None = None
    """Name of the contender whose tuned values it takes."""
    retunes: tuple[str, ...] = ()
    """Keys of those values that it tunes again for itself, uphill from the leader's: the others stay."""
    instead: Mapping[str, float | str] = field(default_factory=dict)
    """Values in place of those tuned, of knobs or any other setting: how flat the leader is around its own."""
    of_factors: bool = False
    """Whether it is about LoRA's factors: there is nothing to compare where experts are trained in full."""


@dataclass(frozen=True)
class Tuning:
    """How far a contender's tuning is."""

    settings: Settings
    """The best so far; the end if nothing is missing."""
    missing: tuple[Settings, ...]
    """Settings whose scores are needed to go on."""


def tuned(
    name: str,
    score: Callable[[Settings], float | None],
    contenders: Mapping[str, Contender],
    learning_rate: Knob = LEARNING_RATE,
) -> Tuning:
    """Coordinate search: learning rate first, then each knob of the method, and all again with those values.

    Args:
        name: Of the contender; one that follows another gets its own settings with the other's tuned values, and from
            there searches over what it ``retunes``. Whom it follows may follow somebody too.
        score: Of settings on validation data, higher is better; None if not known yet.
        contenders: All of them.
        learning_rate: How it is tuned.
    """
    leader, *followers = led(contenders[name], contenders)
    knobs = (learning_rate, *leader.knobs)
    values = {knob.key: knob.start for knob in knobs}
    for whose in (leader, *followers):
        settings_of = partial(_settings, whose, knobs)
        free = [knob for knob in knobs if whose is leader or knob.key in whose.retunes]
        missing = _search(free, values, settings_of, score)
        if missing:
            return Tuning(settings_of(values), missing)
    return Tuning(_settings(contenders[name], knobs, values), ())


def led(contender: Contender, contenders: Mapping[str, Contender]) -> list[Contender]:
    """Whom it follows, whom that one follows in turn before it, and itself at the end."""
    before = led(contenders[contender.follows], contenders) if contender.follows else []
    return [*before, contender]


def _search(
    knobs: Sequence[Knob],
    values: dict[str, float],
    settings_of: Callable[[Mapping[str, float]], Settings],
    score: Callable[[Settings], float | None],
) -> tuple[Settings, ...]:
    """Move ``values`` to where no knob alone makes them better; settings whose score is needed for that."""
    for _ in range(PASSES):
        before = dict(values)
        for knob in knobs:
            missing = _best_end(knob, values, lambda trial: score(settings_of(trial)))
            if missing:
                return tuple(map(settings_of, missing))
        if values == before:
            break
    return ()


def _best_end(
    knob: Knob, values: dict[str, float], score: Callable[[Mapping[str, float]], float | None]
) -> list[dict[str, float]]:
    """Move ``values[knob.key]`` to the best value that a way uphill leads to; values whose score is needed for that."""
    starts = [values[knob.key], *([] if knob.second_start is None else [knob.second_start])]
    ends = [values | {knob.key: start} for start in starts]
    missing = [trial for end in ends for trial in _climb(knob, end, score)]
    if not missing:
        values |= ends[int(np.argmax(np.array([score(end) for end in ends], np.float64)))]  # the first of equals
    return list({trial[knob.key]: trial for trial in missing}.values())


def _climb(
    knob: Knob, values: dict[str, float], score: Callable[[Mapping[str, float]], float | None]
) -> list[dict[str, float]]:
    """Move ``values[knob.key]`` to where both neighbours are no better; values whose score is needed for that."""
    while True:
        place = knob.values.index(values[knob.key])
        near = [knob.values[place], *knob.values[max(0, place - 1) : place], *knob.values[place + 1 : place + 2]]
        trials = [values | {knob.key: value} for value in near]
        scores = [score(trial) for trial in trials]
        missing = [trial for trial, found in zip(trials, scores, strict=True) if found is None]
        if missing:
            return missing
        best = near[int(np.argmax(np.array(scores, np.float64)))]  # the first of equals: where it stands
        if best == values[knob.key]:
            return []
        values[knob.key] = best


def _settings(contender: Contender, knobs: Sequence[Knob], values: Mapping[str, float]) -> Settings:
    unsaid = {knob.key: knob.unsaid for knob in knobs}
    chosen = {**values, **contender.instead}
    said = {key: value for key, value in sorted(chosen.items()) if value != unsaid.get(key)}
    return (*contender.settings, *words_of(said))


def words_of(values: Mapping[str, float | str]) -> list[str]:
    """Overrides that say these values."""
    return [f"{key}={value}" if isinstance(value, str) else f"{key}={value:g}" for key, value in values.items()]
