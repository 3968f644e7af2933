"""A step in which every site's direction has an almost equal say, from inner products of their updates alone.

Shapes: C sites, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from strategies import experts
from strategies.quotient import CANCELLED, divided


@dataclass(frozen=True, kw_only=True)
class EqualSay:
    """The step of each expert as a sum of its sites' updates, and what it means for each site."""

    coefficients: NDArray[np.float64]
    """(C, E) factor of each update in the step; 0 for a site without a say."""
    weight: NDArray[np.float64]
    """(C, E) share of each site's direction in the sum of directions; a column sums to 1, or to 0."""
    cosine: NDArray[np.float64]
    """(C, E) between the update and the step; NaN for a site without a say, or if there is no step."""
    conflict: NDArray[np.float64]
    """(C, E) 1 where that cosine is negative, else 0; NaN for a site without a say."""
    scale: NDArray[np.float64]
    """(E,) length of the step over that of the updates' mean by examples; NaN if that is 0."""
    pair_cosine: NDArray[np.float64]
    """(E,) mean cosine of two sites' updates; NaN with less than two sites that have a say."""


def has_say(gram_ECC: NDArray[np.float64], examples_CE: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(E, C) whether a site used the expert and changed it; the arguments are those of ``equal_say``."""
    return np.asarray((examples_CE.T > 0) & (np.diagonal(gram_ECC, axis1=-2, axis2=-1) > 0))


def common_share(pair_cosine: float, num_sites_E: NDArray[np.integer]) -> NDArray[np.float64]:
    """(E,) how much of the squared length of the sites' mean direction is what they have in common, in [0, 1].

    Of C unit directions whose pairs have the mean cosine p, the mean's squared length is (1 + (C - 1) p) / C. If they
    are one common part and, beside it, parts of their own that are orthogonal on average, p is the squared length of
    the common part, and C p / (1 + (C - 1) p) its share in that of the mean: what a mean of C measurements is shrunk
    by, to be nearest in mean squared error to what they measure (James & Stein, 1961). 0 where p is negative. Fewer
    than two sites have nobody to differ from: by convention 1.

    Args:
        pair_cosine: p, in [-1, 1].
        num_sites_E: C, >= 0.
    """
    common = max(pair_cosine, 0.0)
    others_E = np.maximum(num_sites_E - 1, 0)
    return np.where(others_E > 0, num_sites_E * common / (1.0 + others_E * common), 1.0)


def equal_say(
    gram_ECC: NDArray[np.float64],
    examples_CE: NDArray[np.floating],
    *,
    ridge: float | None,
    step: float | NDArray[np.float64],
) -> EqualSay:
    """The step of each expert, from the inner products ``gram_ECC`` of its sites' updates.

    With U the updates at unit length, one a row, of the sites that have a say,

        a = max(0, (U U^T + ridge I)^-1 1),   u = U^T a / sum(a),   d = min(step, 1 / ||u||) m u

    where m is the mean length of the updates by examples. As ``ridge`` goes to 0, all sites' directions have the same
    inner product with u (IMTL-G, Liu et al., 2021, https://openreview.net/forum?id=IMPnRXEWpvr, on directions); a
    large one leaves the plain mean of the directions, in which sites count alike whatever their length and examples.
    Sites that agree share one say. With ``ridge`` None nobody's say is equal: m u is the updates' mean by examples.

    Averaging C orthogonal directions leaves 1 / sqrt(C) of their length, which ``step`` makes up for; m is the limit,
    so that one site's update, or several equal ones, are never lengthened, and whole from a step of 1 on. Where
    directions cancel, the step fades with them. Lengths have no equal say: one site's update that is a hundred times
    as long as the others' makes the step long in their directions too.

    Args:
        gram_ECC: Inner products of the updates, whole experts.
        examples_CE: Training examples of each site; 0 takes away its say in an expert it did not use. So does an
            update of length 0.
        ridge: > 0, or None.
        step: > 0, of all experts or (E,).
    """
    length_EC = np.sqrt(np.maximum(np.diagonal(gram_ECC, axis1=-2, axis2=-1), 0.0))
    has_say_EC = has_say(gram_ECC, examples_CE)
    inverse_EC = np.divide(1.0, length_EC, out=np.zeros_like(length_EC), where=has_say_EC)
    cosines_ECC = gram_ECC * inverse_EC[:, :, None] * inverse_EC[:, None, :]
    by_examples_EC = experts.shares(np.where(has_say_EC, examples_CE.T, 0.0).T).T
    says_EC = by_examples_EC * length_EC if ridge is None else _says(cosines_ECC, has_say_EC, ridge)
    share_EC = experts.shares(says_EC.T).T
    dot_EC = np.einsum("ecd,ed->ec", cosines_ECC, share_EC)
    squared_E = np.einsum("ec,ec->e", share_EC, dot_EC)
    mean_E = np.sqrt(np.where(squared_E > CANCELLED, squared_E, 0.0))
    typical_E = (by_examples_EC * length_EC).sum(axis=-1)
    factor_E = np.minimum(step, divided(1.0, mean_E, otherwise=np.inf)) * typical_E
    averaged_E = np.sqrt(np.maximum(np.einsum("ec,ecd,ed->e", by_examples_EC, gram_ECC, by_examples_EC), 0.0))
    num_E = has_say_EC.sum(axis=-1)
    of_pairs_E = cosines_ECC.sum(axis=(-2, -1)) - np.einsum("ecc->e", cosines_ECC)
    cosine_EC = np.where(has_say_EC, divided(dot_EC, mean_E[:, None], otherwise=np.nan), np.nan)
    return EqualSay(
        coefficients=(factor_E[:, None] * share_EC * inverse_EC).T,
        weight=share_EC.T,
        cosine=cosine_EC.T,
        conflict=np.where(has_say_EC, cosine_EC < 0, np.nan).T,
        scale=divided(factor_E * mean_E, averaged_E, otherwise=np.nan),
        pair_cosine=divided(of_pairs_E, (num_E * (num_E - 1)).astype(np.float64), otherwise=np.nan),
    )


def _says(cosines_ECC: NDArray[np.float64], has_say_EC: NDArray[np.bool_], ridge: float) -> NDArray[np.float64]:
    """(E, C) ``max(0, (U U^T + ridge I)^-1 1)``; a site without a say has a zero row in U, and gets 0."""
    ridged_ECC = cosines_ECC + ridge * np.eye(cosines_ECC.shape[-1])
    return np.asarray(np.maximum(np.linalg.solve(ridged_ECC, has_say_EC[..., None].astype(np.float64))[..., 0], 0.0))
