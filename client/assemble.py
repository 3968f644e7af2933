"""From settings to a ready Site: which data, which model, which private store. No Flower."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from client.data import CENTRALISED, SiteData, own_site, simulated_sites, site_names
from client.evaluation.examination import EvalSet, held_out_set
from client.evaluation.general_sets import general_sets
from client.memory import divide_among
from client.methods import method_for
from client.model import AdaptedModel, adapted_model
from client.private import PrivateStore
from client.runtime import configure_torch, resolve_device
from client.site import POOLED, Site
from client.site_settings import real_settings, simulated_settings
from client.text import Example, check_packing
from conf.methods import GraftConfig
from conf.schema import Config, Mode
from conf.seeds import generator_for

log = logging.getLogger("bouquet.client")


def simulated_site(config: Config, name: str, private_folder: Path) -> Site:
    """One of ``site_names``.

    Raises:
        ValueError: If data or model settings do not work out; the message names the setting.
    """
    everyone = simulated_sites(config)
    divide_among(training_processes(config, resolve_device(config.device)))
    config = simulated_settings(config, name)
    if config.strategy.name == CENTRALISED:
        pooled = [example for data in everyone.values() for example in data.train]
        return _site(config, name, pooled, held_out_sets(config), private_folder)
    data = everyone[name]
    held_out = {name: _limited(config, data)}
    if config.method.name == "local_only":
        # Nobody has a global model then: the run's global loss is that of the sites' own models on everyone's data.
        held_out[POOLED] = pooled_held_out(config)
    return _site(config, name, data.train, held_out, private_folder, other_sets=_other_sets(config, name))


def real_site(
    config: Config,
    name: str,
    path: str,
    private_folder: Path,
    *,
    rewards: Sequence[str] = (),
    preference: Sequence[float] = (),
) -> Site:
    """A site with a data file of its own, and perhaps its own reward models and preference (``client.node.Node``).

    Raises:
        ValueError: As ``simulated_site``; what is wrong with the data is told in the site's log only, since the text
            may quote them.
    """
    config = real_settings(config, name, rewards, preference)
    try:
        data = own_site(config, name, path)
    except ValueError as error:
        log.error("the data of site %s cannot be used: %s", name, error)  # noqa: TRY400 - the caller logs the trace
        raise ValueError(f"the data of site {name!r} cannot be used; the reason is in the site's log") from error
    return _site(config, name, data.train, {name: _limited(config, data)}, private_folder)


def _other_sets(config: Config, name: str) -> dict[str, EvalSet]:
    """What a simulated site's own model is tested on besides the site's data: everyone else's, and general sets."""
    if not config.eval.matrix:
        return {}
    others = {on: held_out_set(examples, config) for on, examples in held_out_sets(config).items() if on != name}
    return others | general_sets(config)


def held_out_sets(config: Config) -> dict[str, list[Example]]:
    """Held-out examples of each original site of a simulation, cut to ``eval.max_examples``."""
    return {name: _limited(config, data) for name, data in simulated_sites(config).items()}


def pooled_held_out(config: Config) -> list[Example]:
    """Held-out examples of all simulated sites together."""
    return [example for examples in held_out_sets(config).values() for example in examples]


def model_for(config: Config) -> AdaptedModel:
    """This process's base model and an adapter of what the server knows, loaded once; sets torch's switches.

    Raises:
        ValueError: If the model settings do not work out, or the model cannot train on packed sequences as asked.
    """
    return _model(config, None)


def site_model(config: Config) -> AdaptedModel:
    """The same with all that a site trains, its graft included.

    Raises:
        ValueError: As ``model_for``.
    """
    return _model(config, method_for(config.method).graft)


def training_processes(config: Config, device: torch.device) -> int:
    """Processes of a simulation that train at a time on one machine; a GPU's shares follow from its memory."""
    if config.federation.mode is not Mode.simulation or device.type == "cuda":
        return 1
    return max(1, min(len(site_names(config)), (os.cpu_count() or 1) // config.federation.cpus_per_site))


def _model(config: Config, graft: GraftConfig | None) -> AdaptedModel:
    configure_torch(config.train)
    device = resolve_device(config.device)
    share = config.federation.gpus_per_site if config.federation.mode is Mode.simulation else None
    if device.type == "cuda" and share is not None and 0 < share <= 0.5:
        # Each process keeps to its part, the server's included: "auto" would else take what the others need.
        torch.cuda.set_per_process_memory_fraction(share / (1 + share))
    adapted = adapted_model(config.model, config.lora, device, graft)
    if config.data.packing:
        check_packing(adapted.base.model)
    return adapted


def _site(
    config: Config,
    name: str,
    train_examples: Sequence[Example],
    held_out: Mapping[str, Sequence[Example]],
    private_folder: Path,
    *,
    other_sets: Mapping[str, EvalSet] | None = None,
) -> Site:
    adapted = site_model(config)
    store = PrivateStore(private_folder, name, adapted.base.identity.sha256)
    return Site(name, train_examples, held_out, adapted=adapted, config=config, store=store, other_sets=other_sets)


def _limited(config: Config, data: SiteData) -> list[Example]:
    limit = config.eval.max_examples
    if limit is None or limit >= len(data.held_out):
        return data.held_out
    order = generator_for(config.seed, "eval", data.site).permutation(len(data.held_out))[:limit]
    return [data.held_out[index] for index in sorted(order)]
