"""FLEx at a site: a personal expert in each MoE layer, made of a pretrained one, trained here and never sent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from client.grafting.grafts import is_graft_array
from client.grafting.selection import Selection, select_experts
from client.methods.base import Beginning, Method
from client.model import AdaptedModel
from client.text import TokenSequence
from conf.methods import FlexConfig, MethodConfig
from strategies.adapters import Arrays

log = logging.getLogger("bouquet.client")


class Flex(Method):
    """FLEx's local half (2025, https://arxiv.org/abs/2506.00965): expert grafting.

    Before its first round a site finds the pretrained expert that alone comes nearest to each layer on its data
    (``client.grafting.selection``), and starts a graft from it (``client.grafting.grafts``). Graft and shared part
    are trained together; the latter is sent, graft and choice stay in the private store. Before that, and without a
    graft, a site uses the shared part alone, as the server does.

    Reconstructed, since the paper's formulas are known second-hand: the form of the gate, that all gates start at
    1/2, and that the graft is always on, beside the experts that the router chooses. ``start=exact`` is ours.
    """

    def __init__(self, config: MethodConfig) -> None:
        """Take the settings under ``method.graft.``."""
        assert isinstance(config, FlexConfig)
        self.graft = config.graft

    def shares(self, name: str) -> bool:
        """Everything trained is sent but the graft."""
        return not is_graft_array(name)

    def begin(
        self,
        adapted: AdaptedModel,
        adapter: Arrays,
        training: Sequence[TokenSequence],
        generator: np.random.Generator,
        batch_size: int,
    ) -> Beginning:
        """The adapter with a fresh graft on the experts selected now; to the run it tells how that went, not which.

        Metrics: graft_seconds; graft_spread, the mean over layers of ``LayerChoice.spread``; graft_ties, layers whose
        choice was a tie. The note is the ``Selection``.

        Raises:
            ValueError: If a router is not recognised.
        """
        assert self.graft is not None
        order = generator.permutation(len(training))[: self.graft.calibration_examples]
        adapted.load_adapter(adapter)
        found = select_experts(adapted, [training[index] for index in order], self.graft.num_experts, batch_size)
        ties = [layer for layer, choice in found.layers.items() if choice.is_tie]
        if ties:
            log.warning("the experts of %s reconstruct their layers equally well: as good as copies", ", ".join(ties))
        choices = {layer: choice.experts for layer, choice in found.layers.items()}
        return Beginning({**adapter, **adapted.grafted(choices, generator)}, _metrics(found), asdict(found))


def _metrics(found: Selection) -> dict[str, float]:
    layers = found.layers.values()
    return {
        "graft_seconds": found.seconds,
        "graft_spread": float(np.mean([choice.spread for choice in layers])),
        "graft_ties": float(sum(choice.is_tie for choice in layers)),
    }
