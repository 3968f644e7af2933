"""Settings that contradict each other are refused by both names, before anything starts."""

from __future__ import annotations

import pytest

from conf.check import check_config, check_num_sites, needed_sites, num_asked
from conf.compose import load_config
from conf.methods import FcMoeConfig, FlexConfig, LocalOnlyConfig, SftConfig
from conf.model import ExpertTraining, LoraConfig, ModelConfig, RouterTraining
from conf.partitions import Dirichlet, Files, Iid, Natural
from conf.schema import ChoicesConfig, Config, DataConfig, EvalConfig, FederationConfig, Mode
from strategies.centralised import Centralised
from strategies.fc_moe import FcMoe
from strategies.fedavg import FedAvg
from strategies.flex import Flex
from strategies.local_only import LocalOnly


def settings(**changes):
    return Config(**{"strategy": FedAvg(), "method": SftConfig(), "partition": Natural(), **changes})


REMOTE = FederationConfig(mode=Mode.remote, superlink="host:8000")

CONTRADICTIONS = {
    "pair": (
        {"strategy": FcMoe(), "method": LocalOnlyConfig()},
        r"strategy=fc_moe needs method=dpo, fc_moe, firm, flex, sft, got method=local_only",
    ),
    "local_only alone": (
        {"strategy": LocalOnly()},
        r"strategy=local_only needs method=local_only, got method=sft",
    ),
    "pooled re-anchoring": (
        {"strategy": Centralised(), "method": FcMoeConfig()},
        r"strategy=centralised needs method=sft, got method=fc_moe",
    ),
    "graft on trained experts": (
        {"strategy": Flex(), "method": FlexConfig()},
        r"method=flex needs model.experts=frozen, got lora",
    ),
    "graft beside a trained router": (
        {
            "strategy": FedAvg(),
            "method": FlexConfig(),
            "model": ModelConfig(experts=ExpertTraining.frozen, router=RouterTraining.local),
        },
        r"method=flex needs model.router=frozen, got local",
    ),
    "names of no column": (
        {"eval": EvalConfig(choices=ChoicesConfig(names=["arc_easy"]))},
        r"eval.choices.names=\['arc_easy'\] needs eval.choices.name_column",
    ),
    "files without a path": ({"partition": Files()}, r"partition=files needs data.path, a folder or a glob"),
    "natural without a column": (
        {"data": DataConfig(path="a.csv")},
        r"partition=natural needs partition.column, a column of a.csv",
    ),
    "dirichlet without a column": (
        {"data": DataConfig(path="a.csv"), "partition": Dirichlet()},
        r"partition=dirichlet needs partition.column, a column of a.csv",
    ),
    "centralised at real sites": (
        {"strategy": Centralised(), "federation": REMOTE},
        r"strategy=centralised pools all data: it is refused with federation=remote",
    ),
    "address of no use": (
        {"federation": FederationConfig(superlink="host:8000")},
        r"federation.superlink=host:8000 needs federation=remote",
    ),
    "fewer sites than needed": (
        {"partition": Iid(num_sites=2), "federation": FederationConfig(min_sites=3)},
        r"partition.num_sites=2 is below federation.min_sites=3: set federation.min_sites=2 or more sites",
    ),
    "fewer asked than needed": (
        {"partition": Iid(num_sites=8), "federation": FederationConfig(min_sites=3, fraction=0.25)},
        r"federation.fraction=0.25 of 8 sites asks 2 a round, below federation.min_sites=3",
    ),
    "routers without LoRA": (
        {
            "model": ModelConfig(experts=ExpertTraining.frozen, router=RouterTraining.averaged),
            "lora": LoraConfig(attention=False),
        },
        r"model.experts=frozen with lora.attention=false leaves no weight with LoRA",
    ),
    "whole experts without LoRA": (
        {"model": ModelConfig(experts=ExpertTraining.full), "lora": LoraConfig(attention=False)},
        r"model.experts=full with lora.attention=false leaves no weight with LoRA",
    ),
    "package without that model": (
        {"model": ModelConfig(name="huge_moe")},
        r"model.source=package ships tiny_moe only, got model.name='huge_moe'",
    ),
    "filter on nothing": (
        {"data": DataConfig(filter={"topic": None})},
        r"data.filter.topic must be a value or a list of values, got None",
    ),
    "no round": ({"rounds": 0}, r"rounds must be >= 1, got 0"),
    "negative seed": ({"seed": -1}, r"seed must be >= 0, got -1"),
}

ALLOWED = {
    "default": {},
    "one pooled site": {"strategy": Centralised(), "federation": FederationConfig(min_sites=3)},
    "one site that is enough": {"partition": Iid(num_sites=1), "federation": FederationConfig(min_sites=1)},
    "files at real sites": {"partition": Files(), "federation": REMOTE},
    "columns at real sites": {"data": DataConfig(path="a.csv"), "federation": REMOTE},
    "ablation without retention": {"strategy": FcMoe()},
    "retention under plain averaging": {"method": FcMoeConfig()},
    "attention alone": {"model": ModelConfig(experts=ExpertTraining.frozen)},
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradiction_is_refused_by_both_settings(case):
    changes, message = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        check_config(settings(**changes))


@pytest.mark.parametrize("case", ALLOWED)
def test_settings_that_fit_are_allowed(case):
    check_config(settings(**ALLOWED[case]))


@pytest.mark.parametrize(("fraction", "connected", "asked"), [(1.0, 4, 4), (0.5, 4, 2), (0.5, 5, 2), (0.01, 4, 1)])
def test_sites_asked_are_the_fraction_and_at_least_one(fraction, connected, asked):
    assert num_asked(settings(federation=FederationConfig(fraction=fraction)), connected) == asked


def test_centralised_needs_its_one_site_only():
    config = settings(strategy=Centralised(), federation=FederationConfig(min_sites=3))
    assert needed_sites(config) == 1
    check_num_sites(config, 1, "the data")


def test_number_of_sites_that_the_data_decide_is_checked_too():
    config = settings(federation=FederationConfig(min_sites=5))
    with pytest.raises(ValueError, match=r"^the number of sites, 4, is below federation.min_sites=5"):
        check_num_sites(config, 4, "the number of sites, 4,")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("strategy=clair screen=clair", "screen=clair cannot stand before strategy=clair: set screen=off"),
        ("strategy=scaffold screen=clair", "screen=clair cannot stand before strategy=scaffold"),
        ("strategy=local_only screen=clair", "screen=clair cannot stand before strategy=local_only"),
        (
            "strategy=fedavg strategy.weights=uniform screen=clair screen.on_reject=downweight",
            "screen.on_reject=downweight lowers examples and tokens, which strategy=fedavg does not weigh by",
        ),
        (
            "strategy=fc_moe strategy.importance=uniform screen=clair screen.on_reject=downweight",
            "which strategy=fc_moe does not weigh by as it is set: use exclude or warn",
        ),
        (
            "strategy=fc_moe_plus screen=clair screen.on_reject=downweight",
            "which strategy=fc_moe_plus does not weigh by as it is set: use exclude or warn",
        ),
        ("strategy=fedcmoo model.router=local", "strategy=fedcmoo sends gradients of all that is trained"),
        ("strategy=clair strategy.refined_rank=exact", "strategy.refined_rank=exact .* needs rounds=1, got 5"),
        (
            ["strategy=fc_moe", "method.retention.space=product", "model.experts=full"],
            "method.retention.space=product needs model.experts=lora, got full",
        ),
        (
            ["strategy=fc_moe", "strategy.conflict.space=product", "method.retention.kind=orthogonal"],
            "method.retention.kind=orthogonal compares factors .* set method.retention.space=product",
        ),
        (
            ["strategy=fc_moe_plus", "method=fc_moe", "method.retention.kind=filtered"],
            "method.retention.kind=filtered compares .* strategy.space=product turns: set method.retention.space",
        ),
        (
            "strategy=fedalign_moe model.router=averaged",
            "method=fedalign_moe never sends routers: it needs model.router=local or frozen, got averaged",
        ),
    ],
)
def test_strategy_where_it_cannot_work_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(overrides)


def test_a_mean_by_examples_can_be_downweighted():
    screen = "strategy=fc_moe_plus strategy.ridge=null screen=clair screen.on_reject=downweight"
    load_config(f"{screen} strategy.agreement=null")
    with pytest.raises(ValueError, match="which strategy=fc_moe_plus does not weigh by"):
        load_config(screen)  # what sites have in common is by sites, not by examples


def test_filtered_retention_goes_with_whole_experts_that_nothing_turns():
    load_config("strategy=fc_moe_plus method=fc_moe method.retention.kind=filtered model.experts=full")
    load_config("strategy=fc_moe_plus strategy.space=factors method=fc_moe method.retention.kind=filtered")
