"""The rounds of a run: the one subclass of Flower's Strategy, around one of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy

from client.evaluation.held_out import HeldOutLoss
from client.evaluation.measured import Measured
from client.messages import (
    EVALUATE,
    TRAIN,
    decode_losses,
    decode_measured,
    decode_update,
    encode_request,
    payload_bytes,
)
from client.records import to_arrays, to_record
from client.site import POOLED
from conf.check import needed_sites, num_asked
from conf.schema import Config, Mode
from server.exchange import Exchange, send
from server.record import RunRecord, told
from server.roster import Roster
from server.round_record import RoundRecord, sample_sites
from strategies.adapters import Arrays, check_finite, check_size, spread
from strategies.base import ClientUpdate
from strategies.diagnostics import bytes_by_kind, round_diagnostics
from strategies.low_rank import aggregation_gap
from strategies.screen import ScreenKind, screened


class FederatedRounds(FlowerStrategy):
    """Runs any of our strategies inside Flower, and judges every reply by itself.

    After ``start``: ``adapter`` is the global adapter, ``losses`` each site's held-out loss of the last evaluation,
    ``last_global_loss`` that of the global model, ``rounds_done`` the rounds completed, ``measured`` what the sites
    tell for the evaluation matrix.
    """

    def __init__(
        self,
        config: Config,
        roster: Roster,
        record: RunRecord,
        global_loss: Callable[[Arrays], float] | None,
        num_experts: Mapping[str, int],
    ) -> None:
        """Keep what the rounds need.

        Args:
            config: The run's settings.
            roster: Who may take part.
            record: Where metrics go.
            global_loss: Held-out loss (nats per response token) of a global adapter on the server's own data;
                None if it has none: then the example-weighted mean over the sites stands in.
            num_experts: MoE layer -> number of the model's experts in it.
        """
        self.config = config
        self.strategy = screened(config.strategy, config.screen)
        self.roster = roster
        self.record = record
        self.global_loss = global_loss
        self._num_experts = dict(num_experts)
        self.adapter: Arrays = {}
        self.state: Arrays = {}
        self.personal: Mapping[str, Arrays] = {}
        self.losses: dict[str, float] = {}
        self.last_global_loss: float | None = None
        self.bytes_up = self.bytes_down = self.rounds_done = 0
        self.measured: dict[str, Measured] = {}
        self._round = RoundRecord(0)
        self._exchange: Exchange | None = None

    def start(  # noqa: D102, PLR0917 - Flower's loop, with our exchange; its configs and evaluate_fn are not used
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        self.summary()
        self.adapter = to_arrays(initial_arrays)
        self.state = self.strategy.init_state(self.adapter)
        none = train_config or ConfigRecord()
        self._measure_start()
        for server_round in range(1, num_rounds + 1):
            self._round = RoundRecord(server_round)
            self.roster.wait_until(grid, self._enough, self.config.federation.join_timeout_seconds)
            exchange = self._send(grid, self.configure_train(server_round, initial_arrays, none, grid), timeout)
            self.aggregate_train(server_round, exchange.replies())
            if self._evaluation_due(server_round):
                exchange = self._send(grid, self.configure_evaluate(server_round, initial_arrays, none, grid), timeout)
                if self.global_loss is not None:  # computed while the sites compute theirs
                    self._round.global_loss = self.global_loss(self.adapter)
                self.aggregate_evaluate(server_round, exchange.replies())
            self._finish_round()
        if num_rounds and not self.losses:
            raise RuntimeError(f"round {num_rounds}: no site could be evaluated ({self._reasons()})")
        return Result(arrays=to_record(self.adapter))

    def _enough(self, connected: int) -> bool:
        return num_asked(self.config, connected) >= needed_sites(self.config)

    def configure_train(  # noqa: D102
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        sampled = sample_sites(self.roster.present(grid), self.config, server_round)
        return self._requests(TRAIN, sampled)

    def configure_evaluate(  # noqa: D102
        self,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        return self._requests(EVALUATE, self.roster.present(grid))

    def aggregate_train(  # noqa: D102
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        updates: list[ClientUpdate] = []
        for node, reply in self._received(replies):
            try:
                sender, update = decode_update(reply)
                self.roster.check_sender(node, sender)
                self.strategy.check_update(self.adapter, update)
            except ValueError as error:
                self._drop(node, str(error))
            else:
                updates.append(update)
                self._round.bytes_by_kind["up"] += bytes_by_kind(update.adapter, update.extras)
                row = self._round.site(update.site) | {"num_examples": update.num_examples}
                # A site's metrics must not overwrite what we measured ourselves.
                self._round.sites[update.site] = {**update.metrics, **row}
        if len(updates) < needed_sites(self.config):
            raise RuntimeError(
                f"round {server_round}: {len(updates)} good replies, federation.min_sites="
                f"{needed_sites(self.config)} are needed ({self._reasons()})"
            )
        self._aggregate(sorted(updates, key=lambda update: update.site))
        return to_record(self.adapter), None

    def aggregate_evaluate(  # noqa: D102
        self,
        server_round: int,
        replies: Iterable[Message],
    ) -> MetricRecord | None:
        losses: dict[str, HeldOutLoss] = {}
        pooled: list[float] = []
        for node, reply in self._received(replies):
            try:
                sender, answer = decode_losses(reply)
                measured = decode_measured(reply)
                self.roster.check_sender(node, sender)
                self._check_measured(sender.site, answer)
                self._check_scored(sender.site, measured)
            except ValueError as error:
                self._drop(node, f"evaluation: {error}")
                continue
            if POOLED in answer:
                pooled.append(answer.pop(POOLED).loss)
            if measured is not None:
                self.measured[sender.site] = measured
            losses |= answer
        self.losses = {name: found.loss for name, found in losses.items()}
        for name, found in losses.items():
            # What a site measured must not overwrite what we did.
            self._round.sites[name] = {**found.metrics, **self._round.site(name), "loss": found.loss}
        if pooled:
            self._round.global_loss = float(np.mean(pooled))
        elif self._round.global_loss is None and losses:
            examples = [loss.num_examples for loss in losses.values()]
            self._round.global_loss = float(np.average([loss.loss for loss in losses.values()], weights=examples))
        self.last_global_loss = self._round.global_loss
        return None

    def summary(self) -> None:
        """Say what runs, for people."""
        self.record.event(f"{self.config.strategy.name} over {', '.join(sorted(self.roster.nodes))}")
        screen = self.config.screen
        for key in ("pinned", "banned"):
            strangers = sorted(set(getattr(screen, key)) - self.roster.nodes.keys())
            if strangers and screen.kind is not ScreenKind.off:
                self.record.event(f"screen.{key} names {', '.join(strangers)}: no such site has joined")

    def _check_measured(self, site: str, answer: Mapping[str, HeldOutLoss]) -> None:
        """Raise ``ValueError`` if a site speaks for others: only centralised training has the data of all."""
        own = {site, POOLED} if self.config.method.name == "local_only" else {site}
        if self.config.strategy.name != "centralised" and not answer.keys() <= own:
            raise ValueError(f"losses on the data of others: {sorted(answer.keys() - own)[:4]}")

    def _check_scored(self, site: str, measured: Measured | None) -> None:
        """Raise ``ValueError`` if a real site speaks of sets that it cannot have, or of experts that nobody has."""
        routed = {} if measured is None else {layer: len(use.shares) for layer, use in measured.routing.items()}
        if routed and routed != self._num_experts:
            raise ValueError(f"use of experts in {dict(sorted(routed.items())[:4])}, which are not the model's")
        sets = set() if measured is None else {each.on for each in measured.scores}
        if self.config.federation.mode is Mode.remote and not sets <= {site}:
            raise ValueError(f"scores on the data of others: {sorted(sets - {site})[:4]}")

    def _aggregate(self, updates: list[ClientUpdate]) -> None:
        try:
            aggregation = self.strategy.aggregate(self.adapter, self.state, updates)
            check_size(aggregation.adapter)
            check_finite(aggregation.state)
        except ValueError as error:
            place = f"round {self._round.server_round}: strategy={self.config.strategy.name}"
            raise RuntimeError(f"{place} got good replies, but no adapter out of them: {error}") from error
        gap = aggregation_gap([update.adapter for update in updates], [update.num_examples for update in updates])
        found = round_diagnostics(self.adapter, updates, aggregation, self.personal)
        own = {name: values for name, values in aggregation.diagnostics.items() if name != "experts"}
        self.record.diagnostics({"round": self._round.server_round, "aggregation_gap": gap, **own, **found})
        self.adapter, self.state = aggregation.adapter, aggregation.state
        self.personal = {**self.personal, **aggregation.personal}
        self._round.aggregation_gap = gap
        if any(key.startswith("reward/") for update in updates for key in update.metrics):
            self._round.drift = spread([update.adapter for update in updates])
        self._note_verdicts(aggregation.diagnostics.get("verdicts", {}))

    def _note_verdicts(self, verdicts: Mapping[str, Mapping[str, Any]]) -> None:
        """Put who was judged contaminated into the sites' rows, and say it for people."""
        for site, verdict in verdicts.items():
            self._round.site(site)["rejected"] = verdict["rejected"]
            if verdict["rejected"]:
                self.record.event(f"round {self._round.server_round}: {site} is rejected: {verdict['reason']}")

    def _evaluation_due(self, server_round: int) -> bool:
        return server_round % self.config.eval.every == 0 or server_round == self.config.rounds

    def _requests(self, kind: str, sites: Iterable[str]) -> list[Message]:
        server_round = self._round.server_round
        own = self._evaluation_due(server_round)
        matrix = kind == EVALUATE and self.config.eval.matrix and server_round == self.config.rounds
        request = replace(self.roster.request, server_round=server_round, evaluate_own=own, matrix=matrix)
        common = self.strategy.broadcast(self.state) if kind == TRAIN else {}
        records: dict[int, ArrayRecord] = {}  # most sites get the same arrays: written once
        requests = []
        for site in sites:
            sent = (self.personal.get(site, self.adapter), self.adapter if matrix and site in self.personal else common)
            self._round.bytes_by_kind["down"] += bytes_by_kind(*sent)
            adapter, broadcast = (records.get(id(arrays)) or to_record(arrays) for arrays in sent)
            records |= {id(arrays): record for arrays, record in zip(sent, (adapter, broadcast), strict=True)}
            requests.append(encode_request(kind, self.roster.nodes[site], request, adapter, broadcast))
        return requests

    def _send(self, grid: Grid, requests: Iterable[Message], timeout: float) -> Exchange:
        asked = list(requests)
        for request in asked:
            row = self._round.site(self.roster.name_of(request.metadata.dst_node_id))
            row["bytes_down"] += payload_bytes(request)
        self._exchange = send(grid, asked, timeout)
        return self._exchange

    def _received(self, replies: Iterable[Message]) -> list[tuple[int, Message]]:
        """Node id and reply in the order of the sites' names; bytes are counted and silent nodes noted."""
        assert self._exchange is not None
        silent = dict(self._exchange.asked)
        received = [(silent.pop(reply.metadata.reply_to_message_id), reply) for reply in replies]
        for node, reply in received:
            self._round.site(self.roster.name_of(node))["bytes_up"] += payload_bytes(reply)
        for message_id, node in silent.items():
            taken = message_id in self._exchange.taken
            waited = f"no reply within {self.config.federation.round_timeout_seconds:g} s"
            self._drop(node, waited if taken else "Flower could not store the message to it")
        return sorted(received, key=lambda entry: self.roster.name_of(entry[0]))

    def _reasons(self) -> str:
        """Why replies of this round were not used, for people."""
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(self._round.dropped.items()))
        return reasons or "no other site was asked"

    def _drop(self, node: int, reason: str) -> None:
        site, reason = self.roster.name_of(node), told(reason)
        reasons = [self._round.dropped[site], reason] if site in self._round.dropped else [reason]
        self._round.dropped[site] = self._round.site(site)["dropped"] = "; ".join(reasons)
        self.record.event(f"round {self._round.server_round}: dropped {site}: {reason}")

    def _measure_start(self) -> None:
        if self.global_loss is not None:
            self._round.global_loss = self.global_loss(self.adapter)
            self._finish_round()

    def _finish_round(self) -> None:
        for row in self._round.rows():
            self.record.row(row)
        self.bytes_up += self._round.total("bytes_up")
        self.bytes_down += self._round.total("bytes_down")
        self.rounds_done = self._round.server_round
