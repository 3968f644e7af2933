"""Weights of several objectives from their gradients: the regularised min-norm problem of FIRM.

Shapes: M objectives, D parameters.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from strategies.simplex import minimiser

REGULARISERS = ("ridge", "anchor", "weighted")


def gram_matrix(gradients_MD: NDArray[np.floating]) -> NDArray[np.float64]:
    """Inner products (M, M) of the objectives' gradients, in float64."""
    gradients = np.asarray(gradients_MD, np.float64)
    return gradients @ gradients.T


def normalised_gram(gram_MM: NDArray[np.floating]) -> NDArray[np.float64]:
    """A Gram matrix over the mean squared length of its gradients, so that one beta fits every step and model.

    Gradients that are all zero stay zero.

    Raises:
        ValueError: If it is not a finite, symmetric matrix with a diagonal >= 0.
    """
    gram = _checked(gram_MM)
    mean_square = np.trace(gram) / len(gram)
    return gram / mean_square if mean_square > 0 else gram


def positive_part(symmetric_MM: NDArray[np.floating]) -> NDArray[np.float64]:
    """The nearest Gram matrix: eigenvalues below zero set to zero (Higham 1988, in the Frobenius norm)."""
    values, vectors = np.linalg.eigh(np.asarray(symmetric_MM, np.float64))
    found: NDArray[np.float64] = (vectors * np.maximum(values, 0)) @ vectors.T
    return (found + found.T) / 2


def min_norm_weights(
    gram_MM: NDArray[np.floating],
    *,
    regulariser: str,
    beta: float,
    preference: NDArray[np.floating] | None = None,
) -> NDArray[np.float64]:
    """The weights lambda on the simplex that minimise ``lambda' Q lambda`` plus a regulariser; (M,) float64.

    With the preference p, by default 1 / M each, the regulariser is

    * ``ridge``: beta / 2 * ||lambda||^2, which knows no preference;
    * ``anchor``: beta / 2 * ||lambda - p||^2;
    * ``weighted``: beta / 2 * sum_j lambda_j^2 / p_j.

    beta = 0 is MGDA (Desideri 2012), and beta -> infinity the fixed weights p. In between, the problem is
    beta-strongly convex, so weights lambda, lambda' of two sites with Gram matrices Q, Q' differ by at most
    (2 / beta) ||(Q - Q') lambda||: what keeps sites from pulling in different directions.

    FIRM's own text is not public beyond its abstract (https://arxiv.org/abs/2511.16992), which says that each client
    solves a regularised multi-objective problem and that preferences can be given. The three forms are ours.

    Args:
        gram_MM: Inner products of the gradients, best normalised (``normalised_gram``).
        regulariser: One of ``REGULARISERS``.
        beta: Strength, >= 0.
        preference: Weights >= 0 that sum to 1; > 0 under ``weighted``. None: equal ones.

    Raises:
        ValueError: If an argument is none of the above, or ``ridge`` is given unequal preferences.
    """
    gram = _checked(gram_MM)
    if regulariser not in REGULARISERS:
        raise ValueError(f"regulariser must be one of {REGULARISERS}, got {regulariser!r}")
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be a finite number >= 0, got {beta!r}")
    p = _preference(preference, len(gram))
    if regulariser == "ridge" and np.ptp(p) > 0:
        raise ValueError(f"regulariser=ridge knows no preference, got {p.tolist()}: take anchor or weighted")
    if regulariser == "weighted" and not (p > 0).all():
        raise ValueError(f"regulariser=weighted needs preferences > 0, got {p.tolist()}: take anchor")
    diagonal = 1 / p if regulariser == "weighted" else np.ones(len(p))
    linear = -beta * p if regulariser == "anchor" else np.zeros(len(p))
    return minimiser(2 * gram + beta * np.diag(diagonal), linear)


def _checked(gram_MM: NDArray[np.floating]) -> NDArray[np.float64]:
    gram = np.asarray(gram_MM, np.float64)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not gram.size:
        raise ValueError(f"a Gram matrix must be (M, M), got the shape {gram.shape}")
    if not np.isfinite(gram).all():
        raise ValueError("the Gram matrix of the objectives' gradients holds NaN or infinity")
    if np.abs(gram - gram.T).max() > 1e-5 * np.abs(gram).max() or np.diag(gram).min() < 0:
        raise ValueError("a Gram matrix must be symmetric, with a diagonal >= 0")
    return (gram + gram.T) / 2


def _preference(preference: NDArray[np.floating] | None, num_objectives: int) -> NDArray[np.float64]:
    if preference is None:
        return np.full(num_objectives, 1 / num_objectives)
    p = np.asarray(preference, np.float64)
    if p.shape != (num_objectives,) or not (p >= 0).all() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"the preference must be {num_objectives} weights >= 0 that sum to 1, got {p.tolist()}")
    return p
