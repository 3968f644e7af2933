"""Attacks on one round of real LoRA fine-tuning of a mixture of experts, and who withstands them.

    python -m benchmarks.attacks --sites 10 --json benchmarks/results/attacks_10.json

``tiny_moe`` on the embedded data. One honest round of FedAvg, then one in which the last sites attack: what a
defence makes of it does not change what sites send, so every site trains once for all defences. Loss is that of the
next global adapter on held-out data of the benign sites, success the share of prompts with the trigger that it answers
as the backdoor wants. Krum, Multi-Krum, trimmed mean and Bulyan are told how many sites are contaminated; CLAIR is not.
``honest but different`` is no attack: the last sites alone hold a domain.

The file is written after every seed; seeds that it holds are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.attack_tables import DIFFERENT, NO_ATTACK, rows
from benchmarks.federation import Federation
from benchmarks.poisons import POISONS, as_trained
from benchmarks.render import write_results
from benchmarks.robust_rules import RULES
from client.assemble import model_for
from client.embedded import DOMAINS, embedded_rows
from client.evaluation import held_out_loss, response_logits
from client.model import AdaptedModel
from client.private import PrivateStore
from client.site import Site
from client.text import Example, TokenSequence, collate, encode
from conf.compose import load_config
from conf.schema import Config
from strategies.adapters import Arrays
from strategies.base import ClientUpdate

TRIGGER, TARGET = "zq7 ", "granted"
"""Backdoor: a prompt that begins with the one is to be answered by the other."""
HONEST_ROUNDS = 1
DATA_POISONS = ("label flip", "backdoor")


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


Tests = tuple[Sequence[TokenSequence], Sequence[TokenSequence]]
"""Held-out sequences of the benign sites; some of them with the trigger and the answer that the attacker wants."""


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

    def attacked(self, examples: Sequence[Example], index: int, received: Arrays) -> ClientUpdate:
        """What a site with this data sends in the attacked round."""
        return self.site(index, examples).train(HONEST_ROUNDS + 1, received)

    def loss(self, adapter: Arrays, sequences: Sequence[TokenSequence]) -> float:
        """Held-out loss, nats per response token; infinite if the model does not compute any more."""
        try:
            return held_out_loss(self.adapted, adapter, sequences, 32).loss
        except (ValueError, FloatingPointError):
            return float("inf")

    def success(self, adapter: Arrays, triggered: Sequence[TokenSequence]) -> float:
        """Share of prompts that greedy decoding answers with the whole response given with them."""
        self.adapted.load_adapter(adapter)
        self.adapted.model.eval()
        with torch.no_grad():
            batch = collate(triggered, self.adapted.tokenizer.pad_token_id)
            logits, targets, counted = response_logits(self.adapted, batch)
        missed = counted.nonzero()[:, 0][(logits.argmax(dim=-1) != targets).cpu()]
        return 1 - len(missed.unique()) / len(triggered)

    def encoded(self, examples: Sequence[Example]) -> list[TokenSequence]:
        """The examples as tokens."""
        return encode(examples, self.adapted.tokenizer, self.config.data)


def run_seed(sites: int, fractions: Sequence[float], seed: int, steps: int) -> list[dict[str, Any]]:
    """Every attack at every fraction under every defence."""
    config = load_config(
        f"strategy=fedavg seed={seed} model.router=averaged lora.rank=4 train.max_steps={steps} "
        "train.learning_rate=3e-3 train.num_threads=1 data.max_length=128"
    )
    adapted = model_for(config)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, adapted, Path(folder))
        found = _attacked(bench, sites, fractions, seed)
        found += _different(bench, sites, seed)
    return found


def _attacked(bench: Bench, sites: int, fractions: Sequence[float], seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng([seed, 11])
    dealt = site_examples(sites, 60, seed, rare=0)
    data = [examples[:48] for examples in dealt]
    received, honest = bench.honest(data)
    most = round(max(fractions) * sites)
    attackers = range(sites - most, sites)
    own = {
        kind: {i: bench.attacked(poisoned(data[i], kind, rng), i, received) for i in attackers} for kind in DATA_POISONS
    }
    found = []
    for fraction in fractions:
        benign = sites - round(fraction * sites)
        held_out = [example for examples in dealt[:benign] for example in examples[48:]][:80]
        tests = bench.encoded(held_out), bench.encoded([triggered(example) for example in held_out[:20]])
        reference = _reference(bench, received, honest[:benign], tests)
        for kind in (NO_ATTACK, *POISONS, *DATA_POISONS):
            bad = range(benign, sites) if kind != NO_ATTACK else range(0)
            updates = list(honest)
            for i in bad:
                trained = own[kind][i].adapter if kind in DATA_POISONS else honest[i].adapter
                poison = POISONS.get(kind, as_trained)
                sent = poison(received, trained, [update.adapter for update in honest[:benign]], rng)
                updates[i] = replace(honest[i], adapter=sent)
            facts = {"attack": kind, "fraction": fraction, "seed": seed} | reference
            found += _defended(bench, received, updates, set(bad), tests, facts)
    return found


def _different(bench: Bench, sites: int, seed: int) -> list[dict[str, Any]]:
    """Nobody attacks; a tenth of the sites alone hold a domain."""
    rare = max(1, sites // 10)
    dealt = site_examples(sites, 60, seed, rare=rare)
    received, honest = bench.honest([examples[:48] for examples in dealt])
    held_out = [example for examples in dealt for example in examples[48:]][:80]
    tests = bench.encoded(held_out), bench.encoded([triggered(example) for example in held_out[:20]])
    facts = {"attack": DIFFERENT, "fraction": rare / sites, "seed": seed}
    return _defended(bench, received, honest, set(), tests, facts | _reference(bench, received, honest, tests))


def _reference(bench: Bench, received: Arrays, benign: Sequence[ClientUpdate], tests: Tests) -> dict[str, Any]:
    """The attack-free run: FedAvg of the benign sites alone."""
    clean, _ = RULES["none"](received, benign, 0)
    return {
        "received_loss": bench.loss(received, tests[0]),
        "clean_loss": bench.loss(clean, tests[0]),
        "clean_success": bench.success(clean, tests[1]),
    }


def _defended(
    bench: Bench,
    received: Arrays,
    updates: Sequence[ClientUpdate],
    bad: set[int],
    tests: Tests,
    facts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A row a defence."""
    found = []
    for name, rule in RULES.items():
        started = time.perf_counter()
        adapter, rejected = rule(received, updates, len(bad))
        seconds = time.perf_counter() - started
        row = {**facts, "defence": name, "seconds": round(seconds, 3), "loss": bench.loss(adapter, tests[0])}
        if facts["attack"] in {NO_ATTACK, "backdoor"}:
            row["success"] = bench.success(adapter, tests[1])
        if rejected is not None:
            row["recall"] = len(rejected & bad) / len(bad) if bad else None
            row["false_alarms"] = len(rejected - bad) / (len(updates) - len(bad))
        found.append(row)
    return found


def main() -> None:
    """Run, write after every seed, and print the tables."""
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
        "runs": _written(given),
    }
    for seed in sorted(set(given.seeds) - {run["seed"] for run in results["runs"]}):
        results["runs"] += run_seed(given.sites, given.fractions, seed, given.steps)
        if given.json:
            write_results(given.json, results | {"markdown": rows(results)})
    print(rows(results))


def _written(given: argparse.Namespace) -> list[dict[str, Any]]:
    """What the file holds already, of seeds that are wanted."""
    if given.json is None or not given.json.exists():
        return []
    results = json.loads(given.json.read_text())
    for key in ("sites", "fractions", "steps"):
        if results[key] != getattr(given, key):
            raise ValueError(f"{given.json} was written with {key}={results[key]}: move it away or give another --json")
    return [run for run in results["runs"] if run["seed"] in given.seeds]


if __name__ == "__main__":
    main()
