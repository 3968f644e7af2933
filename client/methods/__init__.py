"""What a site does in a round: one file a method, chosen by ``method=``."""

from __future__ import annotations

from client.methods.base import Method
from client.methods.dpo import Dpo
from client.methods.fc_moe import FcMoe
from client.methods.fedalign_moe import FedAlignMoe
from client.methods.firm import Firm
from client.methods.flex import Flex
from client.methods.local_only import LocalOnly
from client.methods.pfl_moe import PflMoe
from client.methods.scaffold import Scaffold
from client.methods.sft import Sft
from conf.alignment import DpoConfig, FirmConfig
from conf.methods import (
    FcMoeConfig,
    FedAlignMoeConfig,
    FlexConfig,
    LocalOnlyConfig,
    MethodConfig,
    PflMoeConfig,
    ScaffoldConfig,
    SftConfig,
)

METHODS: dict[str, type[Method]] = {
    SftConfig.name: Sft,
    ScaffoldConfig.name: Scaffold,
    FcMoeConfig.name: FcMoe,
    FedAlignMoeConfig.name: FedAlignMoe,
    PflMoeConfig.name: PflMoe,
    FlexConfig.name: Flex,
    LocalOnlyConfig.name: LocalOnly,
    FirmConfig.name: Firm,
    DpoConfig.name: Dpo,
}


def method_for(config: MethodConfig) -> Method:
    """The client half that the settings ask for.

    Raises:
        ValueError: If no client half has that name.
    """
    if config.name not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {config.name!r}")
    return METHODS[config.name](config)


__all__ = ["METHODS", "Method", "method_for"]
