"""CLAIR on the text-copying task of arXiv 2605.21217 (Table 3): a two-block attention-only Transformer, ten sites.

    python -m benchmarks.clair_copying --replicates 100 --json benchmarks/results/clair_copying.json

Shapes: K sites trained side by side, B sequences, T = 64 tokens, D = 64 hidden, V = 53 tokens.

What the paper leaves open, and what was chosen, is ``LEFT_OPEN``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from benchmarks.provenance import MADE_BY, makers
from benchmarks.render import as_table, choices, write_results
from strategies.collaborative_set import VerdictRule, decide
from strategies.low_rank import Factors
from strategies.refinement import refine
from strategies.shared_subspace import SubspaceConfig, examine

LEFT_OPEN = {
    "what the contaminated site copies": "the segment backwards",
    "background letters": "uniform",
    "loss": "next-token cross-entropy at the positions that are scored: at all positions, 5500 steps of pre-training "
    "learn no copying",
    'LoRA\'s "scale 16"': "alpha: updates are scaled by 16 / 3",
    "penalties and threshold": "automatic",
    "verdict of the eight matrices": "pooled; that of their majority is counted beside it",
    "accuracy": "mean over the nine benign sites, on 200 new sequences each",
    "a site's output layer": "its own under every method",
}
LETTERS, VOCABULARY, TOKENS, HIDDEN, BLOCKS = 52, 53, 64, 64, 2
SITES, RANK, ALPHA, DROPOUT = 10, 3, 16.0, 0.005
MATRICES = [f"{block}.{name}" for block in range(BLOCKS) for name in ("q", "k", "v", "o")]
CONFIG = SubspaceConfig(verdict=VerdictRule.pooled)
METHODS = ("local", "fedavg", "oracle_fedavg", "clair")
PRINTED = {"homogeneous": (78.27, 62.94, 79.17, 78.48), "heterogeneous": (77.77, 75.96, 76.96, 77.90)}
"""Table 3, percent, in the order of ``METHODS``."""

Weights = dict[str, torch.Tensor]
Transform = Callable[[NDArray[np.int64]], NDArray[np.int64]]


def same(segment: NDArray[np.int64]) -> NDArray[np.int64]:
    """The task: copy."""
    return segment


def backwards(segment: NDArray[np.int64]) -> NDArray[np.int64]:
    """The contaminated site's task."""
    return segment[..., ::-1]


def sequences(
    rng: np.random.Generator, count: int, length: int, exponent: float, second: Transform = same
) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, T) tokens in which a segment occurs twice, and (count, T) mask of the positions that are scored."""
    law = np.arange(1, LETTERS + 1) ** -exponent
    tokens = rng.integers(0, LETTERS, (count, TOKENS))
    segments = rng.choice(LETTERS, (count, length), p=law / law.sum())
    cuts = TOKENS - 2 * length + 1
    one, other = rng.integers(0, cuts, (count, 1)), rng.integers(0, cuts - 1, (count, 1))
    other += other >= one
    first, start = np.minimum(one, other), np.maximum(one, other) + length
    inside, every = np.arange(length), np.arange(TOKENS)
    np.put_along_axis(tokens, first + inside, segments, axis=1)
    np.put_along_axis(tokens, start + inside, second(segments), axis=1)
    scored = (every >= start + 3) & (every < start + length)
    return torch.from_numpy(tokens), torch.from_numpy(scored)


def initial_weights(generator: torch.Generator) -> Weights:
    """Embedding, LayerNorm gains and biases, attention and output matrices."""
    weights = {"embedding": torch.randn(VOCABULARY, HIDDEN, generator=generator)}
    for name in (*MATRICES, "output"):
        outputs = VOCABULARY if name == "output" else HIDDEN
        weights[name] = torch.randn(outputs, HIDDEN, generator=generator) / math.sqrt(HIDDEN)
    for norm in (*(f"{block}.norm" for block in range(BLOCKS)), "norm"):
        weights |= {f"{norm}.gain": torch.ones(HIDDEN), f"{norm}.bias": torch.zeros(HIDDEN)}
    return weights


def _rotations() -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 10_000.0 ** (-torch.arange(0, HIDDEN, 2) / HIDDEN)
    angles = torch.arange(TOKENS)[:, None] * frequencies
    return angles.cos(), angles.sin()


COS, SIN = _rotations()


def rotated(states: torch.Tensor) -> torch.Tensor:
    """(..., T, D) with rotary positions."""
    left, right = states.chunk(2, dim=-1)
    return torch.cat([left * COS - right * SIN, right * COS + left * SIN], dim=-1)


def logits(tokens_KBT: torch.Tensor, weights: Weights, adapters: Weights, *, dropout: float = 0.0) -> torch.Tensor:
    """(K, B, T, V) of K sites with one base; ``adapters`` holds A (K, r, D) and B (K, outputs, r), or wide changes."""

    def linear(name: str, states: torch.Tensor) -> torch.Tensor:
        result = states @ weights[name].T
        if f"{name}.change" in adapters:
            return result + states @ adapters[f"{name}.change"].mT[:, None]
        if f"{name}.A" in adapters:
            dropped = functional.dropout(states, dropout) if dropout else states
            low = dropped @ adapters[f"{name}.A"].mT[:, None]
            result = result + ALPHA / RANK * (low @ adapters[f"{name}.B"].mT[:, None])
        return result

    def normed(name: str, states: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(states, (HIDDEN,), weights[f"{name}.gain"], weights[f"{name}.bias"])

    states = weights["embedding"][tokens_KBT]
    for block in range(BLOCKS):
        inner = normed(f"{block}.norm", states)
        query, key = rotated(linear(f"{block}.q", inner)), rotated(linear(f"{block}.k", inner))
        mixed = functional.scaled_dot_product_attention(query, key, linear(f"{block}.v", inner), is_causal=True)
        states = states + linear(f"{block}.o", mixed)
    return linear("output", normed("norm", states))


def loss(scores: torch.Tensor, tokens_KBT: torch.Tensor, scored_KBT: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy: the mean over a site's scored positions, summed over sites, which share nothing."""
    flat, targets = scores[:, :, :-1].flatten(0, 2), tokens_KBT[:, :, 1:].flatten()
    counted = scored_KBT[:, :, 1:]
    nll = functional.cross_entropy(flat, targets, reduction="none").view(counted.shape) * counted
    return (nll.sum(dim=(1, 2)) / counted.sum(dim=(1, 2))).sum()


def pretrained(seed: int, steps: int) -> Weights:
    """The base: Adam on fuzzy copies of 5 to 15 letters."""
    rng, generator = np.random.default_rng([seed, 1]), torch.Generator().manual_seed(seed)
    weights = {name: weight.requires_grad_() for name, weight in initial_weights(generator).items()}
    optimizer = torch.optim.Adam(weights.values(), lr=1e-3)
    for _ in range(steps):
        tokens, scored = sequences(rng, 64, int(rng.integers(5, 16)), 1.1)
        optimizer.zero_grad()
        loss(logits(tokens[None], weights, {}), tokens[None], scored[None]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def adapted(
    tokens_KNT: torch.Tensor, scored_KNT: torch.Tensor, weights: Weights, generator: torch.Generator
) -> Weights:
    """LoRA of every site after one epoch of batches of 50; all start from the same A."""
    adapters = {}
    for name in (*MATRICES, "output"):
        start = (torch.rand(RANK, HIDDEN, generator=generator) * 2 - 1) / math.sqrt(HIDDEN)
        adapters[f"{name}.A"] = start.repeat(SITES, 1, 1).requires_grad_()
        adapters[f"{name}.B"] = torch.zeros(SITES, len(weights[name]), RANK, requires_grad=True)
    optimizer = torch.optim.Adam(adapters.values(), lr=1e-3)
    for batch, scored in zip(torch.split(tokens_KNT, 50, dim=1), torch.split(scored_KNT, 50, dim=1), strict=True):
        optimizer.zero_grad()
        loss(logits(batch, weights, adapters, dropout=DROPOUT), batch, scored).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: array.detach() for name, array in adapters.items()}


@torch.no_grad()
def accuracy(tokens_KBT: torch.Tensor, scored_KBT: torch.Tensor, weights: Weights, adapters: Weights) -> list[float]:
    """Percent of scored positions predicted, one a site."""
    guessed = logits(tokens_KBT, weights, adapters)[:, :, :-1].argmax(dim=-1)
    right = (guessed == tokens_KBT[:, :, 1:]) & scored_KBT[:, :, 1:]
    return (100 * right.sum(dim=(1, 2)) / scored_KBT[:, :, 1:].sum(dim=(1, 2))).tolist()


def aggregated(adapters: Weights) -> tuple[dict[str, Weights], dict[str, Any]]:
    """Adapters under every method, and CLAIR's verdicts; the last site is the contaminated one."""
    benign = np.arange(SITES) < SITES - 1
    everyone = np.ones(SITES, bool)
    own_output = {name: array for name, array in adapters.items() if name.startswith("output")}
    products = {
        name: Factors(adapters[f"{name}.A"].double().numpy(), ALPHA / RANK * adapters[f"{name}.B"].double().numpy())
        for name in MATRICES
    }
    findings = {name: examine(product, CONFIG) for name, product in products.items()}
    sites = [str(k) for k in range(SITES)]
    verdicts = [(sites, finding.verdict) for finding in findings.values()]
    votes = list(decide(sites, verdicts, CONFIG.verdict, agreement=CONFIG.agreement, min_gap=CONFIG.min_gap).values())
    accepted = np.array([not vote.rejected for vote in votes])
    methods: dict[str, Weights] = {"local": adapters}
    for method in METHODS[1:]:
        methods[method] = dict(own_output)
        for name, product in products.items():
            wide = product.B @ product.A
            changes = wide.copy()
            if method == "clair":
                own = refine(product, accepted, findings[name].directions, None).own
                changes[accepted] = own.B @ own.A
            else:
                changes[:] = wide[everyone if method == "fedavg" else benign].mean(axis=0)
            methods[method][f"{name}.change"] = torch.from_numpy(changes).float()
    layers = [bool((finding.verdict.accepted == benign).all()) for finding in findings.values()]
    return methods, {
        "exact": bool((accepted == benign).all()),
        "exact_majority": bool(((np.array([vote.margin for vote in votes]) <= 0) == benign).all()),
        "exact_matrices": sum(layers),
        "against_contaminated": votes[-1].against,
        "most_against_benign": max(vote.against for vote in votes[:-1]),
        "distances": [np.round(finding.verdict.distances, 5).tolist() for finding in findings.values()],
    }


def replicate(weights: Weights, regime: str, seed: int) -> dict[str, Any]:
    """Ten sites adapted, aggregated by every method and evaluated."""
    rng, generator = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    alike = regime == "homogeneous"
    exponents = [1.1 if alike else float(rng.uniform(0.95, 1.6)) for _ in range(SITES)]
    lengths = [16 if alike else int(rng.integers(10, 27)) for _ in range(SITES)]
    tasks = [same] * (SITES - 1) + [backwards]
    settings = list(zip(lengths, exponents, tasks, strict=True))
    train = _stacked([sequences(rng, 2000, *setting) for setting in settings])
    tokens, scored = _stacked([sequences(rng, 200, length, exponent) for length, exponent, _ in settings])
    methods, verdicts = aggregated(adapted(*train, weights, generator))
    found = {name: accuracy(tokens, scored, weights, adapters)[:-1] for name, adapters in methods.items()}
    return {name: float(np.mean(values)) for name, values in found.items()} | verdicts


def _stacked(drawn: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, scored = zip(*drawn, strict=True)
    return torch.stack(tokens), torch.stack(scored)


def run(replicates: int, seed: int, steps: int, file: Path | None) -> dict[str, Any]:
    """Both regimes, on one pre-trained base; written after every replicate, and resumed from what ``file`` holds."""
    torch.set_num_threads(1)
    weights = pretrained(seed, steps)
    tokens, scored = sequences(np.random.default_rng([seed, 3]), 1000, 16, 1.1)
    settings = {"benchmark": "clair_copying", "seed": seed, "steps": steps, "verdict": CONFIG.verdict.name}
    found = settings | {"base_accuracy": accuracy(tokens[None], scored[None], weights, {})[0]}
    print(f"pre-trained, accuracy {found['base_accuracy']:.2f}", flush=True)
    draws = _written(file, settings) or {regime: [] for regime in PRINTED}
    for index in range(min(map(len, draws.values())), replicates):
        for regime, of_regime in draws.items():
            of_regime[index:] = [{**replicate(weights, regime, 1000 * seed + index), "made_by": MADE_BY}]
        if file:
            write_results(file, _results(found, draws))
    return _results(found, draws)


def _results(found: Mapping[str, Any], draws: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What is written, and what the table is made from."""
    regimes = {regime: _regime(of_regime) for regime, of_regime in draws.items()}
    made_by = makers(itertools.chain.from_iterable(draws.values()))
    results = {**found, "replicates": min(map(len, draws.values())), "regimes": regimes, "made_by": made_by}
    return results | {"markdown": rows(results), "draws": draws}


def _written(file: Path | None, settings: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]] | None:
    """Regime -> the replicates that an earlier run with the same settings wrote."""
    if file is None or not file.exists():
        return None
    results = json.loads(file.read_text())
    if any(results.get(key) != value for key, value in settings.items()):
        raise ValueError(f"{file} was written with other settings than {dict(settings)}: move it away")
    draws: dict[str, list[dict[str, Any]]] = results["draws"]
    return draws


def _regime(draws: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the replicates, with intervals where replicates differ by more than counts."""
    return {name: _summarised([draw[name] for draw in draws]) for name in METHODS} | {
        "clair_minus_local": _summarised([draw["clair"] - draw["local"] for draw in draws]),
        "exact_client": float(np.mean([draw["exact"] for draw in draws])),
        "exact_majority": float(np.mean([draw["exact_majority"] for draw in draws])),
        "exact_matrices": float(np.mean([draw["exact_matrices"] for draw in draws])),
        "all_matrices_exact": float(np.mean([draw["exact_matrices"] == len(MATRICES) for draw in draws])),
    }


def _summarised(values: list[float]) -> dict[str, float]:
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "half_interval": 1.96 * error}


def rows(results: Mapping[str, Any]) -> str:
    """The table in Markdown, ours beside the printed numbers."""
    columns = [
        "regime", "Local", "FedAvg", "oracle FedAvg", "CLAIR", "CLAIR - Local", "site found", "by majority",
        "matrices right, of 8",
    ]  # fmt: skip
    lines = []
    for regime, found in results["regimes"].items():
        shown = [
            f"{found[name]['mean']:.2f} ± {found[name]['half_interval']:.2f} / {printed:.2f}"
            for name, printed in zip(METHODS, PRINTED[regime], strict=True)
        ]
        gain = f"{found['clair_minus_local']['mean']:+.2f} ± {found['clair_minus_local']['half_interval']:.2f}"
        right = [f"{found[name]:.2f}" for name in ("exact_client", "exact_majority", "exact_matrices")]
        lines.append([regime, *shown, gain, *right])
    title = f"Accuracy in percent with 95 % intervals, {results['replicates']} replicates: ours / printed.\n\n"
    return title + "\n".join([as_table(columns, lines), "", *choices(LEFT_OPEN)]) + "\n"


def main() -> None:
    """Run, write and print the table."""
    parser = argparse.ArgumentParser(description="CLAIR on the text-copying task, Table 3")
    parser.add_argument("--replicates", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5500, help="steps of pre-training")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(run(given.replicates, given.seed, given.steps, given.json)["markdown"])


if __name__ == "__main__":
    main()
