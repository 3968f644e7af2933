"""Objectives in conflict whose Pareto set is known exactly: quadratics, bumps, and a policy over the arms of bandits.

Losses: lower is better. Shapes: C sites, M objectives, D parameters, S contexts, A arms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from strategies.simplex import minimiser

Array = NDArray[np.float64]


class Problem(Protocol):
    """M losses, each the mean over the sites' own.

    The Pareto set of each kind is the convex hull of the objectives' own optima.
    """

    @property
    def num_sites(self) -> int:
        """C."""

    @property
    def start(self) -> Array:
        """(D,): where training starts."""

    @property
    def optima(self) -> Array:
        """(M, D): where each global objective is least."""

    def gradients(self, points_CD: Array, rng: np.random.Generator) -> Array:
        """(C, M, D): each site's noisy gradients of its own objectives, at its own point."""

    def losses(self, point_D: Array) -> Array:
        """(M,): the global objectives, exact."""

    def best(self, preference_M: Array) -> Array:
        """(D,): where the weighted sum of the global objectives is least."""


def distance_to_pareto_set(problem: Problem, point_D: Array) -> float:
    """Distance to the convex hull of the optima: a min-norm problem of its own."""
    ways_MD = problem.optima - point_D
    weights = minimiser(ways_MD @ ways_MD.T, np.zeros(len(ways_MD)))
    return float(np.linalg.norm(weights @ ways_MD))


@dataclass(frozen=True)
class Quadratics:
    """``f_cj(x) = h_j / 2 ||x - a_cj||^2``: sites agree on how steep an objective is, not on where it is least.

    The global objectives are h_j / 2 ||x - mean_c a_cj||^2 up to a constant.
    """

    centres_CMD: Array
    steepness_M: Array
    noise: float
    """Standard deviation of each entry of a gradient."""

    @classmethod
    def drawn(cls, rng: np.random.Generator, num_objectives: int, num_sites: int = 8, size: int = 20) -> Quadratics:
        """Optima at right angles and at distance 1, each site's own about 1 from them; steepness 1, 2, 4."""
        optima_MD = np.linalg.qr(rng.normal(size=(size, num_objectives)))[0].T
        apart_CMD = rng.normal(size=(num_sites, num_objectives, size)) / np.sqrt(size)
        centres = optima_MD + apart_CMD - apart_CMD.mean(axis=0)
        return cls(centres, np.exp2(np.arange(num_objectives, dtype=np.float64)), noise=0.1)

    @property
    def num_sites(self) -> int:
        """C."""
        return len(self.centres_CMD)

    @property
    def start(self) -> Array:
        """Twice as far from the origin as the optima, away from them."""
        return np.asarray(-2 * self.optima.mean(axis=0))

    @property
    def optima(self) -> Array:
        """(M, D)."""
        return np.asarray(self.centres_CMD.mean(axis=0))

    def gradients(self, points_CD: Array, rng: np.random.Generator) -> Array:
        """(C, M, D)."""
        exact = self.steepness_M[:, None] * (points_CD[:, None] - self.centres_CMD)
        return exact + self.noise * rng.normal(size=exact.shape)

    def losses(self, point_D: Array) -> Array:
        """(M,), without the constants."""
        return np.asarray(self.steepness_M / 2 * ((point_D - self.optima) ** 2).sum(axis=1))

    def best(self, preference_M: Array) -> Array:
        """The centres' mean, weighted by preference times steepness."""
        pulls = preference_M * self.steepness_M
        return np.asarray(pulls @ self.optima / pulls.sum())


@dataclass(frozen=True)
class Bumps:
    """``f_cj(x) = 1 - exp(-||x - a_j||^2) + <b_cj, x>`` for two objectives, with b_cj that cancel over the sites.

    The global objectives are those of Fonseca and Fleming (1995, https://doi.org/10.1162/evco.1995.3.1.1): their front
    is concave in its middle, where no weighted sum is least.
    """

    optima_MD: Array
    pulls_CMD: Array
    """b: what each site's own objectives add."""
    noise: float
    """Standard deviation of each entry of a gradient."""

    @classmethod
    def drawn(cls, rng: np.random.Generator, num_sites: int = 8, size: int = 20) -> Bumps:
        """Optima at distance 2, each site's pull about 0.3 long."""
        direction_D = rng.normal(size=size)
        direction_D /= np.linalg.norm(direction_D)
        pulls_CMD = 0.3 * rng.normal(size=(num_sites, 2, size)) / np.sqrt(size)
        return cls(np.stack([direction_D, -direction_D]), pulls_CMD - pulls_CMD.mean(axis=0), noise=0.05)

    @property
    def num_sites(self) -> int:
        """C."""
        return len(self.pulls_CMD)

    @property
    def start(self) -> Array:
        """As far from one optimum as from the other, half of their distance from the middle between them."""
        aside_D = np.eye(self.optima_MD.shape[1])[0]
        aside_D -= (aside_D @ self.optima_MD[0]) * self.optima_MD[0]
        return np.asarray(aside_D / np.linalg.norm(aside_D))

    @property
    def optima(self) -> Array:
        """(M, D)."""
        return self.optima_MD

    def gradients(self, points_CD: Array, rng: np.random.Generator) -> Array:
        """(C, M, D)."""
        ways_CMD = points_CD[:, None] - self.optima_MD
        exact = 2 * ways_CMD * np.exp(-(ways_CMD**2).sum(axis=-1, keepdims=True)) + self.pulls_CMD
        return np.asarray(exact + self.noise * rng.normal(size=exact.shape))

    def losses(self, point_D: Array) -> Array:
        """(M,)."""
        return np.asarray(1 - np.exp(-((point_D - self.optima_MD) ** 2).sum(axis=1)))

    def best(self, preference_M: Array) -> Array:
        """The best of 2,001 points between the optima: the Pareto set has all that can be least."""
        shares = np.linspace(0, 1, 2001)
        points = shares[:, None] * self.optima_MD[0] + (1 - shares)[:, None] * self.optima_MD[1]
        return np.asarray(points[int(np.argmin([preference_M @ self.losses(point) for point in points]))])


@dataclass(frozen=True)
class Bandit:
    """A softmax policy over A arms in S contexts; objective j is mean reward r_j minus tau KL to the uniform policy.

    The point is the policy's logits, centred in each context. Sites see contexts with their own frequencies and have
    their own rewards. The weighted sum's optimum is softmax(sum_j p_j r_j / tau), r_j the mean reward over the sites
    that see the context: in centred logits the Pareto set is the hull of r_j / tau.
    """

    rewards_CMSA: Array
    frequencies_CS: Array
    temperature: float
    """tau."""
    samples: int
    """Arms drawn in each context for a gradient; their mean reward is the baseline, as in a group of completions."""

    @classmethod
    def drawn(cls, rng: np.random.Generator, num_objectives: int = 2, num_sites: int = 8) -> Bandit:
        """Four contexts of five arms, the sites' rewards around common ones."""
        shape = (num_objectives, 4, 5)
        rewards = rng.normal(size=shape) + 0.7 * rng.normal(size=(num_sites, *shape))
        return cls(rewards, rng.dirichlet(np.ones(4), num_sites), temperature=0.5, samples=16)

    @property
    def num_sites(self) -> int:
        """C."""
        return len(self.rewards_CMSA)

    @property
    def start(self) -> Array:
        """The uniform policy."""
        return np.zeros(self.rewards_CMSA[0, 0].size)

    @property
    def common_rewards(self) -> Array:
        """(M, S, A): mean over the sites, in each context by how often they see it."""
        seen = self.frequencies_CS[:, None, :, None]
        return np.asarray((self.rewards_CMSA * seen).sum(axis=0) / seen.sum(axis=0))

    @property
    def optima(self) -> Array:
        """(M, D)."""
        logits = self.common_rewards / self.temperature
        return np.asarray((logits - logits.mean(axis=-1, keepdims=True)).reshape(len(logits), -1))

    def gradients(self, points_CD: Array, rng: np.random.Generator) -> Array:
        """(C, M, D): REINFORCE over drawn arms; the KL's part is exact."""
        policy_CSA = _softmax(points_CD.reshape(self.num_sites, *self.rewards_CMSA.shape[2:]))
        counts = rng.multinomial(self.samples, policy_CSA)
        drawn = counts / self.samples
        value = (drawn[:, None] * self.rewards_CMSA).sum(axis=-1, keepdims=True)
        # The baseline is the mean of the same draws: n / (n - 1) makes up for what that takes away.
        gain = drawn[:, None] * (self.rewards_CMSA - value) * self.samples / (self.samples - 1)
        surprise = np.log(policy_CSA)
        pull = policy_CSA * (surprise - (policy_CSA * surprise).sum(axis=-1, keepdims=True))
        ascent = gain - self.temperature * pull[:, None]
        gradient = -self.frequencies_CS[:, None, :, None] * ascent
        return np.asarray(gradient.reshape(*gradient.shape[:2], -1))

    def losses(self, point_D: Array) -> Array:
        """(M,): minus the mean over the sites of reward minus tau KL."""
        policy_SA = _softmax(point_D.reshape(self.rewards_CMSA.shape[2:]))
        divergence = (policy_SA * np.log(policy_SA * policy_SA.shape[-1])).sum(axis=-1)
        gained_MS = (policy_SA * self.common_rewards).sum(axis=-1) - self.temperature * divergence
        return -np.asarray(gained_MS @ self.frequencies_CS.mean(axis=0))

    def best(self, preference_M: Array) -> Array:
        """The mean of the optima, weighted by preference."""
        return np.asarray(preference_M @ self.optima)


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))
