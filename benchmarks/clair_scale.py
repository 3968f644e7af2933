"""Seconds, iterations and memory of CLAIR's convex program on LoRA factors of a 7B-sized model.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.clair_scale --json benchmarks/results/clair_scale.json

Matrices are independent: two threads work on them, each with one BLAS thread. Sites share a row space up to 5 % noise,
every fifth has a row space of its own. Drawing the factors is not counted; coordinates, blocks, automatic penalties
and the program to a relative gap of 1e-4 are.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import tracemalloc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.provenance import MADE_BY
from benchmarks.render import write_results
from strategies.block_sparse import decompose
from strategies.low_rank import Factors
from strategies.product_cores import difference_blocks, pairs_of, side_of
from strategies.shared_subspace import Finding, SubspaceConfig, automatic_penalties, examine, main_part

RANK = 16
THREADS = 2


def random_products(seed: int, sites: int, width: int) -> Factors:
    """Float32 factors of one matrix of all sites, (K, r, width) and (K, width, r)."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((RANK, width), np.float32)
    A = common + 0.05 * rng.standard_normal((sites, RANK, width), np.float32)
    own = np.arange(sites) % 5 == 4
    A[own] = rng.standard_normal((int(own.sum()), RANK, width), np.float32)
    return Factors(A, rng.standard_normal((sites, width, RANK), np.float32) / np.float32(width))


def measure(sites: int, width: int, matrices: int, counted_as: int) -> dict[str, Any]:
    """Wall seconds of ``matrices`` matrices, scaled to ``counted_as`` of them, and the peak memory of one."""
    config = SubspaceConfig()
    findings: list[Finding] = []
    seconds = 0.0
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, matrices, THREADS):
            seeds = range(first, min(first + THREADS, matrices))
            drawn = [random_products(seed, sites, width) for seed in seeds]
            started = time.perf_counter()
            findings += list(pool.map(lambda products: examine(products, config), drawn))
            seconds += time.perf_counter() - started
    tracemalloc.start()
    examine(random_products(0, sites, width), config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = [k for k in range(sites) if k % 5 == 4]
    return {
        "sites": sites,
        "width": width,
        "matrices": matrices,
        "seconds": seconds,
        "counted_as": counted_as,
        "seconds_of_all": seconds / matrices * counted_as,
        "extrapolated": counted_as != matrices,
        "iterations": [finding.iterations for finding in findings],
        "largest_gap": max(finding.relative_gap for finding in findings),
        "found_exactly": all(_rejected(finding) == expected for finding in findings),
        "peak_mib_of_one": peak / 2**20,
        "dense_gib_of_one_array": len(pairs_of(sites)) * width**2 * 8 / 2**30,
    }


def _rejected(finding: Finding) -> list[int]:
    return np.flatnonzero(~finding.verdict.accepted).tolist()


def against_dense(sites: int = 10, width: int = 512) -> dict[str, Any]:
    """The same program on formed products: largest differences of objective, row space and L, and seconds of both.

    Both start at zero and go on to a gap of 1e-12: a gap bounds how far the objective is from its minimum, and L and S
    converge like its square root only. What is left is the difference of the two ways.
    """
    products = random_products(0, sites, width)
    started = time.perf_counter()
    coordinates = side_of(products.A)
    cores = difference_blocks(products, coordinates)
    low_rank, block = automatic_penalties(cores, main_part(cores, RANK), RANK)
    solve = partial(decompose, low_rank_penalty=low_rank, block_penalty=block, tolerance=1e-12, max_iterations=5000)
    small = solve(cores)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    formed = products.B.astype(np.float64) @ products.A.astype(np.float64)
    j, k = pairs_of(sites).T
    wide = solve(formed[j] - formed[k])
    dense_seconds = time.perf_counter() - started
    basis, dense_basis = coordinates.lift(small.directions[:, :RANK].T), wide.directions[:, :RANK].T
    apart = basis.T @ basis - dense_basis.T @ dense_basis
    lengths, dense_lengths = (np.linalg.norm(part, axis=(1, 2)) for part in (small.sparse, wide.sparse))
    return {
        "sites": sites,
        "width": width,
        "relative_objective": abs(small.objective / wide.objective - 1),
        "projection": float(np.linalg.norm(apart, 2)),
        "singular_values": float(np.abs(small.sizes[:RANK] / wide.sizes[:RANK] - 1).max()),
        "sparse_blocks": float(np.abs(lengths - dense_lengths).max() / dense_lengths.max()),
        "iterations": [small.iterations, wide.iterations],
        "gaps": [small.relative_gap, wide.relative_gap],
        "seconds": seconds,
        "dense_seconds": dense_seconds,
    }


def rows(results: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        f"r = {RANK}, {THREADS} threads, relative gap 1e-4. Dense: memory of one of its several arrays.",
        "",
        "| K | width | matrices | seconds | iterations | MiB of one matrix | dense, GiB | sites found |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in results["cases"]:
        mark = f" (extrapolated from {case['matrices']})" if case["extrapolated"] else ""
        low, high = min(case["iterations"]), max(case["iterations"])
        lines.append(
            f"| {case['sites']} | {case['width']} | {case['counted_as']}{mark} | {case['seconds_of_all']:.1f} | "
            f"{low}-{high} | {case['peak_mib_of_one']:.0f} | {case['dense_gib_of_one_array']:.1f} | "
            f"{'exactly' if case['found_exactly'] else 'no'} |"
        )
    dense = results["against_dense"]
    lines += [
        "",
        f"Against the dense program (K = {dense['sites']}, width {dense['width']}, both to a gap of 1e-12): objective "
        f"{dense['relative_objective']:.0e}, projection {dense['projection']:.0e}, singular values "
        f"{dense['singular_values']:.0e}, sparse blocks {dense['sparse_blocks']:.0e} apart; "
        f"{dense['seconds']:.1f} s instead of {dense['dense_seconds']:.1f} s.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run, write and print the table."""
    parser = argparse.ArgumentParser(description="CLAIR's convex program at the size of a 7B model")
    parser.add_argument("--matrices", type=int, default=128)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--dense", action="store_true", help="only compare with the dense program again")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        parser.error("set OPENBLAS_NUM_THREADS=1: the threads here work on a matrix each")
    if given.dense:
        if given.json is None or not given.json.exists():
            parser.error("--dense needs --json FILE with the sizes measured before")
        results = json.loads(given.json.read_text()) | {"against_dense": against_dense()}
    else:
        cases = [measure(10, given.width, given.matrices, given.matrices), measure(50, given.width, 1, given.matrices)]
        results = {"benchmark": "clair_scale", "cases": cases, "against_dense": against_dense()}
    if given.json:
        write_results(given.json, results | {"made_by": MADE_BY, "markdown": rows(results)})
    print(rows(results))


if __name__ == "__main__":
    main()
