"""A run's settings as one site has them: its own preference, its own reward models, what it tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conf.alignment import AlignmentConfig, FirmConfig, check_preference
from conf.schema import Config


def simulated_settings(config: Config, site: str) -> Config:
    """The settings of a simulated site: its entry in ``method.site_preferences``; its weights are sent."""
    if not isinstance(config.method, AlignmentConfig):
        return config
    method = replace(config.method, preference=config.method.site_preferences.get(site, config.method.preference))
    if isinstance(method, FirmConfig) and method.send_weights is None:
        method = replace(method, send_weights=True)
    return replace(config, method=method)


def real_settings(config: Config, site: str, rewards: Sequence[str], preference: Sequence[float]) -> Config:
    """The settings of a real site that brings reward models ``NAME:SOURCE`` and a preference of its own, if any.

    Raises:
        ValueError: If the run has no such objectives.
    """
    method = config.method
    if not isinstance(method, AlignmentConfig):
        return config
    if preference:
        check_preference(list(preference), method.num_objectives(), f"preference of site {site}")
        method = replace(method, preference=list(preference))
    if rewards and isinstance(method, FirmConfig):
        own = {spec.partition(":")[0]: spec for spec in rewards}
        asked = [spec.partition(":")[0] for spec in method.rewards]
        if not own.keys() <= set(asked):
            raise ValueError(f"rewards of site {site} must be among {asked}, got {sorted(own.keys() - set(asked))}")
        method = replace(
            method, rewards=[own.get(name, spec) for name, spec in zip(asked, method.rewards, strict=True)]
        )
    return replace(config, method=method)
