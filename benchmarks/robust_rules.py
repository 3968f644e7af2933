"""Rules to compare CLAIR with: they look at updates as vectors, and most are told how many sites are contaminated.

Each takes the received adapter, the updates and that number; it returns the next adapter and the positions of the
updates it left out, or None where the rule leaves nobody out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from strategies.adapters import Arrays, difference, norm
from strategies.base import ClientUpdate
from strategies.fc_moe import FcMoe
from strategies.fedavg import FedAvg
from strategies.screen import ScreenConfig, Screened, ScreenKind

Result = tuple[Arrays, set[int] | None]
Rule = Callable[[Arrays, Sequence[ClientUpdate], int], Result]


def averaged(received: Arrays, updates: Sequence[ClientUpdate], contaminated: int) -> Result:  # noqa: ARG001
    """No defence: the mean by examples."""
    return FedAvg().aggregate(received, {}, updates).adapter, None


def median(received: Arrays, updates: Sequence[ClientUpdate], contaminated: int) -> Result:  # noqa: ARG001
    """Coordinate median (Yin et al., 2018, https://arxiv.org/abs/1803.01498)."""
    return {name: np.median(_stack(updates, name), axis=0).astype(np.float32) for name in received}, None


def trimmed_mean(received: Arrays, updates: Sequence[ClientUpdate], contaminated: int) -> Result:
    """Coordinate mean without the ``contaminated`` largest and smallest values (Yin et al., 2018)."""
    trim = min(contaminated, (len(updates) - 1) // 2)
    kept = slice(trim, len(updates) - trim)
    return {n: np.sort(_stack(updates, n), axis=0)[kept].mean(axis=0).astype(np.float32) for n in received}, None


def krum(received: Arrays, updates: Sequence[ClientUpdate], contaminated: int) -> Result:
    """The update nearest to its neighbours (Blanchard et al., 2017, https://arxiv.org/abs/1703.02757)."""
    return _mean_of(received, updates, _by_krum(_squared_distances(updates), contaminated)[:1])


def multi_krum(received: Arrays, updates: Sequence[ClientUpdate], contaminated: int) -> Result:
    """The mean of the updates with the best Krum scores, all but ``contaminated``."""
    return _mean_of(
        received, updates, _by_krum(_squared_distances(updates), contaminated)[: len(updates) - contaminated]
    )


def bulyan(received: Arrays, updates: Sequence[ClientUpdate], contaminated: int) -> Result:
    """Krum again and again, then a trimmed mean around the median (El Mhamdi et al., 2018, arXiv 1802.07927).

    Beyond its limit n >= 4 f + 3 it is told of the largest f within it.
    """
    limit = min(contaminated, max(0, (len(updates) - 3) // 4))
    apart = _squared_distances(updates)
    chosen: list[int] = []
    rest = list(range(len(updates)))
    while len(chosen) < len(updates) - 2 * limit:
        best = rest[_by_krum(apart[np.ix_(rest, rest)], limit)[0]]
        chosen.append(best)
        rest.remove(best)
    count = max(1, len(chosen) - 2 * limit)
    stepped = {}
    for name in received:
        stacked = _stack([updates[i] for i in chosen], name)
        order = np.argsort(np.abs(stacked - np.median(stacked, axis=0)), axis=0)[:count]
        stepped[name] = np.take_along_axis(stacked, order, axis=0).mean(axis=0).astype(np.float32)
    return stepped, set(rest)


def norm_clipping(received: Arrays, updates: Sequence[ClientUpdate], contaminated: int) -> Result:  # noqa: ARG001
    """The mean of updates shortened to their median length; FLTrust without the server's own data."""
    steps = [difference(update.adapter, received) for update in updates]
    lengths = [norm(step) for step in steps]
    limit = float(np.median(lengths))
    scales = [min(1.0, limit / length) if length > 0 else 1.0 for length in lengths]
    return {
        name: (before + np.mean([s * step[name] for s, step in zip(scales, steps, strict=True)], axis=0)).astype(
            np.float32
        )
        for name, before in received.items()
    }, None


def behind_clair(received: Arrays, updates: Sequence[ClientUpdate]) -> dict[str, Result]:
    """Strategies behind CLAIR's verdicts, which are made once for all; it is told nothing.

    ``whole sites`` leaves no single expert out.
    """
    screen = Screened(inner=FedAvg(), screen=ScreenConfig(kind=ScreenKind.clair))
    verdicts, _ = screen.judge(received, {}, updates)
    rejected = {i for i, update in enumerate(updates) if verdicts[update.site].rejected}
    trusted = screen.trusted(received, updates, verdicts)
    whole = [update for i, update in enumerate(updates) if i not in rejected]
    return {
        "CLAIR": (FedAvg().aggregate(received, {}, trusted).adapter, rejected),
        "CLAIR, whole sites": (FedAvg().aggregate(received, {}, whole).adapter, rejected),
        "CLAIR + FC-MoE": (FcMoe().aggregate(received, {}, trusted).adapter, rejected),
    }


RULES: Mapping[str, Rule] = {
    "none": averaged,
    "median": median,
    "trimmed mean": trimmed_mean,
    "Krum": krum,
    "Multi-Krum": multi_krum,
    "Bulyan": bulyan,
    "norm clipping": norm_clipping,
}


def _squared_distances(updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
    """(K, K) between whole adapters."""
    gram = np.zeros((len(updates), len(updates)))
    for name in updates[0].adapter:
        values = _stack(updates, name).reshape(len(updates), -1)
        gram += values @ values.T
    squares = np.diagonal(gram)
    return np.asarray(np.maximum(squares[:, None] + squares - 2 * gram, 0.0))


def _by_krum(squared_distances: NDArray[np.float64], contaminated: int) -> list[int]:
    """Positions by the sum of squared distances to the nearest n - f - 2 others, the smallest first."""
    near = max(1, len(squared_distances) - contaminated - 2)
    scores = np.sort(squared_distances, axis=1)[:, 1 : near + 1].sum(axis=1)
    return [int(i) for i in np.argsort(scores, kind="stable")]


def _mean_of(received: Arrays, updates: Sequence[ClientUpdate], kept: Sequence[int]) -> Result:
    return averaged(received, [updates[i] for i in kept], 0)[0], set(range(len(updates))) - set(kept)


def _stack(updates: Sequence[ClientUpdate], name: str) -> NDArray[np.float64]:
    return np.stack([update.adapter[name] for update in updates]).astype(np.float64)
