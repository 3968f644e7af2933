"""The methods that the benchmark compares: each a few settings, and what is tuned for it.

A new method is a new entry: any settings of ``conf``, and the knobs that are its own.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.tuning import LEARNING_RATE, Contender, Knob

_SERVER_RATE = Knob("strategy.learning_rate", (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 0.16), 1e-2)
_TAU = Knob("strategy.tau", (1e-4, 1e-3, 1e-2, 1e-1), 1e-3, unsaid=1e-3)
_PROXIMAL = Knob("train.proximal_mu", (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 1e-2)
_RETENTION = Knob("method.retention.strength", (0.03, 0.1, 0.3, 0.5, 0.8, 1.0), 0.5)
_RATE = (LEARNING_RATE.key,)
_STEP = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
_EXPERT_STEP = Knob("strategy.expert_step", _STEP, 1.0, unsaid=1.0)
_MOMENTUM = (0.0, 0.3, 0.5, 0.7, 0.9)
_SERVER_MOMENTUM = Knob("strategy.momentum", (0.0, 0.1, 0.3, 0.5, 0.7, 0.9), 0.5)
_PLUS = (
    Knob("strategy.step", _STEP, 2.0),
    Knob("strategy.flatten", (0.0, 0.5, 1.0), 1.0),
    Knob("strategy.momentum", _MOMENTUM, 0.5),
)
_RIDGE = Knob("strategy.ridge", (0.03, 0.1, 0.3, 1.0, 3.0), 0.3, unsaid=0.3)
_AGREEMENT = Knob("strategy.agreement", (0.1, 0.3, 1.0, 3.0, 10.0), 1.0, unsaid=1.0)
_ALIGNMENT = (
    Knob("method.strength", (0.01, 0.1, 1.0, 10.0, 100.0), 0.1),
    Knob("method.overlap", (0.0, 0.1, 0.3, 0.6, 1.0), 0.1, unsaid=0.1),
    Knob("strategy.deviations", (0.0, 1.0, 2.0), 1.0, unsaid=1.0),
)
_FIXED = tuple(replace(knob, values=(knob.start,)) for knob in _PLUS)
_WHOLE = ("strategy=fc_moe_plus", "strategy.agreement=null")
_PLUS_SWEEPS = {
    "fc_moe_plus_as_shipped": {
        "step": (1.0, 1.5, 3.0), "flatten": (0.0, 0.5), "momentum": (0.0, 0.3, 0.7, 0.9), "ridge": (0.1, 1.0),
        "agreement": (0.3, 0.5, 2.0, 3.0),
    },
    "fc_moe_plus_whole": {
        "step": (1.0, 1.5, 2.0, 3.0, 4.0), "flatten": (0.0, 0.5, 1.0), "momentum": _MOMENTUM,
        "ridge": (0.03, 0.1, 1.0, 3.0),
    },
}  # fmt: skip
"""Values around those of a leader. Its ridge is 0.3 and its agreement, where it has one, 1: it tunes neither."""
_PLUS_OFF = {"step": 1.0, "flatten": 0.0, "momentum": 0.0}
"""Values that take a part of the rule away: such an ablation finds its own learning rate."""

CONTENDERS: dict[str, Contender] = {
    "fedavg": Contender("FedAvg", ("strategy=fedavg",)),
    "noise": Contender(
        "FedAvg, step x 1.001 (noise)",
        ("strategy=fedavgm", "strategy.momentum=0", "strategy.learning_rate=1.001"),
        follows="fedavg",
    ),
    "fedavg_step": Contender("FedAvg, tuned step on experts", ("strategy=fedavg",), (_EXPERT_STEP,)),
    "fedavg_step_2": Contender("FedAvg, step 2 on experts", ("strategy=fedavg", "strategy.expert_step=2")),
    # At a step of 1 a steady change is taken 1 / (1 - momentum) times as far, as by FC-MoE plus.
    "fedavgm": Contender("FedAvgM", ("strategy=fedavgm", "strategy.learning_rate=1"), (_SERVER_MOMENTUM,)),
    # With whole experts on BANKING77 tuning passed it by for next to nothing, on one seed; test seeds liked it.
    "fedavgm_momentum_0.3": Contender(
        "FedAvgM with a momentum of 0.3",
        ("strategy=fedavgm", "strategy.learning_rate=1"),
        follows="fedavgm",
        instead={"strategy.momentum": 0.3},
    ),
    "fedavgm_step": Contender(
        "FedAvgM, tuned step on experts",
        ("strategy=fedavgm", "strategy.learning_rate=1"),
        (_EXPERT_STEP, _SERVER_MOMENTUM),
    ),
    # What FedAlign-MoE's sites do with their routers, without its rule; and as everyone else trains routers.
    "fedavg_router_local": Contender("FedAvg, routers trained, local", ("strategy=fedavg", "model.router=local")),
    "fedavg_router_averaged": Contender(
        "FedAvg, routers trained, averaged", ("strategy=fedavg", "model.router=averaged")
    ),
    "fc_moe": Contender("FC-MoE", ("strategy=fc_moe",), (_RETENTION,)),
    "fc_moe_plus": Contender("FC-MoE plus", ("strategy=fc_moe_plus",), (*_PLUS, _RIDGE, _AGREEMENT)),
    # CLINC's search begins at these values; on any other data nobody tuned them.
    "fc_moe_plus_as_shipped": Contender("FC-MoE plus, as shipped", ("strategy=fc_moe_plus",), _FIXED),
    # What the rule was before its step looked at what sites have in common.
    "fc_moe_plus_whole": Contender("FC-MoE plus, whole steps always", _WHOLE, _PLUS),
    "fc_moe_plus_whole_as_shipped": Contender(
        "FC-MoE plus, whole steps always, other values as shipped", _WHOLE, _FIXED
    ),
    "fc_moe_plus_mean": Contender(
        "FC-MoE plus, whole steps, mean by examples instead of the equal say", (*_WHOLE, "strategy.ridge=null"), _PLUS
    ),
    "flattening": Contender(
        "flattening alone", (*_WHOLE, "strategy.ridge=null", "strategy.step=1", "strategy.momentum=0")
    ),
    **{
        f"fc_moe_no_{name}": Contender(f"- {title}", ("strategy=fc_moe", setting), follows="fc_moe", retunes=_RATE)
        for name, title, setting in (
            ("projection", "consensus projection", "strategy.conflict.against=off"),
            ("retention", "local retention", "method.retention.kind=off"),
            ("importance", "importance weighting", "strategy.importance=uniform"),
        )
    },
    # Uniform weights may choose a higher rate: is it that, or the weights?
    "fc_moe_uniform_rate": Contender(
        "FC-MoE at the learning rate of uniform weights", ("strategy=fc_moe",), follows="fc_moe_no_importance"
    ),
    **{
        f"fc_moe_{name}": Contender(
            f"FC-MoE, {title}",
            ("strategy=fc_moe", *settings.split()),
            follows="fc_moe",
            retunes=(*_RATE, _RETENTION.key) if name in {"filtered", "orthogonal"} else _RATE,
            of_factors=name in {"product", "in_products", "component"},
        )
        for name, title, settings in (
            ("product", "conflicts in products B A", "strategy.conflict.space=product"),
            (
                "in_products",
                "conflicts and retention in products",
                "strategy.conflict.space=product method.retention.space=product",
            ),
            ("matrix", "conflicts of matrices", "strategy.conflict.granularity=matrix"),
            ("row", "conflicts of rows", "strategy.conflict.granularity=row"),
            ("component", "conflicts of rank components", "strategy.conflict.granularity=component"),
            ("others", "against the other sites' consensus", "strategy.conflict.against=others"),
            ("pairwise", "against each other site", "strategy.conflict.against=pairwise"),
            ("tokens", "importance: tokens", "strategy.importance=tokens"),
            ("examples", "importance: examples", "strategy.importance=examples"),
            ("filtered", "retention: filtered", "method.retention.kind=filtered"),
            ("orthogonal", "retention: orthogonal", "method.retention.kind=orthogonal"),
            ("guarded", "retention, norms grown by 1.2 a round at most", "method.retention.norm_guard=1.2"),
        )
    },
    "fc_moe_strength_0.5": Contender(
        "method.retention.strength 0.5, as printed, own learning rate",
        ("strategy=fc_moe",),
        follows="fc_moe",
        retunes=_RATE,
        instead={"method.retention.strength": 0.5},
    ),
    "fedprox": Contender("FedProx", ("strategy=fedprox",), (_PROXIMAL,)),
    "fedadam": Contender("FedAdam", ("strategy=fedadam",), (_SERVER_RATE, _TAU)),
    "fedavg_uniform": Contender("FedAvg, sites alike", ("strategy=fedavg", "strategy.weights=uniform")),
    "fedavg_tokens": Contender("FedAvg, experts by tokens", ("strategy=fedavg", "strategy.weights=tokens")),
    "fedmoe": Contender("FedMoE (sites that used the expert)", ("strategy=fedmoe",)),
    "fedalign_moe": Contender("FedAlign-MoE (routers trained, local)", ("strategy=fedalign_moe",), _ALIGNMENT),
    # Its probabilities as printed; but with one expert a token they would leave nothing to align.
    "fedalign_moe_selected": Contender(
        "FedAlign-MoE, probabilities over the selected experts",
        ("strategy=fedalign_moe", "method.probability=selected"),
        _ALIGNMENT,
    ),
    "scaffold": Contender("SCAFFOLD", ("strategy=scaffold",)),
    # Its global model is FedAvg's: what it mixes with it stays at the sites.
    "pfl_moe": Contender("PFL-MoE (sites mix in their own model)", ("strategy=pfl_moe",), follows="fedavg"),
    "local_only": Contender("local only (bound)", ("strategy=local_only",)),
    "centralised": Contender("centralised (bound)", ("strategy=centralised",)),
    **{
        f"{leader}_{knob}_{value:g}": Contender(
            f"{knob} {value:g}" + (", own learning rate" if value == _PLUS_OFF.get(knob) else ""),
            _WHOLE if leader == "fc_moe_plus_whole" else ("strategy=fc_moe_plus",),
            follows=leader,
            retunes=_RATE if value == _PLUS_OFF.get(knob) else (),
            instead={f"strategy.{knob}": value},
        )
        for leader, sweeps in _PLUS_SWEEPS.items()
        for knob, values in sweeps.items()
        for value in values
    },
    "fc_moe_plus_whole_factors": Contender(
        "space factors",
        _WHOLE,
        follows="fc_moe_plus_whole",
        instead={"strategy.space": "factors"},
        of_factors=True,
    ),
}


_FLEX = ("method=flex", "model.experts=frozen")

# Grids that grew when its tables were complete are cut to what these were tuned over.
PERSONAL: dict[str, Contender] = {
    "flex": Contender("FLEx, exact start (ours)", ("strategy=flex",)),
    "flex_paper": Contender("FLEx as printed", ("strategy=flex", "method.graft.start=paper")),
    "flex_conflicts": Contender(
        "FLEx, conflicts in attention", ("strategy=fc_moe", "strategy.attention=as_experts", *_FLEX)
    ),
    "fedavg": CONTENDERS["fedavg"],
    "fedavg_attention": Contender("FedAvg, attention alone", ("strategy=fedavg", "model.experts=frozen")),
    "fedprox": replace(CONTENDERS["fedprox"], knobs=(replace(_PROXIMAL, values=_PROXIMAL.values[1:]),)),
    "scaffold": CONTENDERS["scaffold"],
    "fedavgm": Contender("FedAvgM", ("strategy=fedavgm",), (Knob("strategy.learning_rate", (0.25, 0.5, 1.0), 0.5),)),
    **{
        name: Contender(title, (f"strategy={name}",), (replace(_SERVER_RATE, values=_SERVER_RATE.values[:5]),))
        for name, title in (("fedadagrad", "FedAdagrad"), ("fedyogi", "FedYogi"), ("fedadam", "FedAdam"))
    },
    "fc_moe": replace(CONTENDERS["fc_moe"], knobs=(replace(_RETENTION, values=_RETENTION.values[1:-1]),)),
    "pfl_moe": Contender("PFL-MoE", ("strategy=pfl_moe",)),
    "local_only": CONTENDERS["local_only"],
    # An epoch a round: as many steps as one site makes would be an eighth of what eight sites make.
    "centralised": Contender("centralised (bound)", ("strategy=centralised", "train.max_steps=null")),
}
"""What ``benchmarks.flex`` compares."""
