"""What becomes of a finished run at a site: its personal model as a folder, or a new site's beside the run's adapter.

A run folder is enough: ``config.yaml``, ``summary.json``, ``adapter/``, and in a simulation ``private/``.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import safe_open

import client.grafting.grafts
from client.assemble import real_site, site_model
from client.folders import new_folder, reading
from client.grafting.grafts import ARRAYS_FILE, graft_metadata, is_graft_array
from client.model import AdaptedModel
from client.node import default_private_root
from client.private import PrivateStore
from client.site import Site, shared_arrays
from conf.compose import NOT_HASHED, load_saved
from conf.schema import Config, Mode
from server.record import RunFolder
from server.report.files import summary_of
from strategies.adapters import Arrays

LOADER_FILE = "graft.py"
"""Copy of ``client/grafting/grafts.py`` in an exported folder."""
_NOT_ONE_ADAPTER = {
    "pfl_moe": "its sites mix two models by a gate that is fitted when they are evaluated",
    "clair": "its sites' own adapters are not kept in the run folder",
    "centralised": "it has one model for all; bouquet merge writes that",
}
"""Methods and strategies whose personal model is no adapter in the private store -> why."""
_FIXED = ("method.graft.", "model.", "lora.", "seed.")
"""Beginnings of settings that decide what the run's adapter and a graft's arrays mean ..."""
_FREE = (*NOT_HASHED, "method.graft.calibration_examples")
"""... and those among them that do not."""

log = logging.getLogger("bouquet.personal")


def export_personal(run: Path, site: str, folder: Path, private: Path | None = None) -> None:
    """Write the model in use at a site for ``grafts.load_personal``; without a graft stock PEFT loads it too.

    Of a site that joined later the log says after how many rounds it is exported: its join may have been interrupted.

    Args:
        run: Folder of a completed run.
        site: A site of it.
        folder: New folder.
        private: Where this machine keeps private states of real sites; None: the default place.

    Raises:
        ValueError: If the run is not completed or its folder damaged, the site or its private state is not here, its
            personal model is not one adapter, or ``folder`` is not empty.
    """
    config, summary = _finished(run)
    for name in (config.method.name, config.strategy.name):
        if name in _NOT_ONE_ADAPTER:
            raise ValueError(f"{run} ran {name}, which has no personal adapter to export: {_NOT_ONE_ADAPTER[name]}")
    with new_folder(folder) as written:
        adapted = site_model(config)
        save_personal(adapted, _in_use(adapted, config, summary, run, site, private=private), written)


def _in_use(
    adapted: AdaptedModel, config: Config, summary: Mapping[str, Any], run: Path, site: str, *, private: Path | None
) -> Arrays:
    """The adapter in use at a site, from the run's and the site's private state."""
    shared = _shared(adapted, config, run)
    store = PrivateStore(_private_folder(config, summary, run, private), site, adapted.base.identity.sha256)
    if site not in summary["sites"] and not store.path.exists():
        raise ValueError(f"{run} had no site {site!r}; its sites: {', '.join(sorted(summary['sites']))}")
    if len(shared) < len(adapted.array_names) and not store.path.exists():
        if site not in (_trained(run) or {site}):
            raise ValueError(f"site {site!r} trained in no round: it has nothing of its own to export")
        raise ValueError(
            f"the private state of site {site!r} is not on this machine (looked for {store.path}): export where it is"
        )
    if site not in summary["sites"]:
        log.warning(
            "site %r joined later: this is its model after round %d; if that join was interrupted, repeat it first",
            site, _rounds_done(store),
        )  # fmt: skip
    return Site(site, [], {}, adapted=adapted, config=config, store=store).adapter_in_use(shared)


def _trained(run: Path) -> set[str]:
    """Sites whose training is in the run's metrics; none in a copy without these."""
    return {row["site"] for row in RunFolder(run).rows() if "site" in row and "train_loss" in row}


def save_personal(adapted: AdaptedModel, adapter: Arrays, folder: Path) -> None:
    """Write ``adapter``, a graft included, and the tokenizer.

    Raises:
        ValueError: If names or shapes are not those of this model's adapter.
    """
    adapted.save_peft(adapter, folder)
    adapted.tokenizer.save_pretrained(str(folder))
    if adapted.graft_spec is not None:
        of_grafts = {name: np.asarray(array, order="C") for name, array in adapter.items() if is_graft_array(name)}
        metadata = graft_metadata(adapted.layers, adapted.graft_spec)
        safetensors.numpy.save_file(of_grafts, folder / ARRAYS_FILE, metadata)
        shutil.copy(client.grafting.grafts.__file__, folder / LOADER_FILE)


def join_run(
    run: Path, site: str, data: Path, overrides: Sequence[str], private: Path | None = None
) -> Iterator[tuple[int, float]]:
    """Train a personal part for a new site, the run's adapter fixed, and keep it as if the site had taken part.

    Nothing is sent and nothing aggregated: this needs no server. Repeated, it goes on after the last round it kept.

    Args:
        run: Folder of a completed run of a method with a personal part, such as ``method=flex``.
        site: The new site's name.
        data: Its data file.
        overrides: Settings that are to differ from the run's, such as ``rounds=2``; not those that its adapter or the
            graft's formula depends on.
        private: As for ``export_personal``.

    Yields:
        Round and the site's held-out loss after it (nats per response token), beginning with the last round it kept or
        else with round 0, which is the run's adapter alone.

    Raises:
        ValueError: If the run is not completed or its folder damaged, its sites keep nothing of their own, the site
            took part in it or has joined it in as many rounds, an override must not be, or its data do not work out.
    """
    _check_overrides(run, overrides)
    config, summary = _finished(run, overrides)
    folder = _private_folder(config, summary, run, private)
    joined = real_site(config, site, str(data), folder)
    shared = _shared(joined.adapted, config, run)
    if len(shared) == len(joined.adapted.array_names):
        raise ValueError(f"{run} ran method={config.method.name}, whose sites have nothing of their own to train")
    if site in summary["sites"]:
        raise ValueError(f"site {site!r} has a part in {run} already: choose another name")
    done = _rounds_done(joined.store)
    if done >= config.rounds:
        raise ValueError(f"site {site!r} has joined {run} in {done} rounds already: choose another name or more rounds")
    yield done, joined.evaluate(shared)[site].loss
    for server_round in range(done + 1, config.rounds + 1):
        joined.train(server_round, shared, fix_shared=True)
        yield server_round, joined.evaluate(shared)[site].loss


def _check_overrides(run: Path, overrides: Sequence[str]) -> None:
    """Raise ``ValueError`` for one with which the run's adapter or an exported graft would be another model."""
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key == "method" or (f"{key}.".startswith(_FIXED) and key not in _FREE):
            raise ValueError(f"{override}: {key} must stay what it is in {run}, whose adapter and grafts depend on it")


def _rounds_done(store: PrivateStore) -> int:
    """The round after which the private state was saved; 0 if there is none."""
    if not store.load():
        return 0
    with safe_open(store.path, framework="numpy") as file:
        return int(file.metadata()["server_round"])


def _finished(run: Path, overrides: Sequence[str] = ()) -> tuple[Config, Mapping[str, Any]]:
    """Settings, with ``overrides``, and summary of a completed run; on the device there is here, and all of it."""
    summary = summary_of(run)
    if summary is None or summary["status"] != "completed":
        raise ValueError(f"{run} holds no completed run")
    here = ("device=auto", "federation.gpus_per_site=null", *overrides)
    path = run / "config.yaml"
    try:
        return load_saved(path.read_text(), here), summary
    except (OSError, ValueError) as error:
        raise ValueError(f"{' '.join([str(path), *overrides])}: {error}") from error


def _shared(adapted: AdaptedModel, config: Config, run: Path) -> Arrays:
    """What of the run's adapter sites have in common."""
    with reading(run / "adapter"):
        received = adapted.read_peft(run / "adapter")
    return shared_arrays({**adapted.initial_adapter(config.seed), **received}, config)


def _private_folder(config: Config, summary: Mapping[str, Any], run: Path, private: Path | None) -> Path:
    """Where the private states of the run's sites lie on this machine."""
    if config.federation.mode is Mode.simulation:
        return run / "private"
    return (private or default_private_root()).expanduser() / str(summary["run_id"])
