"""With which seeds everyone is tested in each table of ``benchmarks.fc_moe``, where the command is not told."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.workloads import KEY_CONTENDERS, WORKLOADS

_FIVE = range(5)
_THREE = range(3)
"""Of a large model."""

_CORE = ("fedavg", "noise", "fedavg_step", "fedavgm", "fc_moe", "fc_moe_plus", "fc_moe_plus_as_shipped")
_UNIFORM = ("fc_moe_no_importance", "fc_moe_uniform_rate")
_ON_CLINC = (
    *KEY_CONTENDERS, *_UNIFORM, "fedavg_step_2", "fedavgm_step", "fedavg_router_averaged", "fc_moe_plus_mean",
    "flattening", "fedprox", "fedavg_uniform", "fedmoe", "fedalign_moe_selected", "pfl_moe",
)  # fmt: skip
_PARTS = ("fc_moe_no_projection", "fc_moe_no_retention")
_ON_BANKING = (
    *_CORE, *_UNIFORM, "fedalign_moe", "fc_moe_plus_whole", "fc_moe_plus_whole_as_shipped", "fedavgm_momentum_0.3",
)  # fmt: skip
_MORE: dict[tuple[str, str], tuple[range, tuple[str, ...]]] = {
    ("clinc", "lora"): (range(5, 10), (*_ON_CLINC, *_PARTS, "fc_moe_plus_as_shipped_momentum_0.7")),
    ("clinc", "full"): (
        range(5, 10),
        (*_ON_CLINC, "fedavg_router_local", "fedadam", "fedavg_tokens", "scaffold"),
    ),
    ("clinc_unequal", "lora"): (range(5, 10), (*_CORE, "fedavg_uniform")),
    ("clinc_32_experts", "lora"): (range(5, 10), (*_CORE, "fedavg_uniform", "fedmoe")),
    ("banking", "lora"): (range(5, 20), _ON_BANKING),
    ("banking", "full"): (range(5, 20), (*_ON_BANKING, *_PARTS, "fedprox", "fedadam", "scaffold", "fedmoe")),
}
"""Where what the text compares has more than five: workload and way to train experts -> which besides, and who."""


def table_seeds(workload: str, experts: str) -> tuple[Sequence[int], dict[str, Sequence[int]]]:
    """Those of everyone, and contender -> those of who is tested with more."""
    if WORKLOADS[workload].model:
        return _THREE, {}
    seeds, names = _MORE.get((workload, experts), ((), ()))
    return _FIVE, dict.fromkeys(names, seeds)
