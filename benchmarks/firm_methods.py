"""One round of FIRM and of what it is compared with, on problems that give gradients: pure functions.

Shapes: C sites, M objectives, D parameters. METHODS.md's section on FIRM has the sources; what is open there is said
at each function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.firm_problems import Array, Problem
from client.alignment.min_norm import gram_matrix, min_norm_weights, normalised_gram
from strategies.fedcmoo import next_weights
from strategies.simplex import Weights, minimiser


@dataclass(frozen=True)
class Schedule:
    """How sites train in a round."""

    local_steps: int = 5
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Round:
    """What one round yields."""

    point_D: Array
    """The next global parameters."""
    weights_CM: Weights
    """Each site's weights, mean over its local steps."""
    drift: float
    """Mean squared distance of the sites' parameters to their mean."""
    numbers_up: int
    """Numbers that a site sends."""
    bound: float = 0.0
    """Largest ratio over pairs of sites, at their first step, of how far their weights lie apart to the bound
    (2 / beta) ||(Q - Q') lambda||; 0 where there is none."""


Play = Callable[[Problem, Array, Weights, np.random.Generator], Round]
"""A method's round from the global parameters and the last round's mean weights."""

_Weigh = Callable[[Array], Weights]
"""(C, M, D) gradients to (C, M) weights."""


def spread(rows: NDArray[np.floating]) -> float:
    """Mean squared distance of the rows to their mean: disagreement of weights, drift of parameters."""
    return float(((rows - rows.mean(axis=0)) ** 2).sum(axis=-1).mean())


def firm(regulariser: str, beta: float, preference_M: Weights | None = None, schedule: Schedule = Schedule()) -> Play:
    """FIRM; beta = 0 is local MGDA. Each site weighs its objectives at each of its steps, and sends parameters once."""

    def weights_of(gram: Array) -> Weights:
        return min_norm_weights(gram, regulariser=regulariser, beta=beta, preference=preference_M)

    def weigh(gradients_CMD: Array) -> Weights:
        return np.stack([weights_of(normalised_gram(gram_matrix(gradients))) for gradients in gradients_CMD])

    def play(problem: Problem, point_D: Array, last_M: Weights, rng: np.random.Generator) -> Round:  # noqa: ARG001
        first: list[Array] = []

        def watched(gradients_CMD: Array) -> Weights:
            first.append(gradients_CMD)
            return weigh(gradients_CMD)

        points_CD, weights_CM = _trained(problem, point_D, watched, schedule, rng)
        bound = _bound_ratio(first[0], weigh(first[0]), beta) if beta else 0.0
        return Round(points_CD.mean(axis=0), weights_CM, spread(points_CD), points_CD.shape[1], bound)

    return play


def scalarised(preference_M: Weights, schedule: Schedule = Schedule()) -> Play:
    """FedAvg on the weighted sum."""

    def play(problem: Problem, point_D: Array, last_M: Weights, rng: np.random.Generator) -> Round:  # noqa: ARG001
        points_CD, weights_CM = _trained(problem, point_D, _fixed(preference_M, problem), schedule, rng)
        return Round(points_CD.mean(axis=0), weights_CM, spread(points_CD), points_CD.shape[1])

    return play


def fsmgda(schedule: Schedule = Schedule()) -> Play:
    """FSMGDA (Yang et al. 2023): every objective is trained by itself, M uploads, min-norm weights at the server."""

    def play(problem: Problem, point_D: Array, last_M: Weights, rng: np.random.Generator) -> Round:
        num = len(last_M)
        alone = [_trained(problem, point_D, _fixed(one, problem), schedule, rng)[0] for one in np.eye(num)]
        changes_MD = np.stack([points_CD.mean(axis=0) - point_D for points_CD in alone])
        weights_M = minimiser(2 * gram_matrix(changes_MD), np.zeros(num))
        drift = float(np.mean([spread(points_CD) for points_CD in alone]))
        weights_CM = np.tile(weights_M, (problem.num_sites, 1))
        return Round(point_D + weights_M @ changes_MD, weights_CM, drift, changes_MD.size)

    return play


def fedcmoo(compression: str, schedule: Schedule = Schedule()) -> Play:
    """FedCMOO (Askin et al. 2024): one set of weights for all sites, from their gradients at the global parameters.

    The sites' gradients are compressed to about D numbers: by the best approximation of rank 1 (``svd``) or by the
    largest D / 2 entries and their places (``topk``); or sent whole (``none``).
    """

    def play(problem: Problem, point_D: Array, last_M: Weights, rng: np.random.Generator) -> Round:
        at_start_CD = np.tile(point_D, (problem.num_sites, 1))
        gradients_CMD = problem.gradients(at_start_CD, rng)
        _, num, size = gradients_CMD.shape
        if compression == "svd":
            sent, numbers = [truncated(one, rank=1) for one in gradients_CMD], num + size
        elif compression == "topk":
            sent, numbers = [sparsified(one, size // 2) for one in gradients_CMD], 2 * (size // 2)
        else:
            sent, numbers = list(gradients_CMD), num * size
        weights_M = next_weights(gram_matrix(np.mean(sent, axis=0)), last_M)
        points_CD, weights_CM = _trained(problem, point_D, _fixed(weights_M, problem), schedule, rng)
        return Round(points_CD.mean(axis=0), weights_CM, spread(points_CD), size + numbers)

    return play


def _fixed(weights_M: Weights, problem: Problem) -> _Weigh:
    return lambda _: np.tile(weights_M, (problem.num_sites, 1))


def _trained(
    problem: Problem, point_D: Array, weigh: _Weigh, schedule: Schedule, rng: np.random.Generator
) -> tuple[Array, Weights]:
    """Each site's parameters (C, D) after its local steps, and (C, M) its mean weights."""
    points_CD = np.tile(point_D, (problem.num_sites, 1))
    history = []
    for _ in range(schedule.local_steps):
        gradients_CMD = problem.gradients(points_CD, rng)
        history.append(weigh(gradients_CMD))
        points_CD = points_CD - schedule.learning_rate * np.einsum("cm,cmd->cd", history[-1], gradients_CMD)
    return points_CD, np.mean(history, axis=0)


def _bound_ratio(gradients_CMD: Array, weights_CM: Weights, beta: float) -> float:
    grams_CMM = np.stack([normalised_gram(gram_matrix(gradients)) for gradients in gradients_CMD])
    apart_CC = np.linalg.norm(weights_CM[:, None] - weights_CM, axis=-1)
    felt_CCM = np.einsum("cdmn,cn->cdm", grams_CMM[:, None] - grams_CMM, weights_CM)
    pairs_CC = ~np.eye(len(grams_CMM), dtype=bool)
    return float((apart_CC[pairs_CC] / (2 / beta * np.linalg.norm(felt_CCM, axis=-1)[pairs_CC])).max())


def truncated(gradients_MD: NDArray[np.floating], rank: int) -> NDArray[np.float64]:
    """The nearest M gradients of the given rank: rank * (M + D) numbers to send.

    The authors draw a randomised singular value decomposition; of so few rows the exact one costs less.
    """
    left, values, right = np.linalg.svd(gradients_MD.astype(np.float64), full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


def sparsified(gradients_MD: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """All but the ``count`` entries largest in size set to zero: as many values, and their places, to send."""
    flat = gradients_MD.astype(np.float64).ravel()
    kept = np.zeros_like(flat)
    largest = np.argpartition(-np.abs(flat), count - 1)[:count]
    kept[largest] = flat[largest]
    return kept.reshape(gradients_MD.shape)
