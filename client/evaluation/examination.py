"""A site's part in the evaluation matrix: which of its models are tested on which sets, and how.

Every model is tested in the same way: by the loss and the answers of what is in use. That is the base with one adapter,
or what a method says (``Method.one_adapter``, ``.evaluator``, ``.generator``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from client.evaluation.choices import Question, accuracy, encoded, questions_of
from client.evaluation.expert_use import expert_use
from client.evaluation.generation import Generator, greedy, rouge_l
from client.evaluation.held_out import held_out_loss, nll_of_each
from client.evaluation.measured import BASE, GLOBAL, PERSONAL, Measured, RelativeCost, Score, Scored
from client.evaluation.relative_cost import relative_cost
from client.methods.base import Evaluator
from client.model import AdaptedModel
from client.text import Example, TokenSequence, encode, encode_prompts
from conf.schema import Config
from strategies.adapters import Arrays

if TYPE_CHECKING:
    from client.site import Site


@dataclass(frozen=True)
class EvalSet:
    """What a model is tested on; what there is none of is not measured."""

    examples: Sequence[Example] = ()
    """For loss and ROUGE-L."""
    questions: Sequence[Question] = ()
    """For accuracy."""


@dataclass(frozen=True)
class ModelInUse:
    """A model as it is used: what a response costs it, and what it answers itself."""

    loss: Evaluator
    generator: Callable[[], Generator]
    """Makes what answers; a method may have to fit something first."""
    each: Callable[[Sequence[TokenSequence]], Sequence[float]] | None = None
    """Loss of each sequence; None: there is ``loss`` alone, which tells the mean."""

    def losses(self, sequences: Sequence[TokenSequence]) -> Sequence[float]:
        """Loss of each sequence, if need be one pass for each."""
        return [self.loss([one]).loss for one in sequences] if self.each is None else self.each(sequences)


def held_out_set(examples: Sequence[Example], config: Config) -> EvalSet:
    """Held-out examples as a test, with questions if ``eval.options`` says what a response may be."""
    return EvalSet(examples, questions_of(examples, config.eval.options))


def one_adapter(adapted: AdaptedModel, adapter: Arrays, config: Config) -> ModelInUse:
    """The base model with this adapter and nothing else."""
    size = config.eval.batch_size

    def each(sequences: Sequence[TokenSequence]) -> list[float]:
        nll = nll_of_each(adapted, adapter, sequences, size)
        return [total / sequence.num_targets for total, sequence in zip(nll, sequences, strict=True)]

    return ModelInUse(
        partial(held_out_loss, adapted, adapter, batch_size=size),
        lambda: partial(greedy, adapted, adapter, batch_size=size),
        each,
    )


def score(model: ModelInUse, name: str, on: EvalSet, adapted: AdaptedModel, config: Config) -> Score:
    """The model on the set ``name``: loss of all examples, ROUGE-L of the first ``eval.num_answers``, accuracy.

    The latter is of all questions that the tokenizer leaves answerable; of a set without any there is none.

    Raises:
        ValueError: If no example fits ``data.max_length``.
    """
    found: dict[str, float] = {}
    if on.examples:
        loss = model.loss(encode(on.examples, adapted.tokenizer, config.data))
        found |= {"loss": loss.loss, "num_tokens": loss.num_tokens, "num_examples": loss.num_examples}
    if on.examples and config.eval.num_answers:
        close, count = answered(model, on.examples, adapted, config)
        found |= {"rouge_l": close, "num_answers": count}
    if questions := encoded(name, on.questions, adapted.tokenizer, config.data):
        found |= {"accuracy": accuracy(model.losses, questions), "num_questions": len(questions)}
    return Score(**found)  # type: ignore[arg-type]


def answered(
    model: ModelInUse, examples: Sequence[Example], adapted: AdaptedModel, config: Config
) -> tuple[float, int]:
    """ROUGE-L of the model's answers to the first ``eval.num_answers`` examples, and how many there are."""
    chosen = examples[: config.eval.num_answers]
    prompts = encode_prompts(chosen, adapted.tokenizer, config.data)
    tokens = model.generator()(prompts, config.eval.max_new_tokens)
    answers = adapted.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return rouge_l(answers, [example.response for example in chosen]), len(chosen)


def scored(
    name: str, model: ModelInUse, sets: Mapping[str, EvalSet], adapted: AdaptedModel, config: Config
) -> Iterable[Scored]:
    """The model called ``name`` on each of the sets."""
    for on, evaluated in sets.items():
        yield Scored(model=name, on=on, score=score(model, on, evaluated, adapted, config))


def examine(site: Site, received: Arrays, global_adapter: Arrays) -> Measured:
    """The base and the global model on the sets that are the site's own, and the model in use on all that it has.

    The latter only where it is another than the global one; how it uses its experts is told anyway (where a method
    mixes two adapters, how the one exchanged does). All sets are more than the site's own in simulation alone, where
    the other sites' data lie on the same machine.

    Args:
        site: The site, after its last round.
        received: What the server sent it last.
        global_adapter: What it would have sent a site that gets nothing of its own.

    Raises:
        ValueError: As ``Site.evaluate``.
    """
    adapted, config = site.adapted, site.config
    initial = adapted.initial_adapter(config.seed)
    everyones = {**initial, **global_adapter}
    plain = one_adapter(adapted, everyones, config)
    found = [*scored(BASE, one_adapter(adapted, initial, config), site.own_sets, adapted, config)]
    if not site.method.personal:
        found += scored(GLOBAL, plain, site.own_sets, adapted, config)
    cost = None
    if _is_another(site, received, everyones):
        in_use = _in_use(site, received)
        found += scored(PERSONAL, in_use, {**site.own_sets, **site.other_sets}, adapted, config)
        cost = _cost(site, in_use, plain)
    adapted, adapter, *_ = site.using(received)
    own = [example for each in site.own_sets.values() for example in each.examples]
    routing = expert_use(adapted, adapter, encode(own, adapted.tokenizer, config.data), config.eval.batch_size)
    return Measured(scores=tuple(found), cost=cost, routing=routing)


def _in_use(site: Site, received: Arrays) -> ModelInUse:
    """The model in use at the site; of one adapter, all that is scored takes batches."""
    if not site.method.one_adapter:
        return site.in_use(received)
    adapted, adapter, *_ = site.using(received)
    return one_adapter(adapted, adapter, site.config)


def _is_another(site: Site, received: Arrays, everyones: Arrays) -> bool:
    """Whether the model in use at the site may answer otherwise than the global one."""
    if not site.method.one_adapter:
        return True
    own = site.adapter_in_use(received)
    return any(not np.array_equal(own[name], everyones[name]) for name in everyones)


def _cost(site: Site, in_use: ModelInUse, plain: ModelInUse) -> RelativeCost | None:
    """Over a batch of the site's own held-out examples."""
    own = next(own for own in site.own_sets.values() if own.examples)
    sequences = encode(own.examples, site.adapted.tokenizer, site.config.data)[: site.config.eval.batch_size]
    return relative_cost(in_use.loss, plain.loss, sequences)
