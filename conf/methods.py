"""Settings of the client half of each method, but for those of ``conf/alignment.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from strategies.base import require
from strategies.conflicts import Space

# Enums carry lower-case member names because OmegaConf matches settings by member name.


class RetentionKind(Enum):
    """Which residual of a site's last expert update is added back to the received expert."""

    off = "off"
    paper = "paper"
    """Eq. 5 literally: the update's projection on the global expert weights."""
    filtered = "filtered"
    """What opposes the global step: its component against that step."""
    orthogonal = "orthogonal"
    """The part of the update that the global step does not represent."""


class GraftForm(Enum):
    """How a personal expert joins the routed ones."""

    additive = "additive"
    """Beside them: gate times its output is added."""
    convex = "convex"
    """Instead of them: what the gate gives to it, it takes from them."""


class GraftStart(Enum):
    """What a layer computes with a graft that is not trained yet."""

    exact = "exact"
    """What it did without: the personal expert counts by its difference to the frozen one it was copied from."""
    paper = "paper"
    """Half of the copied expert more (or, convex, instead)."""


@dataclass(kw_only=True)
class RetentionConfig:
    """FC-MoE's local knowledge retention (https://arxiv.org/abs/2606.15625, Eq. 5-6)."""

    kind: RetentionKind = RetentionKind.paper
    strength: float = 0.5
    """Lambda of Eq. 6."""
    space: Space = Space.factors
    """What a LoRA expert is as a vector: its factors, or (ours) its products B A."""
    norm_guard: float | None = None
    """Largest ratio of the re-anchored expert's norm to the received one's; null: no limit, as in the paper."""

    def __post_init__(self) -> None:
        require(0 <= self.strength <= 1, "method.retention.strength", "in [0, 1]", self.strength)
        require(
            self.norm_guard is None or self.norm_guard >= 1,
            "method.retention.norm_guard",
            "null or >= 1",
            self.norm_guard,
        )


@dataclass(kw_only=True)
class MethodConfig:
    """The client half of a method."""

    name: ClassVar[str]


@dataclass(kw_only=True)
class SftConfig(MethodConfig):
    """Supervised fine-tuning of the received adapter; everything trained is sent."""

    name: ClassVar[str] = "sft"


@dataclass(kw_only=True)
class FcMoeConfig(MethodConfig):
    """Supervised fine-tuning from re-anchored experts."""

    name: ClassVar[str] = "fc_moe"
    retention: RetentionConfig = field(default_factory=RetentionConfig)


class RoutingProbability(Enum):
    """Over which experts FedAlign-MoE's routing probabilities are a softmax."""

    all = "all"
    selected = "selected"
    """Those that the token is routed to, as the paper says. With one expert a token it is 1 whatever the router does,
    and the alignment term has no gradient."""


@dataclass(kw_only=True)
class FedAlignMoeConfig(MethodConfig):
    """Supervised fine-tuning with routers pulled towards the sites' common routing (https://arxiv.org/abs/2603.21276)."""

    name: ClassVar[str] = "fedalign_moe"
    strength: float = 0.1
    """Lambda of Eq. 10: weight of the alignment term in the loss."""
    overlap: float = 0.1
    """Eta of Eq. 9: overlap of the site's routing with the mean at which an expert's term has half its weight."""
    probability: RoutingProbability = RoutingProbability.all
    """What p is in Eq. 3, 5 and 11."""

    def __post_init__(self) -> None:
        require(0 <= self.strength < math.inf, "method.strength", ">= 0", self.strength)
        require(0 <= self.overlap <= 1, "method.overlap", "in [0, 1]", self.overlap)


@dataclass(kw_only=True)
class ScaffoldConfig(MethodConfig):
    """Supervised fine-tuning along gradients corrected by control variates (https://arxiv.org/abs/1910.06378)."""

    name: ClassVar[str] = "scaffold"


@dataclass(kw_only=True)
class PflMoeConfig(MethodConfig):
    """Supervised fine-tuning; a site uses its own model and the global one, mixed (https://arxiv.org/abs/2012.15589)."""

    name: ClassVar[str] = "pfl_moe"
    gate_examples: int = 64
    """Training sequences that the gate is fitted to before each evaluation."""

    def __post_init__(self) -> None:
        require(self.gate_examples >= 1, "method.gate_examples", ">= 1", self.gate_examples)


@dataclass(kw_only=True)
class GraftConfig:
    """A site's personal experts (https://arxiv.org/abs/2506.00965)."""

    num_experts: int = 1
    """Personal experts of each MoE layer."""
    rank: int = 0
    """Each is the frozen expert plus a trained change of this rank, scaled by lora.alpha / rank; 0: a trained copy."""
    form: GraftForm = GraftForm.additive
    start: GraftStart = GraftStart.exact
    calibration_examples: int = 32
    """Training sequences, drawn once, on which a site finds out what experts to copy."""

    def __post_init__(self) -> None:
        require(1 <= self.num_experts <= 3, "method.graft.num_experts", "in [1, 3]", self.num_experts)
        require(self.rank >= 0, "method.graft.rank", ">= 0", self.rank)
        require(self.calibration_examples >= 1, "method.graft.calibration_examples", ">= 1", self.calibration_examples)
        require(
            self.form is GraftForm.additive or self.start is GraftStart.paper,
            "method.graft.start",
            "paper with method.graft.form=convex, whose gates take from the routed experts at once",
            self.start.name,
        )


@dataclass(kw_only=True)
class FlexConfig(MethodConfig):
    """Supervised fine-tuning of what is shared, together with personal experts that are not."""

    name: ClassVar[str] = "flex"
    graft: GraftConfig = field(default_factory=GraftConfig)


@dataclass(kw_only=True)
class LocalOnlyConfig(MethodConfig):
    """Each site trains its own adapter and sends none of it."""

    name: ClassVar[str] = "local_only"
