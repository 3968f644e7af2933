"""One site's part in a run, without Flower: train on its own data, evaluate on it, remember what is private."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, cached_property

from client.evaluation.examination import EvalSet, ModelInUse, held_out_set
from client.evaluation.held_out import HeldOutLoss, held_out_loss
from client.methods import method_for
from client.model import AdaptedModel, adapted_model
from client.private import PrivateStore, under
from client.runtime import configure_torch
from client.text import Example, TokenSequence
from client.training import TrainingResult, train
from conf.model import RouterTraining
from conf.schema import Config
from conf.seeds import generator_for
from strategies.adapters import Arrays
from strategies.base import ClientUpdate
from strategies.experts import is_router_array

POOLED = "*pooled*"
"""Key of a held-out set that is no site's own: that of all sites together."""

_OWN = "own/"
_OPTIMIZER = "optimizer/"


def is_shared(name: str, config: Config) -> bool:
    """Whether the trained array ``name`` travels between site and server; all others stay at the site."""
    if config.model.router is RouterTraining.local and is_router_array(name):
        return False
    return method_for(config.method).shares(name)


def shared_arrays(adapter: Arrays, config: Config) -> Arrays:
    """The part of ``adapter`` that is exchanged; of ``AdaptedModel.initial_adapter``, the server's first adapter."""
    return {name: array for name, array in adapter.items() if is_shared(name, config)}


class Site:
    """A data owner in a run. Everything it must not forget is in its store, so a new object goes on where it stopped.

    Sites of one process may share ``adapted``: each loads its own adapter before it computes.
    """

    def __init__(
        self,
        name: str,
        train_examples: Sequence[Example],
        held_out: Mapping[str, Sequence[Example]],
        *,
        adapted: AdaptedModel,
        config: Config,
        store: PrivateStore,
        other_sets: Mapping[str, EvalSet] | None = None,
    ) -> None:
        """Keep what the site works with; texts are encoded when they are first needed.

        Args:
            name: Stable name of the data owner.
            train_examples: Its training data.
            held_out: Sets to evaluate on: its own under its name; a centralised run has one for each original
                site; in simulation there may be ``POOLED``.
            adapted: The model, with an adapter of any value.
            config: The run's settings.
            store: The site's private store in this run.
            other_sets: Sets besides, for the evaluation matrix (``client.evaluation.examination``); only in simulation.
        """
        self.name = name
        self.adapted = adapted
        self.config = config
        self.store = store
        self.method = method_for(config.method)
        self._train_examples = train_examples
        self._held_out_examples = held_out
        self.own_sets = {on: held_out_set(examples, config) for on, examples in held_out.items() if on != POOLED}
        self.other_sets = other_sets or {}

    @property
    def num_examples(self) -> int:
        """Training examples the site holds."""
        return len(self._train_examples)

    def train(
        self,
        server_round: int,
        received: Arrays,
        broadcast: Arrays | None = None,
        *,
        evaluate_own: bool = False,
        fix_shared: bool = False,
    ) -> ClientUpdate:
        """Train locally from the global adapter; the update holds what is shared and nothing else.

        ``broadcast`` is what the strategy sends beside the adapter (``Strategy.broadcast``); None: nothing. With
        ``fix_shared`` only what is not shared is trained.

        Its metrics are train_loss (nats per response token), num_tokens (response tokens trained on), num_steps,
        micro_batch, train_seconds, those of ``client.throughput.Throughput`` and of the method's rule and, with
        ``evaluate_own``, own_loss: that of the site's adapter just trained on its held-out data (in a centralised run,
        on all sites').

        The store is written last: a round that fails leaves it as it was. A round that is asked for again, since its
        reply was lost, starts from what the store held before it.

        Raises:
            ValueError: If ``received`` is not the shared part of this model's adapter, the store cannot be used, there
                is nothing to train or evaluate on, or training diverges.
        """
        private = self.store.load(before_round=server_round)
        start_of_round, metrics = self._begun(self._completed(received, private), private)
        rule = self.method.local_rule(self.adapted, broadcast or {}, private)
        with self.adapted.fixed(received if fix_shared else ()):
            result = train(
                self.adapted,
                self._train_sequences,
                start=self.method.start(start_of_round, private),
                anchor={} if fix_shared else received,
                optimizer=under(_OPTIMIZER, private),
                config=self.config.train,
                generator=generator_for(self.config.seed, "train", server_round, self.name),
                rule=rule,
                passes=self.method.passes_over(self._train_sequences),
            )
        metrics |= {**_metrics(result), **rule.metrics()}
        if evaluate_own:
            metrics["own_loss"] = self._own_loss(result.adapter)
        shared = shared_arrays(result.adapter, self.config)
        own = {_OWN + name: array for name, array in result.adapter.items() if name not in shared}
        optimizer = {_OPTIMIZER + name: array for name, array in result.optimizer.items()}
        private = {**own, **optimizer, **self.method.remember(start_of_round, result.adapter), **rule.to_keep()}
        if private:
            self.store.save(private, server_round)
        return ClientUpdate(
            site=self.name,
            adapter=shared,
            num_examples=sum(len(sequence.lengths) for sequence in self._train_sequences),
            # Counts weigh what is shared; a site that shares nothing does not tell how its text was routed.
            expert_tokens=result.expert_tokens if shared else {},
            extras=rule.to_send(),
            metrics=metrics,
        )

    def evaluate(self, received: Arrays) -> dict[str, HeldOutLoss]:
        """Loss on each held-out set of the model in use at this site, and what the method measures besides.

        That is the global adapter, completed with the site's own value of whatever is not shared: all of it, under a
        personal method. A method may use more than one adapter (``Method.evaluator``).

        Raises:
            ValueError: If ``received`` is not the shared part of this model's adapter, the store cannot be used, or a
                held-out set is empty.
        """
        using = self.using(received)
        loss = self.method.evaluator(*using)
        adapted, adapter, *_, size = using
        return {
            name: replace(loss(sequences), metrics=self.method.measures(adapted, adapter, sequences, size))
            for name, sequences in self._held_out_sequences.items()
        }

    def in_use(self, received: Arrays) -> ModelInUse:
        """The model in use at this site, for any sequences of prompts and responses.

        Raises:
            ValueError: If ``received`` is not the shared part of this model's adapter, or the store cannot be used.
        """
        using = self.using(received)
        return ModelInUse(self.method.evaluator(*using), cache(lambda: self.method.generator(*using)))

    def using(
        self, received: Arrays
    ) -> tuple[AdaptedModel, Arrays, Arrays, Callable[[], Sequence[TokenSequence]], int]:
        """What ``Method.evaluator`` and ``Method.generator`` are given; sets torch's switches.

        Raises:
            ValueError: If ``received`` is not the shared part of this model's adapter, or the store cannot be used.
        """
        configure_torch(self.config.train)
        private = self.store.load()
        adapter = self._completed(received, private)
        return (
            self._with_rank_of(adapter), adapter, private, lambda: self._train_sequences, self.config.eval.batch_size
        )  # fmt: skip

    def adapter_in_use(self, received: Arrays) -> Arrays:
        """The global adapter, completed with the site's own value of whatever is not shared.

        Raises:
            ValueError: If ``received`` is not the shared part of this model's adapter, or the store cannot be used.
        """
        return self._completed(received, self.store.load())

    def _with_rank_of(self, adapter: Arrays) -> AdaptedModel:
        """The model, or the same with room for a personal adapter of a higher rank (CLAIR, refined_rank=exact)."""
        lora = self.config.lora
        ranks = {array.shape[-2] for name, array in adapter.items() if name.endswith(".lora_A")}
        if len(ranks) != 1 or ranks == {lora.rank}:
            return self.adapted
        rank = ranks.pop()
        wider = replace(lora, rank=rank, alpha=lora.alpha * rank / lora.rank)
        return adapted_model(self.config.model, wider, self.adapted.device, self.method.graft)

    def _begun(self, adapter: Arrays, private: Arrays) -> tuple[Arrays, dict[str, float]]:
        """The adapter, before the site's first round with what the method makes of it; and metrics of that."""
        if under(_OWN, private):
            return adapter, {}
        generator = generator_for(self.config.seed, "begin", self.name)
        batch_size = self.config.eval.batch_size
        begun = self.method.begin(self.adapted, adapter, self._train_sequences, generator, batch_size)
        if begun.note:
            self.store.note(self.config.method.name, begun.note)
        return begun.adapter, dict(begun.metrics)

    def _own_loss(self, trained: Arrays) -> float:
        own = [sequences for name, sequences in self._held_out_sequences.items() if name != POOLED]
        joined = list(itertools.chain.from_iterable(own))
        return held_out_loss(self.adapted, trained, joined, self.config.eval.batch_size).loss

    def _completed(self, received: Arrays, private: Arrays) -> Arrays:
        """``received`` with the site's own value of every array not shared: its last, or the run's initial one."""
        names = self.adapted.array_names
        expected = {name for name in names if is_shared(name, self.config)}
        if received.keys() != expected:
            differing = sorted(received.keys() ^ expected)[:4]
            raise ValueError(f"site {self.name!r} received arrays other than the shared ones: {differing}")
        if len(expected) == len(names):
            return received
        own = under(_OWN, private) or self.adapted.initial_adapter(self.config.seed)
        return {name: received[name] if name in expected else own[name] for name in names}

    @cached_property
    def _train_sequences(self) -> Sequence[TokenSequence]:
        return self.method.encode(self._train_examples, self.adapted.tokenizer, self.config.data)

    @cached_property
    def _held_out_sequences(self) -> dict[str, Sequence[TokenSequence]]:
        return {
            name: self.method.encode(examples, self.adapted.tokenizer, self.config.data)
            for name, examples in self._held_out_examples.items()
        }


def _metrics(result: TrainingResult) -> dict[str, float]:
    return {
        "train_loss": result.loss,
        "num_tokens": float(result.num_tokens),
        "num_steps": float(result.num_steps),
        "micro_batch": float(result.micro_batch),
        "train_seconds": result.seconds,
        **{name: float(value) for name, value in asdict(result.throughput).items()},
    }
