"""FedMoE: an expert, and its row of the router, is averaged over the sites that used it.

Shapes: C sites, E experts of one MoE layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strategies import experts
from strategies.adapters import Arrays, weighted_mean
from strategies.base import Aggregation, ClientUpdate, Strategy
from strategies.expert_rounds import check_expert_tokens


@dataclass(kw_only=True)
class FedMoe(Strategy):
    """FedAvg in which a site that routed no token to an expert has no say in it.

    Modular aggregation of "FedMoE", Mei et al., 2024. https://arxiv.org/abs/2408.11304

    An expert that no site used keeps its value, one that a single site used becomes that site's, and a trained
    router's row follows its expert; all else is averaged by examples. The paper also prunes the model to
    a sub-MoE for each site, chosen by its activations; here every site trains the whole model, as does the baseline
    of this name in FC-MoE's and FedAlign-MoE's comparisons. Sites count by examples throughout.
    """

    name: ClassVar[str] = "fedmoe"

    def check_update(self, adapter: Arrays, update: ClientUpdate) -> None:
        """Raise ``ValueError`` if the update is not valid, or does not count the tokens of every expert."""
        super().check_update(adapter, update)
        check_expert_tokens(adapter, update)

    def aggregate(self, adapter: Arrays, state: Arrays, updates: Sequence[ClientUpdate]) -> Aggregation:
        """The mean of each expert over those who used it, and of the other arrays over all.

        Diagnostics: ``experts`` -> layer -> ``sites`` (names, in the order of the rows below); ``tokens`` and
        ``weight`` as [site][expert].
        """
        modular = {layer: arrays | _router(layer, adapter) for layer, arrays in experts.by_layer(adapter).items()}
        dense = adapter.keys() - {name for arrays in modular.values() for name in arrays}
        averaged = weighted_mean(
            [{name: update.adapter[name] for name in dense} for update in updates],
            [update.num_examples for update in updates],
        )
        report = {}
        for layer, arrays in modular.items():
            tokens_CE = np.stack([update.expert_tokens[layer] for update in updates])
            weights_CE = _users_by_examples(tokens_CE, updates)
            trained = [{name: update.adapter[name] for name in arrays} for update in updates]
            averaged |= experts.weighted_mean(arrays, trained, weights_CE)
            report[layer] = {
                "sites": [update.site for update in updates],
                "tokens": tokens_CE.tolist(),
                "weight": weights_CE.tolist(),
            }
        ordered = {name: averaged[name] for name in adapter}
        return Aggregation(adapter=ordered, state=state, diagnostics={"experts": report})


def _users_by_examples(tokens_CE: NDArray[np.floating], updates: Sequence[ClientUpdate]) -> NDArray[np.float64]:
    """(C, E) share of each site in each expert: its examples over those of all sites that used the expert."""
    examples_C = np.array([update.num_examples for update in updates], np.float64)
    return experts.shares(np.where(tokens_CE > 0, examples_C[:, None], 0.0))


def _router(layer: str, adapter: Arrays) -> dict[str, NDArray[np.floating]]:
    """The trained arrays of the layer's router; like an expert array, each has a row for every expert."""
    return {
        name: array for name, array in adapter.items() if name.startswith(f"{layer}.") and experts.is_router_array(name)
    }
