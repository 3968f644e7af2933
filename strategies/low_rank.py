"""Products B A of LoRA factors that are never formed: inner products, weighted sums, truncation.

Shapes: R rank, I inputs, O outputs; "..." any leading axes, such as sites and experts. A is (..., R, I), B is
(..., O, R), their product (..., O, I). The factor alpha / r of LoRA is common to all and left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import LARGEST, Arrays, NotFiniteError, check_same_layout
from strategies.experts import expert_slices, is_expert_array
from strategies.quotient import divided
from strategies.threads import each


class Factors(NamedTuple):
    """A product B A, held as its two factors."""

    A: NDArray[np.floating]
    """(..., R, I)"""
    B: NDArray[np.floating]
    """(..., O, R)"""


def lora_prefixes(names: Iterable[str]) -> list[str]:
    """What LoRA pairs are called without ``.lora_A`` and ``.lora_B``, in the order of their names.

    Raises:
        ValueError: If a factor lacks its other half.
    """
    halves = [{name.removesuffix(end) for name in names if name.endswith(end)} for end in (".lora_A", ".lora_B")]
    if halves[0] != halves[1]:
        raise ValueError(f"LoRA factors without their other half: {sorted(halves[0] ^ halves[1])[:4]}")
    return sorted(halves[0])


def factors_of(adapter: Arrays, prefix: str) -> Factors:
    """The LoRA pair called ``prefix``."""
    return Factors(adapter[f"{prefix}.lora_A"], adapter[f"{prefix}.lora_B"])


def check_products(adapter: Arrays) -> None:
    """Raise ``NotFiniteError`` naming the first LoRA pair whose product may be longer than ``LARGEST``.

    Where a rule steps in products all of their length is in B afterwards: two factors of a size that ``check_size``
    lets through would make a B that it does not.
    """
    for prefix in lora_prefixes(adapter):
        lengths = [
            np.sqrt((factor.astype(np.float64) ** 2).sum(axis=(-2, -1))) for factor in factors_of(adapter, prefix)
        ]
        longest = float(np.max(lengths[0] * lengths[1], initial=0.0))
        if longest > LARGEST:
            raise NotFiniteError(f"{prefix}: ||A|| ||B|| is {longest:.3g}; it must be at most {LARGEST:g}")


def inner_product(left: Factors, right: Factors) -> NDArray[np.float64]:
    """(...) ``<B1 A1, B2 A2>`` = sum of (B1^T B2) * (A1 A2^T): work of R x R instead of O x I."""
    of_B = _transposed(left.B).astype(np.float64) @ right.B
    of_A = left.A.astype(np.float64) @ _transposed(right.A)
    return np.asarray((of_B * of_A).sum(axis=(-2, -1)))


def squared_norm(product: Factors) -> NDArray[np.float64]:
    """(...) ``||B A||^2``; rounding may not take it below 0."""
    return np.maximum(inner_product(product, product), 0.0)


def gram(products: Factors) -> NDArray[np.float64]:
    """(..., K, K) ``<B_j A_j, B_k A_k>`` of all pairs of the K products on the first axis.

    One product of all rows of A with each other and one of all columns of B: work of (K R)^2 (I + O).
    """
    num_products, *leading, rank, _ = products.A.shape
    sides = []
    for factor in (products.A, _transposed(products.B)):
        rows = np.moveaxis(factor, 0, -3).astype(np.float64, order="C").reshape(*leading, num_products * rank, -1)
        sides.append(rows @ _transposed(rows))
    blocks = (sides[0] * sides[1]).reshape(*leading, num_products, rank, num_products, rank)
    return np.asarray(blocks.sum(axis=(-3, -1)))


def weighted_sum(terms: Sequence[Factors], weights: Sequence[float] | NDArray[np.floating]) -> Factors:
    """``sum_i w_i B_i A_i`` as one pair of rank sum_i R_i: [w_1 B_1 ... w_K B_K] and [A_1; ...; A_K].

    ``weights`` has one row a term: a number, or one number per leading axis of the factors, as (K, E).
    """
    weights = np.asarray(weights, np.float64)
    weighted = [term.B * weight[..., None, None] for term, weight in zip(terms, weights, strict=True)]
    return Factors(np.concatenate([term.A for term in terms], axis=-2), np.concatenate(weighted, axis=-1))


def truncate(product: Factors, rank: int) -> tuple[Factors, NDArray[np.float64]]:
    """The closest product of rank ``rank``, and (...) the share of the squared norm that was lost.

    QR of both factors leaves a core no larger than the stacked rank, whose singular value decomposition
    is that of the product: exact (Eckart-Young). The singular values go into B and the rows of A are orthonormal,
    so a direction that nothing was learnt in has B = 0 and A != 0, as in fresh LoRA. Split evenly, it would be
    0 in both, and its gradient 0 for ever. A ``rank`` beyond I or O is filled up with directions that are 0 in both.
    """
    rows, rows_core = np.linalg.qr(_transposed(product.A.astype(np.float64)))
    columns, columns_core = np.linalg.qr(product.B.astype(np.float64))
    left, sizes, right = np.linalg.svd(columns_core @ _transposed(rows_core), full_matrices=False)
    A = (right @ _transposed(rows))[..., :rank, :]
    B = (columns @ (left * sizes[..., None, :]))[..., :rank]
    missing = rank - sizes.shape[-1]
    if missing > 0:
        A = np.concatenate([A, np.zeros((*A.shape[:-2], missing, A.shape[-1]))], axis=-2)
        B = np.concatenate([B, np.zeros((*B.shape[:-1], missing))], axis=-1)
    energy = (sizes**2).sum(axis=-1)
    lost = (sizes[..., rank:] ** 2).sum(axis=-1)
    return Factors(A, B), divided(lost, energy, 0.0)


def turned_towards(product: Factors, reference_A: NDArray[np.floating]) -> Factors:
    """The same product with its rows of A rotated as close to ``reference_A`` as they go (orthogonal Procrustes).

    A singular value decomposition fixes its vectors up to sign, and equal ones up to rotation, differently on
    different processors. Turned towards the last adapter, a component keeps its meaning from round to round.
    """
    left, _, right = np.linalg.svd(reference_A.astype(np.float64) @ _transposed(product.A))
    return Factors(left @ right @ product.A, product.B @ _transposed(left @ right))


def aggregation_gap(adapters: Sequence[Arrays], weights: Sequence[float]) -> float:
    """``||mean(B A) - mean(B) mean(A)|| / ||mean(B A)||`` over all LoRA pairs, dense and expert, as one vector.

    What averaging the factors loses against averaging the products they stand for. 0 without LoRA pairs, as
    when whole weights are trained or the sites send nothing; ``inf`` if the mean product alone is zero.

    Raises:
        ValueError: If there is nothing to average, names or shapes differ, a factor lacks its other half, or
            the weights are not finite, >= 0 and somewhere > 0.
    """
    for adapter in adapters[1:]:
        check_same_layout(adapters[0], adapter)
    shares = np.asarray(weights, np.float64)
    if (
        not adapters
        or len(adapters) != len(shares)
        or not (np.isfinite(shares).all() and shares.min() >= 0 < shares.sum())
    ):
        raise ValueError(f"weights must be finite, >= 0, not all 0, and one for each adapter, got {list(weights)}")
    shares = shares / shares.sum()

    def of_part(place: tuple[str, slice]) -> tuple[float, float]:
        prefix, part = place
        pairs = [Factors(*(factor[part] for factor in factors_of(adapter, prefix))) for adapter in adapters]
        return _squared_gap_and_length(pairs, shares)

    prefixes = lora_prefixes(adapters[0])
    squares = each(
        of_part, [(prefix, part) for prefix in prefixes for part in _parts(adapters[0], prefix, len(adapters))]
    )
    gap, length = (sum(side) for side in zip((0.0, 0.0), *squares, strict=True))
    if gap == 0:
        return 0.0
    return math.sqrt(gap / length) if length > 0 else math.inf


def _squared_gap_and_length(pairs: Sequence[Factors], shares: NDArray[np.float64]) -> tuple[float, float]:
    """Squared norms of mean(B A) - mean(B) mean(A) and of mean(B A).

    The first is the covariance mean((B - mean B)(A - mean A)), in which nothing cancels; mean(B A) is that and
    mean(B) mean(A). Both follow from the inner products of the centred products and mean(B) mean(A), the last.
    """
    products = gram(Factors(*(_centred(np.stack(factor), shares) for factor in zip(*pairs, strict=True))))
    of_covariance, of_mean = np.append(shares, 0.0), np.append(shares, 1.0)
    squared_gap = of_covariance @ products @ of_covariance
    squared_length = of_mean @ products @ of_mean
    return float(np.maximum(squared_gap, 0.0).sum()), float(np.maximum(squared_length, 0.0).sum())


def _centred(stack: NDArray[np.floating], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K + 1, ...) from (K, ...): each without the mean, and the mean."""
    centred = np.empty((len(stack) + 1, *stack.shape[1:]), np.float64)
    np.copyto(centred[:-1], stack)
    centred[-1] = np.tensordot(shares, centred[:-1], axes=1)
    centred[:-1] -= centred[-1]
    return centred


def _parts(adapter: Arrays, prefix: str, num_sites: int) -> list[slice]:
    """Ranges of the first axis that fit in memory as float64: of experts, or all of a dense pair."""
    if not is_expert_array(prefix):
        return [slice(None)]
    return expert_slices(factors_of(adapter, prefix)._asdict(), num_sites)


def _transposed(matrix: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.swapaxes(matrix, -1, -2)
