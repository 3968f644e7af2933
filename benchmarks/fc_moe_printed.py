"""What the papers print for our workloads' data: Switch-base-16, 10 sites, 25 rounds. Shown beside ours, not compared.

FC-MoE, 2026, Tables I and II (https://arxiv.org/abs/2606.15625), and what FedAlign-MoE, 2026, adds on the same test bed
(https://arxiv.org/abs/2603.21276).
"""

from __future__ import annotations

from collections.abc import Mapping

TEST_ACCURACY: dict[tuple[str, str], float] = {
    ("ag_news", "fedavg"): 0.7740,
    ("ag_news", "fedprox"): 0.7872,
    ("ag_news", "pfl_moe"): 0.7994,
    ("ag_news", "fedmoe"): 0.8137,
    ("ag_news", "fc_moe"): 0.8359,
    ("ag_news", "fedalign_moe"): 0.8522,
    ("ag_news_0.5", "fedavg"): 0.8866,
    ("ag_news_0.5", "pfl_moe"): 0.9041,
    ("ag_news_0.5", "fedmoe"): 0.9103,
    ("ag_news_0.5", "fc_moe"): 0.9194,
    ("ag_news_0.5", "fedalign_moe"): 0.9312,
    ("ag_news_1.0", "fedavg"): 0.8978,
    ("ag_news_1.0", "pfl_moe"): 0.9109,
    ("ag_news_1.0", "fedmoe"): 0.9164,
    ("ag_news_1.0", "fc_moe"): 0.9224,
    ("ag_news_1.0", "fedalign_moe"): 0.9355,
    ("mcq", "fedavg"): 0.3008,
    ("mcq", "fedprox"): 0.3176,
    ("mcq", "pfl_moe"): 0.3325,
    ("mcq", "fedmoe"): 0.3506,
    ("mcq", "fc_moe"): 0.3764,
    ("mcq", "fedalign_moe"): 0.3979,
}
"""(Workload, contender) -> share of test examples that the global model gets right."""

ABLATION: dict[str, tuple[str, str]] = {
    "fc_moe_no_projection": (".7849 / .5574", ".3306 / .2992"),
    "fc_moe_no_retention": (".8068 / .6108", ".3478 / .3225"),
    "fc_moe_no_importance": (".8264 / .6459", ".3616 / .3428"),
    "fc_moe": (".8359 / .6732", ".3764 / .3559"),
}
"""Contender -> test and local accuracy at alpha 0.1, AG News and MMLU; the last is the whole method."""


def of_workload(name: str) -> Mapping[str, float]:
    """Contender -> printed test accuracy; empty where no paper has this workload."""
    return {contender: value for (workload, contender), value in TEST_ACCURACY.items() if workload == name}
