"""A screen in front of any strategy: contaminated sites are found first, the strategy works on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import numpy as np

from strategies.adapters import Arrays
from strategies.base import Aggregation, ClientUpdate, Strategy, require
from strategies.collaborative_set import MIN_SITES, Vote
from strategies.expert_exclusion import Expert, as_told, counted_less
from strategies.expert_rounds import check_expert_tokens
from strategies.inspection import inspect, rejected_experts, report_experts, vote
from strategies.shared_subspace import SubspaceConfig
from strategies.update_distance import compare

_STATE = "screen/"


class ScreenKind(Enum):
    """By what sites are judged before aggregation."""

    off = "off"
    clair = "clair"
    """By CLAIR's shared row space."""


class OnReject(Enum):
    """What happens to the update of a rejected site, and to a rejected expert of an accepted one."""

    exclude = "exclude"
    downweight = "downweight"
    """Its examples and expert tokens count ``screen.weight`` of what they are."""
    warn = "warn"
    """Nothing: the verdict is reported."""


class Evidence(Enum):
    """What can speak against a site; one kind is enough."""

    subspace = "subspace"
    """CLAIR: it keeps outside the shared row space of most LoRA matrices."""
    distance = "distance"
    """Its update as a whole lies far from those of most sites."""
    copies = "copies"
    """Its update is that of another site."""


@dataclass(kw_only=True)
class ScreenConfig:
    """Who is judged by what before aggregation, and what follows."""

    kind: ScreenKind = ScreenKind.off
    evidence: list[Evidence] = field(default_factory=lambda: list(Evidence))
    on_reject: OnReject = OnReject.exclude
    weight: float = 0.1
    """Share of a rejected site's examples and tokens that counts under ``on_reject=downweight``."""
    forgive_after: int = 1
    """Clean rounds in a row that a rejected site sits out before it is accepted; 0 judges each round by itself."""
    pinned: list[str] = field(default_factory=list)
    """Sites that are always accepted; their verdicts are reported all the same."""
    banned: list[str] = field(default_factory=list)
    """Sites that are always excluded, before anything is computed from what they sent."""
    single_experts: bool = True
    """Whether ``on_reject`` also holds for single experts of accepted sites, if an expert's matrices reject
    the site. Of each round by itself: history and forgiveness are a site's."""
    subspace: SubspaceConfig = field(default_factory=SubspaceConfig)

    def __post_init__(self) -> None:
        require(bool(self.evidence), "screen.evidence", "a list of at least one kind", self.evidence)
        require(0 < self.weight < 1, "screen.weight", "in (0, 1)", self.weight)
        require(self.forgive_after >= 0, "screen.forgive_after", ">= 0", self.forgive_after)
        both = sorted(set(self.pinned) & set(self.banned))
        require(not both, "screen.banned", "disjoint from screen.pinned", both)


@dataclass(frozen=True, kw_only=True)
class SiteVerdict:
    """Whether a site's update is used as it is, and why."""

    rejected: bool
    reason: str
    """For people."""
    is_clean: bool
    """Whether nothing speaks against this round's update, as far as it was looked at."""
    found: Vote | None
    """What this round's matrices say; None for a banned site."""
    waiting: int
    """Clean rounds it must still pass before it is accepted, at most ``forgive_after``. Rounds with too few sites to
    judge anybody do not count."""
    times_rejected: int
    """Rounds in which its update was found contaminated, this one included."""
    experts: Mapping[Expert, Vote] = field(default_factory=dict)
    """Of an accepted site: experts that are judged by themselves to be contaminated."""


@dataclass(kw_only=True)
class Screened(Strategy):
    """Any strategy behind a screen, itself a strategy: verdicts first, then the inner rule on what is left.

    CLAIR's verdict (2026, Eq. 8, https://arxiv.org/abs/2605.21217) is that of the matrices on a site as a whole. What
    it cannot see is added, see ``update_distance``. The history of rejected sites is part of the state.
    """

    inner: Strategy
    screen: ScreenConfig

    def init_state(self, adapter: Arrays) -> Arrays:
        """That of the inner strategy; sites enter the history when they are first rejected.

        Raises:
            ValueError: If there is no LoRA pair to judge sites by.
        """
        if not any(name.endswith(".lora_A") for name in adapter):
            raise ValueError("screen=clair needs LoRA: set model.experts=lora or lora.attention=true, or screen=off")
        return self.inner.init_state(adapter)

    def broadcast(self, state: Arrays) -> Arrays:
        """As the inner strategy does."""
        return self.inner.broadcast(_inner_state(state))

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """As the inner strategy does; and raise ``ValueError`` if not the tokens of every expert are counted."""
        self.inner.check_update(adapter, update)
        check_expert_tokens(adapter, update)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """The inner strategy's aggregation of the updates that pass.

        A round in which only sites took part that were rejected before changes nothing.

        Diagnostics: those of the inner strategy; ``verdicts`` of the sites; ``matrices``, see ``Inspected.report``.

        Raises:
            ValueError: If no update is left because of what was found in this round.
        """
        verdicts, matrices = self.judge(adapter, state, updates)
        trusted = self.trusted(adapter, updates, verdicts)
        if trusted:
            result = self.inner.aggregate(adapter, _inner_state(state), trusted)
        elif all(verdict.is_clean for verdict in verdicts.values()):
            result = Aggregation(adapter=dict(adapter), state=_inner_state(state))
        else:
            told = "; ".join(f"{site}: {verdict.reason}" for site, verdict in verdicts.items())
            raise ValueError(f"screen={self.screen.kind.name} leaves no update ({told})")
        return replace(
            result,
            state={**result.state, **_remembered(_history(state), verdicts)},
            diagnostics={**result.diagnostics, "verdicts": _report(verdicts), "matrices": matrices},
        )

    def judge(
        self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]
    ) -> tuple[dict[str, SiteVerdict], dict[str, Any]]:
        """Site -> verdict of this round; and label -> ``Inspected.report`` of each matrix."""
        judged = [update for update in updates if update.site not in self.screen.banned]
        sites = [update.site for update in judged]
        inspected = inspect(adapter, judged, self.screen.subspace)
        votes = vote(sites, inspected, self.screen.subspace)
        reasons = self._reasons(adapter, judged, votes)
        verdicts = {update.site: self._verdict(update.site, votes, reasons, _history(state)) for update in updates}
        if self.screen.single_experts and Evidence.subspace in self.screen.evidence:
            verdicts = self._with_experts(verdicts, rejected_experts(sites, inspected, self.screen.subspace))
        return verdicts, {matrix.label: matrix.report(sites) for matrix in inspected}

    def trusted(
        self, adapter: Arrays, updates: Sequence[ClientUpdate], verdicts: Mapping[str, SiteVerdict]
    ) -> list[ClientUpdate]:
        """What the inner strategy gets to see: accepted sites, without their rejected experts, as the policy says."""
        passed = []
        for update in updates:
            if not verdicts[update.site].rejected:
                passed.append(update)
            elif update.site in self.screen.banned or self.screen.on_reject is OnReject.exclude:
                continue
            elif self.screen.on_reject is OnReject.downweight:
                passed.append(_downweighted(update, self.screen.weight))
            else:
                passed.append(update)
        if self.screen.on_reject is OnReject.warn:
            return passed
        passed = [as_told(adapter, update) for update in passed]
        rejected: dict[Expert, set[str]] = {}
        for site, verdict in verdicts.items():
            for expert in verdict.experts:
                rejected.setdefault(expert, set()).add(site)
        weight = self.screen.weight if self.screen.on_reject is OnReject.downweight else 0.0
        return counted_less(adapter, passed, rejected, weight)

    def _reasons(
        self, adapter: Arrays, judged: Sequence[ClientUpdate], votes: Mapping[str, Vote]
    ) -> dict[str, list[str]]:
        """Site -> what speaks against it in this round; empty if it is clean."""
        reasons: dict[str, list[str]] = {update.site: [] for update in judged}
        if Evidence.subspace in self.screen.evidence:
            for site, found in votes.items():
                reasons[site] += [found.reason] if found.rejected else []
        rule = self.screen.subspace
        for compared in compare(adapter, judged, agreement=rule.agreement, min_gap=rule.min_gap):
            verdict = compared.verdict
            for k, update in enumerate(judged):
                if Evidence.distance in self.screen.evidence and not verdict.accepted[k]:
                    ratio = verdict.distances[k] / verdict.threshold
                    reasons[update.site].append(f"{compared.kind} at {ratio:.1f} times the distance of the others")
                if Evidence.copies in self.screen.evidence and compared.is_copy[k]:
                    reasons[update.site].append(f"{compared.kind} are those of another site")
        return reasons

    def _verdict(
        self, site: str, votes: Mapping[str, Vote], reasons: Mapping[str, Sequence[str]], history: Arrays
    ) -> SiteVerdict:
        """This round's evidence, seen in the light of the site's history and the names in the settings."""
        waiting, times = (int(value) for value in history.get(_STATE + site, np.zeros(2)))
        if site in self.screen.banned:
            return SiteVerdict(
                rejected=True, reason="banned", is_clean=True, found=None, waiting=waiting, times_rejected=times
            )
        found = votes[site]
        is_clean = not reasons[site]
        passed = is_clean and self._is_judged(votes, found)
        reason = "; ".join(reasons[site]) or found.reason
        if is_clean and waiting:
            reason += f", but rejected before: {waiting} more clean rounds are needed"
        if site in self.screen.pinned:
            reason += "; pinned"
        return SiteVerdict(
            rejected=not (is_clean and not waiting) and site not in self.screen.pinned,
            reason=reason,
            is_clean=is_clean,
            found=found,
            waiting=max(0, waiting - passed) if is_clean else self.screen.forgive_after,
            times_rejected=times + (not is_clean),
        )

    def _is_judged(self, votes: Mapping[str, Vote], found: Vote) -> bool:
        """Whether any evidence could have spoken against the site of this vote."""
        evidence = set(self.screen.evidence)
        by_matrices = Evidence.subspace in evidence and found.judged > 0
        return by_matrices or (len(votes) >= MIN_SITES and evidence != {Evidence.subspace})

    def _with_experts(
        self, verdicts: Mapping[str, SiteVerdict], rejected: Mapping[str, Mapping[Expert, Vote]]
    ) -> dict[str, SiteVerdict]:
        """The verdicts with the rejected experts of sites that are accepted and not pinned."""
        spared = {site for site, verdict in verdicts.items() if verdict.rejected or site in self.screen.pinned}
        return {
            site: verdict if site in spared else replace(verdict, experts=rejected[site])
            for site, verdict in verdicts.items()
        }


def screened(strategy: Strategy, screen: ScreenConfig) -> Strategy:
    """The strategy behind the screen that the settings ask for."""
    return strategy if screen.kind is ScreenKind.off else Screened(inner=strategy, screen=screen)


def _history(state: Arrays) -> Arrays:
    return {name: array for name, array in state.items() if name.startswith(_STATE)}


def _inner_state(state: Arrays) -> Arrays:
    return {name: array for name, array in state.items() if not name.startswith(_STATE)}


def _downweighted(update: ClientUpdate, weight: float) -> ClientUpdate:
    tokens = {layer: counts * weight for layer, counts in update.expert_tokens.items()}
    return replace(update, num_examples=weight * update.num_examples, expert_tokens=tokens)


def _remembered(history: Arrays, verdicts: Mapping[str, SiteVerdict]) -> Arrays:
    """Site -> (clean rounds still needed, times rejected), of every site that was ever rejected."""
    entries = {
        _STATE + site: np.array([verdict.waiting, verdict.times_rejected], np.float64)
        for site, verdict in verdicts.items()
        if verdict.times_rejected
    }
    return {**history, **entries}


def _report(verdicts: Mapping[str, SiteVerdict]) -> dict[str, Any]:
    """Verdicts as JSON values, with what ``Vote.report`` says of the round."""
    return {
        site: {
            **({} if verdict.found is None else verdict.found.report()),
            "rejected": verdict.rejected,
            "reason": verdict.reason,
            "clean_rounds_needed": verdict.waiting,
            "times_rejected": verdict.times_rejected,
            "experts": report_experts(verdict.experts),
        }
        for site, verdict in verdicts.items()
    }
