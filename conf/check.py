"""Settings that are each fine but contradict each other."""

from __future__ import annotations

from conf.alignment import BUILT_IN_REWARDS, MIN_PROMPT_TOKENS, AlignmentConfig, DpoConfig, FirmConfig, Gram
from conf.methods import FcMoeConfig, RetentionKind
from conf.model import ExpertTraining, ModelSource, Quantization, RouterTraining
from conf.partitions import Files, PartitionConfig
from conf.schema import Config, Mode
from strategies.clair import Clair, RefinedRank
from strategies.conflicts import Space
from strategies.fc_moe import FcMoe, Importance
from strategies.fc_moe_plus import FcMoePlus
from strategies.fedavg import Weights
from strategies.screen import OnReject, ScreenKind

UNSCREENED = ("clair", "scaffold", "local_only", "centralised")
"""Strategies that judge sites themselves, count on every site's update, get no adapters or have one site."""


def check_config(config: Config) -> None:
    """Raise ``ValueError`` naming both settings of the first contradiction found."""
    _check_pair(config)
    _check_clair(config)
    _check_retention(config)
    _check_routers(config)
    _check_alignment(config)
    _check_graft(config)
    _check_partition(config)
    _check_federation(config)
    _check_training(config)
    _check_filter(config)
    _check_choices(config)
    if config.rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {config.rounds}")
    if config.seed < 0:
        raise ValueError(f"seed must be >= 0, got {config.seed}")


def num_sites(partition: PartitionConfig) -> int | None:
    """Sites that the partition makes; None where the data decides."""
    return getattr(partition, "num_sites", None)


def num_asked(config: Config, connected: int) -> int:
    """Sites asked in a round of which ``connected`` >= 1 could be: ``federation.fraction`` of them, at least one."""
    return min(connected, max(1, round(config.federation.fraction * connected)))


def needed_sites(config: Config) -> int:
    """Good replies that a round needs."""
    return 1 if config.strategy.name == "centralised" else config.federation.min_sites


def check_num_sites(config: Config, sites: int, setting: str) -> None:
    """Raise ``ValueError`` if a simulation of so many sites can never have a good round.

    Args:
        config: The run's settings.
        sites: Sites there will be.
        setting: What decides on that number, for the message.
    """
    federation, needed = config.federation, needed_sites(config)
    if sites < needed:
        raise ValueError(
            f"{setting} is below federation.min_sites={needed}: set federation.min_sites={sites} or more sites"
        )
    if num_asked(config, sites) < needed:
        raise ValueError(
            f"federation.fraction={federation.fraction:g} of {sites} sites asks {num_asked(config, sites)} a round, "
            f"below federation.min_sites={needed}: raise the one or lower the other"
        )


def _check_pair(config: Config) -> None:
    if config.method.name not in config.strategy.methods:
        fits = ", ".join(sorted(config.strategy.methods))
        raise ValueError(f"strategy={config.strategy.name} needs method={fits}, got method={config.method.name}")


def _check_clair(config: Config) -> None:
    strategy = config.strategy
    if isinstance(strategy, Clair) and strategy.refined_rank is RefinedRank.exact and config.rounds != 1:
        raise ValueError(
            f"strategy.refined_rank=exact makes adapters too large to train on: it needs rounds=1, got {config.rounds}"
        )
    uncounted = (getattr(strategy, "weights", None), getattr(strategy, "importance", None))
    alike = strategy.name == "fedalign_moe" or (
        isinstance(strategy, FcMoePlus) and not (strategy.ridge is None and strategy.agreement is None)
    )
    if (
        config.screen.kind is not ScreenKind.off
        and config.screen.on_reject is OnReject.downweight
        and (Weights.uniform in uncounted or Importance.uniform in uncounted or alike)
    ):
        raise ValueError(
            f"screen.on_reject=downweight lowers examples and tokens, which strategy={strategy.name} does not weigh by "
            "as it is set: use exclude or warn"
        )
    if config.screen.kind is not ScreenKind.off and config.strategy.name in UNSCREENED:
        raise ValueError(
            f"screen={config.screen.kind.name} cannot stand before strategy={config.strategy.name}: set screen=off"
        )


def _check_retention(config: Config) -> None:
    if not isinstance(config.method, FcMoeConfig):
        return
    retention, whole = config.method.retention, config.model.experts is ExpertTraining.full
    if retention.space is Space.product and whole:
        raise ValueError("method.retention.space=product needs model.experts=lora, got full")
    compares = retention.kind in {RetentionKind.filtered, RetentionKind.orthogonal}
    strategy, turning = config.strategy, None
    if isinstance(strategy, FcMoe) and strategy.conflict.space is Space.product:
        turning = "strategy.conflict.space=product"
    elif isinstance(strategy, FcMoePlus) and strategy.space is Space.product and not whole:
        turning = "strategy.space=product"
    if compares and turning and retention.space is Space.factors:
        raise ValueError(
            f"method.retention.kind={retention.kind.name} compares factors with those of the round before, which "
            f"{turning} turns: set method.retention.space=product"
        )


def _check_routers(config: Config) -> None:
    if config.strategy.name == "fedcmoo" and config.model.router is RouterTraining.local:
        raise ValueError("strategy=fedcmoo sends gradients of all that is trained: it needs another model.router")
    if config.method.name == "fedalign_moe" and config.model.router is RouterTraining.averaged:
        raise ValueError("method=fedalign_moe never sends routers: it needs model.router=local or frozen, got averaged")


def _check_alignment(config: Config) -> None:
    method, data = config.method, config.data
    if not isinstance(method, AlignmentConfig):
        return
    if data.packing:
        raise ValueError(f"method={method.name} takes examples one by one: it needs data.packing=false")
    if isinstance(method, FirmConfig) and data.max_length - method.max_new_tokens < MIN_PROMPT_TOKENS:
        raise ValueError(
            f"method.max_new_tokens={method.max_new_tokens} leaves less than {MIN_PROMPT_TOKENS} tokens of "
            f"data.max_length={data.max_length} for a prompt"
        )
    if isinstance(method, FirmConfig) and method.gram is Gram.halves and config.train.batch_size < 2:
        raise ValueError("method.gram=halves halves the prompts of a step: it needs train.batch_size >= 2, got 1")
    if isinstance(method, FirmConfig) and config.federation.mode is Mode.simulation:
        unknown = [reward for reward in method.rewards if ":" not in reward and reward not in BUILT_IN_REWARDS]
        if unknown:
            raise ValueError(
                f"method.rewards: {unknown[0]!r} is none of {sorted(BUILT_IN_REWARDS)}; write {unknown[0]}:FOLDER or "
                f"{unknown[0]}:HUB_NAME"
            )
    if config.strategy.name == "fedcmoo" and (method.preference is not None or method.site_preferences):
        raise ValueError(
            "strategy=fedcmoo takes no method.preference, its server weighs the objectives: strategy=firm does"
        )
    if config.strategy.name == "fedcmoo" and isinstance(method, FirmConfig):
        usual = FirmConfig()
        for key in ("regulariser", "beta", "gram", "rho"):
            if getattr(method, key) != getattr(usual, key):
                raise ValueError(f"strategy=fedcmoo weighs at its server, where method.{key} counts for nothing")
    if isinstance(method, DpoConfig) and data.rejected_column is None:
        raise ValueError("method=dpo compares two responses: set data.rejected_column, and data.path to such data")
    if isinstance(method, DpoConfig) and method.objectives and data.objective_column is None:
        raise ValueError(f"method.objectives={method.objectives} are values of a column: set data.objective_column")


def _check_graft(config: Config) -> None:
    """A graft is copied from experts as they were pre-trained, and its gates stand beside a router that stays."""
    if config.method.name != "flex":
        return
    model = config.model
    wanted = {
        "model.experts": (model.experts, ExpertTraining.frozen),
        "model.router": (model.router, RouterTraining.frozen),
        "model.quantization": (model.quantization, Quantization.none),
    }
    for key, (value, needed) in wanted.items():
        if value is not needed:
            raise ValueError(f"method=flex needs {key}={needed.name}, got {value.name}")


def _check_partition(config: Config) -> None:
    partition, path = config.partition, config.data.path
    if isinstance(partition, Files) and config.federation.mode is Mode.simulation and path is None:
        raise ValueError("partition=files needs data.path, a folder or a glob of one file per site")
    if path is not None and getattr(partition, "column", "") is None and config.federation.mode is Mode.simulation:
        raise ValueError(f"partition={partition.name} needs partition.column, a column of {path}")


def _check_federation(config: Config) -> None:
    federation = config.federation
    sites = num_sites(config.partition)
    centralised = config.strategy.name == "centralised"
    if federation.mode is Mode.remote:
        if centralised:
            raise ValueError("strategy=centralised pools all data: it is refused with federation=remote")
    elif federation.superlink is not None:
        raise ValueError(f"federation.superlink={federation.superlink} needs federation=remote")
    elif sites is not None and not centralised:
        check_num_sites(config, sites, f"partition.num_sites={sites}")


def _check_training(config: Config) -> None:
    data = config.data
    if data.split_column is not None and data.train_split == data.held_out_split:
        raise ValueError(f"data.train_split and data.held_out_split are both {data.train_split!r}: they must differ")
    if config.model.experts is not ExpertTraining.lora and not config.lora.attention:
        raise ValueError(
            f"model.experts={config.model.experts.value} with lora.attention=false leaves no weight with LoRA, without "
            "which PEFT makes no adapter: set lora.attention=true or model.experts=lora"
        )
    if config.model.experts is ExpertTraining.full and config.model.quantization is not Quantization.none:
        raise ValueError("model.experts=full trains the experts' weights: it needs model.quantization=none")
    if config.model.source is ModelSource.package and config.model.name != "tiny_moe":
        raise ValueError(f"model.source=package ships tiny_moe only, got model.name={config.model.name!r}")


def _check_filter(config: Config) -> None:
    for column, wanted in config.data.filter.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        if not all(isinstance(value, str | int | float) for value in values):
            raise ValueError(f"data.filter.{column} must be a value or a list of values, got {wanted!r}")


def _check_choices(config: Config) -> None:
    choices = config.eval.choices
    if choices.names and choices.name_column is None:
        raise ValueError(f"eval.choices.names={choices.names} needs eval.choices.name_column, the column of the names")
