"""What one simulated site gets of this machine: its cores, and how much of a GPU, from what its training takes."""

from __future__ import annotations

import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from client.node import may_have_gpu
from conf.schema import Config, Device
from strategies.base import require

_CONTEXT_BYTES = 1 << 30
"""CUDA's context and the libraries' workspaces, which every process holds besides its tensors."""
_USABLE = 0.95
"""Share of a GPU's memory that is planned with."""


@dataclass(frozen=True)
class Need:
    """Bytes of a GPU."""

    site: int
    """What a process of simulated sites takes: the base once, and one site's training at a time."""
    gpu: int
    """What the GPU has."""


def choose_gpus_per_site(config: Config) -> float:
    """``federation.gpus_per_site``, or without it the share that training was measured to need; 0 without a GPU.

    Raises:
        ValueError: If one site's training does not fit on the GPU, or device=cuda and there is none.
    """
    given = config.federation.gpus_per_site
    if given is not None:
        return given
    if config.device is Device.cpu or (config.device is Device.auto and not may_have_gpu()):
        return 0.0
    # In a process of its own: the launcher imports no torch and holds no memory of the GPU.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        need = pool.submit(_measure, config).result()
    return 0.0 if need is None else gpu_share(need)


def check_share(config: Config) -> None:
    """Raise ``ValueError`` if ``federation`` gives a site more cores or GPUs than this machine has."""
    cores, gpus = os.cpu_count() or 1, config.federation.gpus_per_site
    require(
        config.federation.cpus_per_site <= cores,
        "federation.cpus_per_site",
        f"at most {cores}, this machine's cores",
        config.federation.cpus_per_site,
    )
    require(not gpus or may_have_gpu(), "federation.gpus_per_site", "0 or null, since there is no GPU here", gpus)


def gpu_share(need: Need) -> float:
    """One over the number of processes that train on a GPU at a time, beside the server's, which evaluates there.

    Raises:
        ValueError: If not even one fits.
    """
    each = need.site + _CONTEXT_BYTES
    fitting = int(_USABLE * need.gpu // each)
    if fitting < 1:
        raise ValueError(
            f"a simulated site needs {each / 2**30:.1f} GiB, the GPU has {need.gpu / 2**30:.1f} GiB: set a smaller "
            "train.micro_batch or train.gradient_checkpointing=true, or device=cpu"
        )
    # Rounded down, so that as many shares as there are processes are never more than one GPU.
    return math.floor(1e4 / max(1, fitting - 1)) / 1e4


def _measure(config: Config) -> Need | None:
    """What training takes on the first GPU, with the longest sequences of any site; None if there is no GPU."""
    # Torch takes seconds to import, and only this process needs it.
    import torch  # noqa: PLC0415

    from client.assemble import site_model  # noqa: PLC0415
    from client.data import simulated_sites  # noqa: PLC0415
    from client.memory import training_memory  # noqa: PLC0415
    from client.methods import method_for  # noqa: PLC0415
    from client.runtime import resolve_device  # noqa: PLC0415

    if resolve_device(config.device).type != "cuda":
        return None
    adapted = site_model(config)
    examples = [example for site in simulated_sites(config).values() for example in site.train]
    method = method_for(config.method)
    passes = method.passes_over(method.encode(examples, adapted.tokenizer, config.data))
    memory = training_memory(adapted, passes.sequences, config.train)
    gpu = torch.cuda.get_device_properties(adapted.device).total_memory
    wanted = config.train.micro_batch
    # With "auto", the whole step if it fits on a GPU of its own; the site finds out what does.
    num_sequences = wanted if isinstance(wanted, int) else passes.of_step(config.train.batch_size)
    site = memory.total_bytes(num_sequences)
    if wanted == "auto":
        site = min(site, int(_USABLE * gpu) - _CONTEXT_BYTES)
    return Need(site=site, gpu=gpu)
