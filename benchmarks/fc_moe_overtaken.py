"""Settings that were tested and no longer stand, since a search went on or began elsewhere: nothing is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from benchmarks.cells import Outcome, Row
from benchmarks.contenders import CONTENDERS
from benchmarks.tuning import LEARNING_RATE, Settings, led, words_of


def overtaken(tested: Mapping[str, Outcome], rows: Iterable[Row]) -> list[tuple[str, Outcome]]:
    """Contender and what is known of it on test data with values of its knobs that it does not stand at now.

    Args:
        tested: Contender -> what is known of it as it stands.
        rows: All of the study.
    """
    stand = {result.settings for result in tested.values()}
    found: dict[Settings, dict[int, Row]] = {}
    for row in rows:
        settings = tuple(row["settings"])
        if row["split"] == "test" and settings not in stand:
            found.setdefault(settings, {})[row["seed"]] = row
    owners = ((_owner(settings, tested), Outcome(settings, by_seed)) for settings, by_seed in found.items())
    return sorted(((name, result) for name, result in owners if name), key=lambda each: (each[0], each[1].settings))


def _owner(settings: Settings, tested: Mapping[str, Outcome]) -> str | None:
    """Whose settings these are but for the values of knobs, of whom stands nearest; None if nobody's.

    Of two as near it is who has a value changed that its leader searches.
    """

    def distance(name: str) -> tuple[int, bool]:
        return len({*settings} - {*tested[name].settings}), not CONTENDERS[name].instead

    return min((name for name in tested if _is_of(settings, name)), key=distance, default=None)


def _is_of(settings: Settings, name: str) -> bool:
    contender = CONTENDERS[name]
    if settings[: len(contender.settings)] != contender.settings:
        return False
    said = {*settings[len(contender.settings) :]}
    if any(word.endswith("=null") for word in said):
        return False  # no value of a knob, but what makes another contender
    knobs = {LEARNING_RATE.key, *(knob.key for knob in led(contender, CONTENDERS)[0].knobs), *contender.instead}
    return {word.partition("=")[0] for word in said} <= knobs and {*words_of(contender.instead)} <= said
