"""FedAlign-MoE at a site: the router stays, and is trained to agree with the sites' common routing where it can."""

from __future__ import annotations

import torch

from client.gate_alignment import GateAlignment, Target
from client.local_rule import LocalRule
from client.methods.base import Method
from client.model import AdaptedModel
from client.private import under
from conf.methods import FedAlignMoeConfig, MethodConfig
from strategies.adapters import Arrays
from strategies.fedalign_moe import MEAN, PROBABILITY, REFERENCE

_PRIVATE = "fedalign_moe/"


class FedAlignMoe(Method):
    """FedAlign-MoE's local half (2026, Eq. 3, 5 and 9-12, https://arxiv.org/abs/2603.21276).

    The loss is that of the task plus lambda times alpha(e) KL(p(x, e) || p_g(e)) over the experts that the token or the
    reference chooses, with alpha(e) = sigmoid(o(e) - eta) and o the site's overlap with the others' mean routing.

    Differs from the paper: its p is a softmax over the selected experts (``method.probability=selected``), here over
    all, since with one expert a token the former is 1 whatever the router does, and has no gradient. Statistics are
    those of the tokens that the round trained on, as they passed, not of another pass over all data; so the reference
    is a round old, and a site's first round has no such term. It is averaged over layers, of which the paper does not
    speak. A mean hidden state over few tokens is close to theirs: it tells more about a site's text than token counts
    do.
    """

    def __init__(self, config: MethodConfig) -> None:
        """Take the settings under ``method.``."""
        assert isinstance(config, FedAlignMoeConfig)
        self.config = config

    def shares(self, name: str) -> bool:  # noqa: ARG002
        """Everything trained is sent but the routers, which ``model.router=local`` keeps."""
        return True

    def local_rule(self, adapted: AdaptedModel, broadcast: Arrays, private: Arrays) -> LocalRule:
        """Routing statistics of every layer, and the alignment term of each whose statistics were kept last time.

        Raises:
            ValueError: If a layer has no router that we recognise.
        """
        references, means = under(REFERENCE, broadcast), under(MEAN, broadcast)
        targets = {}
        for layer, own_E in under(_PRIVATE + PROBABILITY, private).items():
            if layer in references:
                overlap_E = torch.from_numpy(own_E * means[layer])
                targets[layer] = Target(
                    torch.tensor(references[layer], device=adapted.device),
                    torch.sigmoid(overlap_E - self.config.overlap).to(adapted.device),
                )
        return GateAlignment(
            adapted.routers(),
            adapted.experts_per_token,
            targets,
            self.config.strength,
            keep_under=_PRIVATE,
            probability=self.config.probability,
        )
