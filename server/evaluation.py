"""The evaluation matrix of a run: every model on every set, from what the sites tell and what the server measures.

A score is a row: ``model`` (base, global or personal), ``of`` (the site whose model it is, or null), ``on`` (the set: a
site's held-out data or, between stars, a general one) and the numbers of ``client.evaluation.measured.Score``. A
simulation has personal models on everyone's data. Over real sites a personal model stays where it is and so do the
data: there is its row on its own site's data alone, and general sets are known at the server only.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.evaluation.examination import EvalSet, one_adapter, scored
from client.evaluation.measured import (
    BASE,
    GLOBAL,
    LOWER_IS_BETTER,
    METRICS,
    MODELS,
    PERSONAL,
    Measured,
    Scored,
    is_general,
)
from client.model import AdaptedModel
from client.routing import routing_entropy
from conf.schema import Config
from strategies.adapters import Arrays

Row = Mapping[str, Any]


def scored_at_server(
    config: Config, adapted: AdaptedModel, adapter: Arrays | None, sets: Mapping[str, EvalSet]
) -> list[Scored]:
    """Base and global model on general sets; ``adapter`` is the global one, None if nobody has a global model."""
    initial = adapted.initial_adapter(config.seed)
    found = [*scored(BASE, one_adapter(adapted, initial, config), sets, adapted, config)]
    if adapter is not None:
        found += scored(GLOBAL, one_adapter(adapted, {**initial, **adapter}, config), sets, adapted, config)
    return found


def put_together(measured: Mapping[str, Measured], here: Sequence[Scored]) -> dict[str, Any]:
    """The matrix as JSON values: ``summary``, ``cost``, ``routing`` and the rows, ``scores``.

    Args:
        measured: Site -> what it told.
        here: What the server scored.
    """
    rows = [_row(each, None) for each in here]
    for site, part in sorted(measured.items()):
        rows += [_row(each, site) for each in part.scores]
    order = {model: place for place, model in enumerate(MODELS)}
    rows.sort(key=lambda row: (order[row["model"]], row["of"] or "", is_general(row["on"]), row["on"]))
    return {
        "summary": summarised(rows),
        "cost": {site: asdict(part.cost) for site, part in sorted(measured.items()) if part.cost is not None},
        "routing": routing(measured),
        "scores": rows,
    }


def summarised(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """Model -> metric -> over the sites, each on its own data: mean, worst, worst_site, std, spread; and ``general``.

    All sites count alike; std is that of the sites at hand (no sample of others), spread the best less the worst.
    ``general`` has the general sets by name, for personal models their mean over the sites.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        metrics = {metric: _over_sites(of_model, metric) for metric in METRICS}
        found[model] = {metric: values for metric, values in metrics.items() if values}
    return found


def routing(measured: Mapping[str, Measured]) -> dict[str, dict[str, Any]]:
    """Layer -> how the sites' models in use spread the tokens of their own held-out data over its experts.

    ``entropy``, over that of equal use (``client.routing.routing_entropy``), and ``load``, each expert's share, are
    means over the sites, ``largest_share`` is that of the busiest expert of any; ``sites`` has the three of each.
    """
    found = {}
    for layer in dict.fromkeys(layer for part in measured.values() for layer in part.routing):
        uses = {site: part.routing[layer] for site, part in sorted(measured.items()) if layer in part.routing}
        sites = {site: _use(np.array(use.shares)) for site, use in uses.items()}
        found[layer] = {
            "entropy": statistics.fmean(use["entropy"] for use in sites.values()),
            "largest_share": max(use["largest_share"] for use in sites.values()),
            "load": np.mean([use.shares for use in uses.values()], axis=0).round(6).tolist(),
            "sites": sites,
        }
    return found


def _use(shares_E: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "entropy": routing_entropy(shares_E),
        "largest_share": float(shares_E.max()),
        "load": [round(share, 6) for share in shares_E.tolist()],
    }


def _row(each: Scored, site: str | None) -> dict[str, Any]:
    return {
        "model": each.model,
        "of": site if each.model == PERSONAL else None,
        "on": each.on,
        **asdict(each.score),
    }


def _over_sites(rows: Sequence[Row], metric: str) -> dict[str, Any]:
    """One model's numbers over the sites' own data; empty if there are none."""
    own = {
        row["on"]: row[metric]
        for row in rows
        if not is_general(row["on"]) and row["of"] in {None, row["on"]} and row[metric] is not None
    }
    general: dict[str, list[float]] = {}
    for row in rows:
        if is_general(row["on"]) and row[metric] is not None:
            general.setdefault(row["on"], []).append(row[metric])
    if not own and not general:
        return {}
    found: dict[str, Any] = {"general": {name: statistics.fmean(values) for name, values in general.items()}}
    if own:
        worst = (max if metric in LOWER_IS_BETTER else min)(own, key=own.__getitem__)
        found |= {
            "mean": statistics.fmean(own.values()),
            "worst": own[worst],
            "worst_site": worst,
            "std": statistics.pstdev(own.values()),
            "spread": max(own.values()) - min(own.values()),
        }
    return found
