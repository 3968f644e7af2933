"""CLAIR once more, as the paper prints it: products formed, Algorithm 1 in L and S, Eq. 9 as a mean of differences."""

from itertools import combinations

import numpy as np

from strategies.base import ClientUpdate

MATRICES = {"l.q": (12, 20), "l.v": (16, 14)}
"""LoRA pair -> (outputs, inputs)."""


def random_sites(seed, *, num_sites=6, contaminated=2, rank=2, noise=0.03, matrices=MATRICES):
    """Factors of sites with a common row space, the last of them with row spaces of their own."""
    rng = np.random.default_rng(seed)
    adapters = [{} for _ in range(num_sites)]
    for prefix, (outputs, inputs) in matrices.items():
        common = rng.normal(size=(rank, inputs))
        for site, adapter in enumerate(adapters):
            own = site >= num_sites - contaminated
            A = rng.normal(size=(rank, inputs)) if own else common + noise * rng.normal(size=(rank, inputs))
            adapter[f"{prefix}.lora_A"] = A.astype(np.float32)
            adapter[f"{prefix}.lora_B"] = rng.normal(size=(outputs, rank)).astype(np.float32)
    updates = [
        ClientUpdate(site=f"site-{i}", adapter=adapter, num_examples=i + 1) for i, adapter in enumerate(adapters)
    ]
    return {name: np.zeros_like(array) for name, array in adapters[0].items()}, updates


def product(adapter, prefix):
    return adapter[f"{prefix}.lora_B"].astype(float) @ adapter[f"{prefix}.lora_A"].astype(float)


def naive_program(blocks, low_rank_penalty, block_penalty, steps):
    """Algorithm 1 with omega = 1 and its step of 1/2: L and S move together from the same residual."""
    low_rank, sparse = np.zeros_like(blocks), np.zeros_like(blocks)
    shape = blocks.shape
    for _ in range(steps):
        residual = (blocks - low_rank - sparse) / 2
        left, sizes, right = np.linalg.svd((low_rank + residual).reshape(-1, shape[-1]), full_matrices=False)
        low_rank = ((left * np.maximum(sizes - low_rank_penalty / 2, 0)) @ right).reshape(shape)
        moved = sparse + residual
        for g, block in enumerate(moved):
            length = np.linalg.norm(block)
            sparse[g] = max(0.0, 1 - block_penalty / 2 / length) * block if length else 0 * block
    return low_rank, sparse


def naive_objective(blocks, low_rank, sparse, low_rank_penalty, block_penalty):
    nuclear = np.linalg.svd(low_rank.reshape(-1, blocks.shape[-1]), compute_uv=False).sum()
    blockwise = sum(np.linalg.norm(block) for block in sparse)
    return ((blocks - low_rank - sparse) ** 2).sum() / 2 + low_rank_penalty * nuclear + block_penalty * blockwise


def naive_penalties(blocks, rank):
    _, _, right = np.linalg.svd(blocks.reshape(-1, blocks.shape[-1]), full_matrices=False)
    outside = np.eye(blocks.shape[-1]) - right[:rank].T @ right[:rank]
    block_penalty = np.quantile([np.linalg.norm(block @ outside) for block in blocks], 0.25) / 2
    return block_penalty / 2 / np.sqrt(rank / len(blocks)), block_penalty


def naive_projection(blocks, rank, steps=2500):
    """P on the main ``rank`` right singular vectors of the low-rank part, at the automatic penalties."""
    norms = np.linalg.norm(blocks, axis=(1, 2))
    limit = 2 * np.quantile(norms, 0.25)
    blocks = np.stack([block * min(1, limit / length) for block, length in zip(blocks, norms, strict=True)])
    low_rank, _ = naive_program(blocks, *naive_penalties(blocks, rank), steps)
    _, _, right = np.linalg.svd(low_rank.reshape(-1, blocks.shape[-1]), full_matrices=False)
    return right[:rank].T @ right[:rank]


def naive_differences(weights):
    return np.stack([weights[j] - weights[k] for j, k in combinations(range(len(weights)), 2)])


def naive_refined(weights, accepted, projection):
    """Eq. 9, term by term; the others keep what they have."""
    members = [k for k, ok in enumerate(accepted) if ok]
    refined = list(weights)
    for k in members:
        terms = [weights[j] - (weights[j] - weights[k]) @ projection for j in members]
        refined[k] = sum(terms) / len(terms)
    return refined
