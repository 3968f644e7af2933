"""What a run with several objectives did: rewards, the sites' weights, disagreement, KL; and fronts over runs.

Sites name their numbers ``reward/OBJECTIVE``, ``lambda/OBJECTIVE`` and ``kl`` (of their own samples while training) and
``held_out_reward/OBJECTIVE`` and ``held_out_kl`` (of the global model); under DPO ``held_out_accuracy/OBJECTIVE``.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from server.intervals import rounded_with_interval
from server.pareto import hypervolume

Series = Mapping[int, float]
"""Round -> value."""


@dataclass(frozen=True)
class Gauge:
    """What says how well an objective is met; higher is better."""

    title: str
    told: str
    """What is shown, as the beginning of a sentence."""
    kl: str | None
    """The sites' name for the KL measured beside it."""


GAUGES = {
    "held_out_reward": Gauge("Reward", "Rewards and KL of the global model on held-out prompts", "held_out_kl"),
    "reward": Gauge("Reward", "Rewards and KL of the sites' own samples while they train", "kl"),
    "held_out_accuracy": Gauge("Ranked right", "Share of held-out pairs that the global model ranks right", None),
}
"""The sites' name for it; the first that a run has counts."""

_MARGIN = 0.1
"""How far below the worst reward the reference of hypervolumes lies, in parts of the range."""


@dataclass(frozen=True)
class Alignment:
    """One run, over its rounds."""

    objectives: tuple[str, ...]
    preference: str
    """Of the run, for people."""
    gauge: Gauge
    rewards: Mapping[str, Series]
    """Objective -> mean over the sites."""
    kl: Series
    """Mean over the sites, nats of a completion or token as the method measures it."""
    weights: Mapping[str, Mapping[str, Series]]
    """Site -> objective -> its mean weight in the round; empty where sites do not tell."""
    disagreement: Series
    """Mean squared distance of the sites' weights to their mean."""
    drift: Series
    """Mean squared distance of the sites' adapters to their mean."""

    @property
    def ends(self) -> tuple[float, ...]:
        """The last reward of each objective."""
        return tuple(series[max(series)] for series in self.rewards.values())


def alignment_of(rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Alignment | None:
    """From a run's rows of metrics and its settings; None if its sites told of no objective."""
    sites = [row for row in rows if row.get("type") == "site"]
    keys = list(dict.fromkeys(key for row in sites for key in row))
    name = next((name for name in GAUGES if any(key.startswith(f"{name}/") for key in keys)), None)
    if name is None:
        return None
    gauge = GAUGES[name]
    told = [key.partition("/")[2] for key in keys if key.startswith(f"{name}/")]
    method = settings.get("method", {})
    named = [each.partition(":")[0] for each in method.get("rewards") or method.get("objectives") or ()]
    objectives = tuple(one for one in dict.fromkeys([*named, *told]) if one in told)  # as preferences are given
    weights = {
        site: {one: _of_site(sites, site, f"lambda/{one}") for one in objectives}
        for site in sorted({str(row["site"]) for row in sites if f"lambda/{objectives[0]}" in row})
    }
    return Alignment(
        objectives=objectives,
        preference=_told_preference(method),
        gauge=gauge,
        rewards={one: _mean_over_sites(sites, f"{name}/{one}") for one in objectives},
        kl=_mean_over_sites(sites, gauge.kl) if gauge.kl else {},
        weights=weights,
        disagreement=_disagreement(weights),
        drift={row["round"]: row["drift"] for row in rows if row.get("drift") is not None},
    )


def _told_preference(method: Mapping[str, Any]) -> str:
    preference = method.get("preference")
    told = " : ".join(f"{share:g}" for share in preference) if preference else "equal"
    sites = method.get("site_preferences")
    return f"{told}; {len(sites)} site{'s' * (len(sites) > 1)} otherwise" if sites else told


def settings_of(config_yaml: str) -> Mapping[str, Any]:
    """A run's ``config.yaml``; empty if there is none."""
    return yaml.safe_load(config_yaml) or {}


def _of_site(sites: Sequence[Mapping[str, Any]], site: str, key: str) -> Series:
    return {row["round"]: row[key] for row in sites if row["site"] == site and key in row}


def _mean_over_sites(sites: Sequence[Mapping[str, Any]], key: str) -> Series:
    found: dict[int, list[float]] = defaultdict(list)
    for row in sites:
        if key in row:
            found[row["round"]].append(row[key])
    return {number: float(np.mean(values)) for number, values in sorted(found.items())}


def _disagreement(weights: Mapping[str, Mapping[str, Series]]) -> Series:
    """Over the sites that took part in each round."""
    found: dict[int, list[list[float]]] = defaultdict(list)
    for of_site in weights.values():
        for number in next(iter(of_site.values())):
            found[number].append([series[number] for series in of_site.values()])
    return {
        number: float(((np.array(rows) - np.mean(rows, axis=0)) ** 2).sum(axis=1).mean())
        for number, rows in sorted(found.items())
    }


@dataclass(frozen=True)
class Front:
    """Runs that differ in preference and seed only, by their last rewards."""

    label: str
    """What sets its settings apart from the other fronts'."""
    runs: tuple[int, ...]
    """Places in the list of runs."""
    points_NM: NDArray[np.float64]
    seeds_N: NDArray[np.int64]
    """Of each run: runs of one seed make a front, which those of another do not add to."""
    hypervolumes: tuple[float, ...]
    """Of each seed that has run with as many preferences as any, and the same ones, above a reference point that all
    fronts share: below the worst reward of any run by a tenth of the range."""

    num_preferences: int
    """That each of these seeds has run with: hypervolumes of more points are larger."""

    @property
    def hypervolume(self) -> str:
        """Mean over seeds, with its 95 % interval (Student's t)."""
        return rounded_with_interval(self.hypervolumes, 4)


def fronts(runs: Sequence[tuple[Mapping[str, Any], Alignment | None]]) -> list[Front]:
    """Fronts of runs (settings, alignment) with the first aligned run's objectives, measured like its own."""
    measured = [(found.objectives, found.gauge) if found else None for _, found in runs]
    first = next(filter(None, measured), None)
    chosen = {index: found for index, (_, found) in enumerate(runs) if found and measured[index] == first}
    if not chosen:
        return []
    groups: dict[str, list[int]] = defaultdict(list)
    for index in chosen:
        groups[json.dumps(_without_preference(runs[index][0]), sort_keys=True)].append(index)
    ends = np.array([found.ends for found in chosen.values()])
    span = np.ptp(ends, axis=0)
    reference = ends.min(axis=0) - _MARGIN * np.where(span > 0, span, 1.0)
    made = []
    for label, members in zip(_labels([json.loads(key) for key in groups]), groups.values(), strict=True):
        points = np.array([chosen[index].ends for index in members])
        seeds = np.array([int(runs[index][0].get("seed", 0)) for index in members])
        wishes = [_preference_of(runs[index][0]) for index in members]
        volumes, num_preferences = _hypervolumes(points, seeds, wishes, reference)
        made.append(Front(label, tuple(members), points, seeds, volumes, num_preferences))
    return made


def _hypervolumes(
    points_NM: NDArray[np.float64],
    seeds_N: NDArray[np.int64],
    wishes_N: Sequence[str],
    reference_M: NDArray[np.float64],
) -> tuple[tuple[float, ...], int]:
    """Of the seeds that have run with as many preferences as any, and the same ones as the first of them; how many."""
    wishes = {seed: {wish for wish, of in zip(wishes_N, seeds_N, strict=True) if of == seed} for seed in set(seeds_N)}
    most = max(map(len, wishes.values()))
    whole = next(wishes[seed] for seed in sorted(wishes) if len(wishes[seed]) == most)
    alike = [seed for seed in sorted(wishes) if wishes[seed] == whole]
    return tuple(hypervolume(points_NM[seeds_N == seed], reference_M) for seed in alike), most


_PREFERENCES = ("method.preference", "method.site_preferences")


def _preference_of(settings: Mapping[str, Any]) -> str:
    flat = _flat(settings)
    return json.dumps([flat.get(key) for key in _PREFERENCES])


def _without_preference(settings: Mapping[str, Any]) -> dict[str, Any]:
    apart = {*_PREFERENCES, "seed", "output"}
    return {key: value for key, value in _flat(settings).items() if key not in apart}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _labels(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which the groups differ; of groups alike in all, nothing."""
    names = sorted({name for group in groups for name in group})
    differing = [name for name in names if len({json.dumps(group.get(name)) for group in groups}) > 1]
    return [" ".join(f"{name}={group[name]}" for name in differing if name in group) for group in groups]
