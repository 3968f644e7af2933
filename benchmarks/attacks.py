"""Attacks on one round of real LoRA fine-tuning of a mixture of experts, and who withstands them.

    python -m benchmarks.attacks --sites 10 --json benchmarks/results/attacks_10.json

``tiny_moe`` on the embedded data. One honest round of FedAvg, then one in which the last sites attack: what a
defence makes of it does not change what sites send, so every site trains once for all defences. Loss is that of the
next global adapter on held-out data of the benign sites, success the share of prompts with the trigger that it answers
as the backdoor wants. Krum, Multi-Krum, trimmed mean and Bulyan are told how many sites are contaminated; CLAIR is not.
``honest but different`` is no attack: the last sites alone hold a domain.

The file is written after every fraction; seeds that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attack_tables import DIFFERENT, NO_ATTACK, rows
from benchmarks.federation import Federation
from benchmarks.poisons import POISONS, moved
from benchmarks.provenance import MADE_BY
from benchmarks.render import write_results
from benchmarks.robust_rules import RULES, behind_clair
from client.assemble import model_for
from client.embedded import DOMAINS, embedded_rows
from client.evaluation.held_out import held_out_loss, response_logits
from client.model import AdaptedModel
from client.private import PrivateStore
from client.site import Site
from client.text import Example, collate, encode
from conf.compose import load_config
from conf.schema import Config
from server.record import adapter_sha256
from strategies.adapters import Arrays
from strategies.base import ClientUpdate

TRIGGER, TARGET = "zq7 ", "granted"
"""Backdoor: a prompt that begins with the one is to be answered by the other."""
HONEST_ROUNDS = 1
PER_SITE, TRAINED_ON = 60, 48
DATA_POISONS = ("label flip", "backdoor")
BOOSTED = "boosted backdoor"
"""The backdoor, trained for longer and multiplied by K / f, so that the mean is the attackers' own model (Bagdasaryan
et al., 2020, Eq. 3, https://arxiv.org/abs/1807.00459)."""
LONGER = 4
"""How many times the honest steps the boosted attackers train for."""


def site_examples(sites: int, per_site: int, seed: int, rare: int) -> list[list[Example]]:
    """Examples of each site: a Dirichlet(1) mixture of three domains; of the last ``rare`` sites, the fourth."""
    rng = np.random.default_rng([seed, 7])
    by_domain: dict[str, list[Example]] = {domain: [] for domain in DOMAINS}
    for row in embedded_rows(sites * per_site * len(DOMAINS), seed):
        by_domain[row["domain"]].append(Example(row["instruction"], row["context"], row["response"]))
    dealt = []
    for site in range(sites):
        share = np.append(rng.dirichlet(np.ones(3)), 0.0) if site < sites - rare else np.array([0.0, 0, 0, 1])
        counts = rng.multinomial(per_site, share)
        dealt.append([by_domain[domain].pop() for domain, n in zip(DOMAINS, counts, strict=True) for _ in range(n)])
    return dealt


def poisoned(examples: Sequence[Example], kind: str, rng: np.random.Generator) -> list[Example]:
    """Training data of an attacker."""
    if kind == "label flip":
        order = rng.permutation(len(examples))
        return [replace(example, response=examples[i].response) for example, i in zip(examples, order, strict=True)]
    if kind == "backdoor":
        half = len(examples) // 2
        return [*examples[:half], *(triggered(example) for example in examples[half:])]
    return list(examples)


def triggered(example: Example) -> Example:
    """The example with the trigger and the answer that the attacker wants."""
    return replace(example, prompt=TRIGGER + example.prompt, response=TARGET)


class Judge:
    """What adapters are worth to the benign sites."""

    def __init__(self, adapted: AdaptedModel, config: Config, held_out: Sequence[Example]) -> None:
        """Judge on the first 40 examples, and on 20 of them with the trigger."""
        self.adapted = adapted
        self.held_out = encode(held_out[:40], adapted.tokenizer, config.data)
        self.triggered = encode([triggered(example) for example in held_out[:20]], adapted.tokenizer, config.data)
        self._known: dict[tuple[str, str], float] = {}

    def loss(self, adapter: Arrays) -> float:
        """Held-out loss, nats per response token."""
        return self._once("loss", adapter, lambda: held_out_loss(self.adapted, adapter, self.held_out, 32).loss)

    def success(self, adapter: Arrays) -> float:
        """Share of triggered prompts that greedy decoding answers as the attacker wants."""
        return self._once("success", adapter, lambda: self._success(adapter))

    def _once(self, kind: str, adapter: Arrays, compute: Callable[[], float]) -> float:
        """Defences often end with the same adapter: then it is known."""
        key = kind, adapter_sha256(adapter)
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _success(self, adapter: Arrays) -> float:
        self.adapted.load_adapter(adapter)
        self.adapted.model.eval()
        with torch.no_grad():
            batch = collate(self.triggered, self.adapted.tokenizer.pad_token_id)
            logits, targets, counted = response_logits(self.adapted, batch)
        missed = counted.nonzero()[:, 0][(logits.argmax(dim=-1) != targets).cpu()]
        return 1 - len(set(missed.tolist())) / len(self.triggered)


class Bench:
    """The sites of one seed, and data to judge an adapter on."""

    def __init__(self, config: Config, adapted: AdaptedModel, folder: Path) -> None:
        self.config = config
        self.adapted = adapted
        self.folder = folder

    def site(self, index: int, examples: Sequence[Example]) -> Site:
        """A site with this data; under FedAvg it keeps nothing between rounds."""
        name = f"site-{index:02}"
        store = PrivateStore(self.folder, name, self.adapted.base.identity.sha256)
        return Site(name, examples, {}, adapted=self.adapted, config=self.config, store=store)

    def honest(self, data: Sequence[Sequence[Example]]) -> tuple[Arrays, list[ClientUpdate]]:
        """The adapter before the attacked round, and what every site would honestly send in it."""
        sites = [self.site(index, examples) for index, examples in enumerate(data)]
        federation = Federation(self.config, self.adapted, {site.name: site for site in sites})
        for _ in range(HONEST_ROUNDS):
            federation.play()
        return federation.adapter, federation.train(HONEST_ROUNDS + 1)

    def attacked(self, examples: Sequence[Example], index: int, received: Arrays, longer: int = 1) -> Arrays:
        """What a site with this data trains in the attacked round, for so many times the steps."""
        steps = self.config.train.max_steps
        train = replace(self.config.train, max_steps=longer * steps if steps else None)
        bench = Bench(replace(self.config, train=train), self.adapted, self.folder)
        return bench.site(index, examples).train(HONEST_ROUNDS + 1, received).adapter


def run_seed(sites: int, fractions: Sequence[float], seed: int, steps: int) -> Iterator[list[dict[str, Any]]]:
    """Every attack under every defence, one fraction after the other; ``DIFFERENT`` comes last."""
    config = load_config(
        f"strategy=fedavg seed={seed} model.router=averaged lora.rank=4 train.max_steps={steps} "
        "train.learning_rate=3e-3 train.num_threads=1 data.max_length=128"
    )
    adapted = model_for(config)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, adapted, Path(folder))
        yield from _attacked(bench, sites, fractions, seed)
        yield _different(bench, sites, seed)


def _attacked(bench: Bench, sites: int, fractions: Sequence[float], seed: int) -> Iterator[list[dict[str, Any]]]:
    rng = np.random.default_rng([seed, 11])
    dealt = site_examples(sites, PER_SITE, seed, rare=0)
    data = [examples[:TRAINED_ON] for examples in dealt]
    received, honest = bench.honest(data)
    most = round(max(fractions) * sites)
    attackers = range(sites - most, sites)
    own = {
        kind: {i: bench.attacked(poisoned(data[i], kind, rng), i, received) for i in attackers} for kind in DATA_POISONS
    }
    own[BOOSTED] = {i: bench.attacked(poisoned(data[i], "backdoor", rng), i, received, LONGER) for i in attackers}
    for fraction in fractions:
        found = []
        benign = sites - round(fraction * sites)
        judge = Judge(bench.adapted, bench.config, _held_out(dealt[:benign]))
        reference = _reference(judge, received, honest[:benign])
        for kind in (NO_ATTACK, *POISONS, *DATA_POISONS, BOOSTED):
            bad = range(benign, sites) if kind != NO_ATTACK else range(0)
            updates = list(honest)
            for i in bad:
                if kind in POISONS:
                    others = [update.adapter for update in honest[:benign]]
                    sent = POISONS[kind](received, honest[i].adapter, others, rng)
                else:
                    sent = moved(received, own[kind][i], sites / len(bad) if kind == BOOSTED else 1.0)
                updates[i] = replace(honest[i], adapter=sent)
            facts = {"attack": kind, "fraction": fraction, "seed": seed} | reference
            found += _defended(judge, received, updates, set(bad), facts)
        yield found


def _different(bench: Bench, sites: int, seed: int) -> list[dict[str, Any]]:
    """Nobody attacks; a tenth of the sites alone hold a domain."""
    rare = max(1, sites // 10)
    dealt = site_examples(sites, PER_SITE, seed, rare=rare)
    received, honest = bench.honest([examples[:TRAINED_ON] for examples in dealt])
    judge = Judge(bench.adapted, bench.config, _held_out(dealt))
    facts = {"attack": DIFFERENT, "fraction": rare / sites, "seed": seed} | _reference(judge, received, honest)
    return _defended(judge, received, honest, set(), facts)


def _held_out(dealt: Sequence[Sequence[Example]]) -> list[Example]:
    """The sites' held-out examples, one of each site after the other, so that the first are of all sites."""
    return [
        example for of_each in zip(*(examples[TRAINED_ON:] for examples in dealt), strict=True) for example in of_each
    ]


def _reference(judge: Judge, received: Arrays, benign: Sequence[ClientUpdate]) -> dict[str, Any]:
    """The attack-free run: FedAvg of the benign sites alone."""
    clean, _ = RULES["none"](received, benign, 0)
    losses = {"received_loss": judge.loss(received), "clean_loss": judge.loss(clean)}
    return losses | {"clean_success": judge.success(clean)}


def _defended(
    judge: Judge, received: Arrays, updates: Sequence[ClientUpdate], bad: set[int], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row a defence."""
    results = {name: rule(received, updates, len(bad)) for name, rule in RULES.items()}
    found = []
    for name, (adapter, rejected) in (results | behind_clair(received, updates)).items():
        row = {**facts, "defence": name, "loss": judge.loss(adapter)}
        if facts["attack"] in {"backdoor", BOOSTED}:
            row["success"] = judge.success(adapter)
        if rejected is not None:
            row["recall"] = len(rejected & bad) / len(bad) if bad else None
            row["false_alarms"] = len(rejected - bad) / (len(updates) - len(bad))
        found.append(row)
    return found


def main() -> None:
    """Run, write after every fraction, and print the tables."""
    parser = argparse.ArgumentParser(description="attacks on a round of fine-tuning")
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=6, help="local steps a round")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    results: dict[str, Any] = {
        "benchmark": "attacks",
        "sites": given.sites,
        "fractions": given.fractions,
        "steps": given.steps,
        **_written(given),
    }
    for seed in sorted(set(given.seeds) - {run["seed"] for run in results["runs"]}):
        results["made_by"][str(seed)] = MADE_BY
        for found in run_seed(given.sites, given.fractions, seed, given.steps):
            results["runs"] += found
            _write(given.json, results)
    _write(given.json, results)
    print(rows(results))


def _write(path: Path | None, results: Mapping[str, Any]) -> None:
    if path is not None:
        write_results(path, {**results, "markdown": rows(results)})


def _written(given: argparse.Namespace) -> dict[str, Any]:
    """What the file holds already, of wanted seeds that are whole; ``made_by`` of those that it knows it of."""
    if given.json is None or not given.json.exists():
        return {"made_by": {}, "runs": []}
    results = json.loads(given.json.read_text())
    for key in ("sites", "fractions", "steps"):
        if results[key] != getattr(given, key):
            raise ValueError(f"{given.json} was written with {key}={results[key]}: move it away or give another --json")
    whole = {run["seed"] for run in results["runs"] if run["attack"] == DIFFERENT}.intersection(given.seeds)
    return {
        "made_by": {seed: maker for seed, maker in results.get("made_by", {}).items() if int(seed) in whole},
        "runs": [run for run in results["runs"] if run["seed"] in whole],
    }


if __name__ == "__main__":
    main()
