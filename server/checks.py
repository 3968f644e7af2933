"""What ``bouquet doctor`` looks at: each check returns what it found, or raises with what to change."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from packaging.requirements import Requirement

from client.alignment.reward_models import named_rewards
from client.assemble import model_for, site_model, training_processes
from client.bases import cache_root
from client.data import SiteData, held_out_file, label_counts, own_site, simulated_sites
from client.evaluation.general_sets import general_sets
from client.memory import amount, choose_micro_batch, free_bytes, training_memory
from client.methods import method_for
from client.node import default_private_root
from client.site import shared_arrays
from conf.alignment import FirmConfig
from conf.check import check_num_sites
from conf.model import ExpertTraining
from conf.schema import Config
from server.certificates import check_private_key, check_server_certificate, public_fingerprint
from server.flower import environment
from server.gpu_share import check_share
from server.probe import check_clock, look_at

MIN_FREE_DISK_BYTES = 1 << 30
"""Free disk that any run should find, besides what it is known to write."""
_EXPIRY_WARNING_DAYS = 30
_SKEW_WARNING = 10.0
_GIB = 1 << 30


class Caution(Exception):  # noqa: N818 - no error: the run will work, but look at this
    """A finding that does not stop a run."""


def versions() -> str:
    """Versions of what results and protocol depend on.

    Raises:
        ValueError: If one is outside the range that Bouquet is tested with.
    """
    wanted = [Requirement(line) for line in importlib.metadata.requires("bouquet-fl") or [] if "extra ==" not in line]
    found = {requirement.name: importlib.metadata.version(requirement.name) for requirement in wanted}
    wrong = [f"{entry.name}{entry.specifier}, here {found[entry.name]}" for entry in wanted
             if not entry.specifier.contains(found[entry.name], prereleases=True)]  # fmt: skip
    if wrong:
        raise ValueError(f"Bouquet needs {'; '.join(wrong)}: pip install -r requirements.lock")
    return ", ".join(f"{name} {found[name]}" for name in ("flwr", "torch", "transformers", "peft"))


def telemetry() -> str:
    """Whether Flower reports home.

    Raises:
        Caution: If it would when started without Bouquet.
    """
    assert environment(Path(), 1)["FLWR_TELEMETRY_ENABLED"] == "0"
    if os.environ.get("FLWR_TELEMETRY_ENABLED") != "0":
        raise Caution("off in all that bouquet starts; for Flower's own commands export FLWR_TELEMETRY_ENABLED=0")
    return "off"


def working_directory(folder: Path) -> str:
    """Where processes start.

    Raises:
        Caution: If a folder there would be imported instead of one of our packages by a process that starts there.
    """
    checkout = Path(__file__).resolve().parents[1]
    shadows = [name for name in ("client", "conf", "server", "strategies") if (folder / name).is_dir()]
    if shadows and folder.resolve() != checkout:
        raise Caution(
            f"{folder} holds a folder {shadows[0]!r}: start Flower's own commands elsewhere, it hides Bouquet's"
        )
    return str(folder)


def base_model(config: Config) -> str:
    """The base model, and what of it would be trained.

    Raises:
        ValueError: If it cannot be had, or settings and model do not fit: say, no routed expert trainable.
        Caution: If no routed expert will be trained, since there is none or they are frozen.
    """
    adapted = site_model(config)
    base = f"{adapted.base.identity.name} sha256 {adapted.base.identity.sha256[:12]}"
    trained = sum(parameter.numel() for parameter in adapted.parameters_by_name().values())
    if not adapted.layers:
        raise Caution(
            f"{base} is dense, {trained:,} trained parameters: set model.upcycle.num_experts to give it experts"
        )
    if adapted.graft_spec is not None:
        personal = f"{adapted.graft_spec.num_experts * len(adapted.layers)} personal experts a site"
        return f"{base}; {personal} in {len(adapted.layers)} layers; {trained:,} trained parameters"
    if config.model.experts is ExpertTraining.frozen:
        raise Caution(
            f"{base}, {trained:,} trained parameters, none of an expert: set model.experts=lora to train them"
        )
    experts = f"{sum(adapted.layers.values())} routed experts in {len(adapted.layers)} layers"
    return f"{base}; model.experts={config.model.experts.value} trains {experts}; {trained:,} trained parameters"


def memory(config: Config, load: Callable[[], Iterable[SiteData]]) -> str:
    """What training takes beside the base model, which is loaded by now, against what is free.

    Args:
        config: The settings.
        load: Gives the sites that train on this machine; none at the server of separate machines.

    Raises:
        ValueError: If it will not fit; the message has the numbers and what to set.
        Caution: If the data cannot be had.
    """
    adapted = site_model(config)
    free = free_bytes(adapted.device)
    try:
        examples = [example for site in load() for example in site.train]
    except ValueError:
        raise Caution("not estimated: the data cannot be had") from None
    if not examples:
        return f"{amount(free)} free on {adapted.device} beside the base model; nothing is trained here"
    method = method_for(config.method)
    passes = method.passes_over(method.encode(examples, adapted.tokenizer, config.data))
    needed = training_memory(adapted, passes.sequences, config.train)
    together = training_processes(config, adapted.device)
    # Every further process loads the base model once more.
    share = max(0, free - (together - 1) * needed.base_bytes) // together
    num_sequences = choose_micro_batch(adapted, passes, config.train, share)
    return f"{needed.describe(num_sequences)}; {amount(free)} free for {together} process(es) that train at a time"


def rewards(config: Config, *, at_site: bool) -> str:
    """Each reward of ``method.rewards``, tried on two texts.

    Raises:
        ValueError: If one cannot be had or does not work.
        Caution: If that is so at a site, whose node config may name a reward model of its own.
    """
    assert isinstance(config.method, FirmConfig)
    try:
        found = named_rewards(config.method.rewards, site_model(config), config.method.reward_formats)
        scores = found.score(["Name a colour.", "Say no."], ["Red.", "no"])
    except (ValueError, OSError) as error:
        if at_site:
            raise Caution(f"{error}; unless this site's node config names its own") from None
        raise ValueError(str(error)) from None
    return ", ".join(f"{name} {low:.2g} to {high:.2g}" for name, low, high in zip(
        found.names, scores.min(axis=0), scores.max(axis=0), strict=True))  # fmt: skip


def disk(config: Config, folders: Mapping[str, Path]) -> str:
    """Free space where a run writes.

    Raises:
        ValueError: If there is less than the adapters of the run and a reserve.
    """
    adapter = sum(array.nbytes for array in shared_arrays(model_for(config).initial_adapter(0), config).values())
    need = MIN_FREE_DISK_BYTES + 4 * adapter
    texts = []
    for setting, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < need:
            raise ValueError(
                f"{setting} {folder}: {free / _GIB:.1f} GiB free, {need / _GIB:.1f} GiB needed: make room, or name "
                "another place"
            )
        if not os.access(existing, os.W_OK):
            raise ValueError(f"{setting} {folder} cannot be written: chown it, or name another place")
        texts.append(f"{setting} {free / _GIB:.0f} GiB free")
    return ", ".join(texts)


def run_folders(config: Config) -> dict[str, Path]:
    """Where a run writes on this machine, by the setting that says so."""
    return {"output": Path(config.output or "outputs").absolute(), "$BOUQUET_CACHE": cache_root().absolute()}


def site_folders(home: Path | None) -> dict[str, Path]:
    """Where a site writes."""
    return {"private": (home or default_private_root()).absolute(), "$BOUQUET_CACHE": cache_root().absolute()}


def partition(config: Config) -> str:
    """Training examples of each simulated site, and how uneven they are.

    Raises:
        ValueError: If data cannot be loaded or divided, too few sites would reply, or a site is to have more of this
            machine than there is.
        Caution: If sizes or labels are very uneven.
    """
    check_share(config)
    sizes = {name: len(data.train) for name, data in simulated_sites(config).items()}
    check_num_sites(config, len(sizes), f"the number of sites, {len(sizes)},")
    text = f"{len(sizes)} sites, {min(sizes.values())} to {max(sizes.values())} training examples" + label_skew(
        label_counts(config)
    )
    if max(sizes.values()) > _SKEW_WARNING * min(sizes.values()):
        small = min(sizes, key=lambda name: sizes[name])
        raise Caution(f"{text}; {small} has {sizes[small]} only: raise partition.alpha or partition.min_examples")
    return text


def label_skew(counts: Mapping[str, Mapping[str, int]]) -> str:
    """How far the sites' labels are from those of all together: total variation distance, 0 same, 1 disjoint."""
    labels = sorted({label for own in counts.values() for label in own})
    if len(labels) < 2:
        return ""
    total = {label: sum(own.get(label, 0) for own in counts.values()) for label in labels}
    everything = sum(total.values())
    distances = [
        sum(abs(own.get(label, 0) / sum(own.values()) - total[label] / everything) for label in labels) / 2
        for own in counts.values()
    ]
    return (
        f"; label skew {sum(distances) / len(distances):.2f} on average, {max(distances):.2f} at most (0 even, 1 apart)"
    )


def own_data(config: Config, name: str, path: Path) -> str:
    """A real site's examples.

    Raises:
        ValueError: If they cannot be used.
    """
    data = own_site(config, name, str(path))
    return f"{len(data.train)} training and {len(data.held_out)} held-out examples in {path}"


def evaluation_sets(config: Config) -> str:
    """Sizes of the sets that are the server's own.

    Raises:
        ValueError: If one cannot be read.
    """
    sizes = {} if config.eval.path is None else {"eval.path": len(held_out_file(config, config.eval.path))}
    sets = general_sets(config) if config.eval.matrix else {}
    sizes |= {name: len(found.examples) + len(found.questions) for name, found in sets.items()}
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "none at the server"


def private_key(path: Path) -> str:
    """Fingerprint of the site's key, to be compared with the server operator's.

    Raises:
        ValueError: If it cannot be used, or others can read it.
    """
    return f"{path} is {check_private_key(path)}"


def server_certificates(folder: Path) -> str:
    """The server's certificate and the sites that may join.

    Raises:
        ValueError: If a file is missing, unfit or expired.
        Caution: If the certificate ends soon, or no site may join.
    """
    expires = check_server_certificate(folder)
    sites = {path.stem: public_fingerprint(path) for path in sorted((folder / "sites").glob("*.pub"))}
    if not sites:
        raise Caution(f"{folder / 'sites'} holds no public key, so no site may join: bouquet certs DIR --site NAME")
    _warn_of_end(expires.timestamp(), "server.crt")
    return f"server.crt is valid until {expires:%Y-%m-%d}; {', '.join(sites)} may join"


def superlink(address: str, authority: Path | None) -> str:
    """The server, as a site sees it: port, TLS chain, names, gate, clock.

    Raises:
        ValueError: If it cannot be used.
        RuntimeError: If nothing answers.
        Caution: If its certificate ends soon, or it is open.
    """
    seen = look_at(address, authority)
    check_clock(seen, address)
    if seen.expires is not None:
        _warn_of_end(seen.expires, f"the certificate of {address}")
    if authority is None or not seen.gated:
        missing = "without TLS" if authority is None else "without Bouquet's gate"
        raise Caution(f"{address} answers {missing}: who reaches it may run code on every site; bouquet server up")
    return f"{address} answers over TLS, its certificate fits, clocks {seen.clock_ahead_seconds:+.0f} s"


def _warn_of_end(expires: float, what: str) -> None:
    days = (expires - time.time()) / 86400
    if days < _EXPIRY_WARNING_DAYS:
        raise Caution(f"{what} ends in {days:.0f} days: bouquet certs DIR issues it anew, then restart the server")
