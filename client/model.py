"""A base model with the adapter that is trained on it.

A site's adapter is a set of named float32 arrays. Virtual clients in one process share the base and
take turns: load an adapter, train, read it back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from numpy.typing import NDArray
from peft.utils import ModulesToSaveWrapper

from client.adapter_layout import ADAPTER, adapter_slots, moe_layers, peft_config, train_replaced_in_float32
from client.base_model import BaseModel, load_base, share_weights
from client.experts import use_engine
from client.grafting.grafts import NO_GRAFT, Graft, attach_grafts, graft_name, is_graft_array
from client.grafting.layout import graft_slots, graft_spec
from client.routing import ExpertTokenCounter, RoutedTokens, count_router_choices
from conf.methods import GraftConfig
from conf.model import LoraConfig, ModelConfig
from conf.seeds import generator_for
from strategies.adapters import Arrays, check_same_layout

_adapted: dict[str, AdaptedModel] = {}
"""By settings, the one used last at the end."""
_KEPT = 2
"""Of them: a server's and its sites', or the adapter's rank and a personal one. A worker outlives many runs."""


def adapted_model(
    model: ModelConfig, lora: LoraConfig, device: torch.device, graft: GraftConfig | None = None
) -> AdaptedModel:
    """The base model with room for an adapter; the last ones made are shared, so callers load the adapter they use.

    Raises:
        ValueError: If the settings do not fit the model: see ``AdaptedModel`` and ``load_base``.
    """
    key = repr((model, lora, device, graft))
    found = _adapted.pop(key, None)
    while len(_adapted) >= _KEPT:  # before another takes memory
        del _adapted[next(iter(_adapted))]
    _adapted[key] = found or AdaptedModel(load_base(model, device), model, lora, graft)
    return _adapted[key]


class AdaptedModel:
    """A base model with one adapter: low-rank updates, and experts or routers trained in full where asked.

    The adapter's arrays are named and shaped as the strategies know them, whatever PEFT keeps inside. With a ``graft``
    they hold a site's personal experts too, and which experts these were copied from.

    Raises:
        ValueError: If the model has experts but none would be trained although ``model.experts`` says so, if
            experts or routers are asked of a dense model, if nothing is left to train, or if a graft does not fit.
    """

    def __init__(
        self, base: BaseModel, config: ModelConfig, lora: LoraConfig, graft: GraftConfig | None = None
    ) -> None:
        layers = moe_layers(base.model)
        self.base = base
        self.tokenizer = base.tokenizer
        self.device = base.model.device
        with warnings.catch_warnings():
            # PEFT asks the model by a name that transformers is about to drop.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.model = peft.get_peft_model(share_weights(base.model), peft_config(base.model, config, lora))
        """The module to call; computes with the adapter that was loaded last."""
        # Set here: PEFT overwrites what its config says with the folder that the base was read from.
        self.model.peft_config[ADAPTER].base_model_name_or_path = base.identity.path
        self.layers: dict[str, int] = {name: layer.num_experts for name, layer in layers.items()}
        """MoE layer -> number of its routed experts; empty for a dense model."""
        train_replaced_in_float32(self.model, layers)
        self._moe_layers = layers
        self._routed = RoutedTokens()
        use_engine(self.model, layers, self._routed)
        self._slots = adapter_slots(self.model)
        self.graft_spec = None if graft is None else graft_spec(graft, lora, config, layers)
        """What grafts there are; None: none."""
        self._grafts: dict[str, Graft] = {}
        if self.graft_spec is not None:
            self._grafts = attach_grafts(self.model.get_base_model(), layers, self.graft_spec)
            self._slots |= graft_slots(self._grafts)
        # Zero-stride arrays: the names and shapes of an adapter without its memory.
        self._layout: Arrays = {
            name: np.broadcast_to(np.float32(0), tuple(slot.unpack(slot.parameter).shape))
            for name, slot in self._slots.items()
        }

    def initial_adapter(self, seed: int) -> dict[str, NDArray[np.float32]]:
        """The adapter before round 1, under which the model computes what its base does.

        A is uniform within 1/sqrt(inputs) as in PEFT, B is zero, weights trained in full are the base's, and there is
        no graft (see ``grafted``). An array depends on ``seed`` and its name alone.
        """
        adapter: dict[str, NDArray[np.float32]] = {}
        for name, slot in self._slots.items():
            shape = self._layout[name].shape
            if slot.base is not None:
                adapter[name] = _to_numpy(slot.base)
            elif name.endswith(".choice"):
                adapter[name] = np.full(shape, NO_GRAFT, np.float32)
            elif name.endswith("lora_A"):
                limit = shape[-1] ** -0.5
                adapter[name] = generator_for(seed, "adapter", name).uniform(-limit, limit, shape).astype(np.float32)
            else:
                adapter[name] = np.zeros(shape, np.float32)
        return adapter

    def grafted(
        self, choices: Mapping[str, Sequence[int]], generator: np.random.Generator
    ) -> dict[str, NDArray[np.float32]]:
        """The arrays of all grafts before their training.

        Args:
            choices: MoE layer -> the experts that its graft is made from.
            generator: Source of the random factors of a low-rank graft.
        """
        draws, experts = torch.Generator().manual_seed(int(generator.integers(2**63))), self.experts()
        return {
            graft_name(layer, name): _to_numpy(tensor)
            for layer, graft in self._grafts.items()
            for name, tensor in graft.copied(experts[layer], choices[layer], draws).items()
        }

    def load_adapter(self, arrays: Arrays) -> None:
        """Compute with this adapter from now on; the arrays are copied.

        Raises:
            ValueError: If names or shapes are not those of this model's adapter.
        """
        check_same_layout(self._layout, arrays)
        with torch.no_grad():
            for name, slot in self._slots.items():
                slot.parameter.copy_(self.from_canonical(name, arrays[name]))

    def read_adapter(self) -> dict[str, NDArray[np.float32]]:
        """A copy of the adapter as it is now."""
        return {name: self.to_canonical(name, slot.parameter) for name, slot in self._slots.items()}

    @property
    def array_names(self) -> list[str]:
        """Names of all arrays of an adapter, in their order."""
        return list(self._layout)

    def parameters_by_name(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, float32 and in PEFT's shape, by the name of its array: not what is ``fixed``."""
        parameters = {name: slot.parameter for name, slot in self._slots.items()}
        return {
            name: parameter
            for name, parameter in parameters.items()
            if isinstance(parameter, torch.nn.Parameter) and parameter.requires_grad
        }

    @contextmanager
    def fixed(self, names: Iterable[str]) -> Iterator[None]:
        """Leave these arrays out of training while the context lasts."""
        trained = self.parameters_by_name()
        parameters = [trained[name] for name in names]
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_()

    def to_canonical(self, name: str, stored: torch.Tensor) -> NDArray[np.float32]:
        """A tensor of parameter ``name``'s shape (its value, gradient or moment) as a new array in our layout."""
        return _to_numpy(self._slots[name].unpack(stored))

    def from_canonical(self, name: str, array: NDArray[np.floating]) -> torch.Tensor:
        """The inverse of ``to_canonical``: float32, on the model's device."""
        # A copy, since a received array may be read-only, which torch cannot express.
        tensor = torch.from_numpy(np.array(array, np.float32))
        return self._slots[name].pack(tensor).to(self.device)

    @property
    def experts_per_token(self) -> int:
        """Routed experts that each token is sent to."""
        network: Any = self.model.get_base_model()
        return int(network.config.get_text_config().num_experts_per_tok)

    def routers(self) -> dict[str, torch.nn.Module]:
        """MoE layer -> its router, the trained copy where there is one: a module with a ``weight`` (experts, width).

        Raises:
            ValueError: If a layer has none that we recognise.
        """
        network: Any = self.model.get_base_model()
        found = {}
        for name, layer in self._moe_layers.items():
            if layer.router is None:
                raise ValueError(f"{type(network).__name__} has no router that we recognise in {name}")
            module = network.get_submodule(layer.router)
            found[name] = module.modules_to_save[ADAPTER] if isinstance(module, ModulesToSaveWrapper) else module
        return found

    def experts(self) -> dict[str, Any]:
        """MoE layer -> its module of fused experts, as transformers made it, where none of them is trained."""
        network = self.model.get_base_model()
        return {layer: network.get_submodule(f"{layer}.experts") for layer in self.layers}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode while the context lasts: no dropout, and layers that are checkpointed keep a cache."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Compute as the base model does while the context lasts: the reference of alignment, without a second copy."""
        # PEFT switches gradients off with its layers, and on again for more parameters than we train.
        trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)

    @contextmanager
    def count_expert_tokens(self) -> Iterator[ExpertTokenCounter]:
        """Count the tokens routed to each expert while the context lasts.

        Call the counter's ``set_mask`` before each forward pass: padding is not counted, and no expert computes it.
        """
        counter = ExpertTokenCounter(self.layers, self.device)
        network: Any = self.model.get_base_model()
        outside = [layer for layer in self._moe_layers.values() if not layer.has_interface]
        routers = {layer.name: network.get_submodule(str(layer.router)) for layer in outside}
        per_token = self.experts_per_token if routers else 0
        self._routed.counter = counter
        try:
            with count_router_choices(routers, per_token, counter):
                yield counter
        finally:
            self._routed.counter = None

    def save_peft(self, arrays: Arrays, folder: Path) -> None:
        """Write ``arrays`` in PEFT's own format, for ``PeftModel.from_pretrained(base, folder)``.

        The adapter that is loaded stays what it is.

        Raises:
            ValueError: If names or shapes are not those of this model's adapter.
        """
        check_same_layout(self._layout, arrays)
        names = {id(slot.parameter): name for name, slot in self._slots.items()}
        state = self.model.state_dict()
        for key, parameter in self.model.named_parameters():
            if id(parameter) in names:
                name = names[id(parameter)]
                state[key] = self.from_canonical(name, arrays[name]).contiguous()
        # "auto" would ask the hub whether the vocabulary was resized.
        self.model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)

    def read_peft(self, folder: Path) -> dict[str, NDArray[np.float32]]:
        """The arrays that ``save_peft`` wrote into ``folder``; they stay loaded.

        Raises:
            ValueError: If there is no adapter, or it is not one of this model.
        """
        if not (folder / "adapter_config.json").exists():
            raise ValueError(f"{folder} holds no adapter: the run did not complete a round")
        weights = peft.load_peft_weights(str(folder), device="cpu")
        try:
            outcome: Any = peft.set_peft_model_state_dict(self.model, weights)
        except RuntimeError as error:  # torch's word for shapes that differ
            raise ValueError(f"the adapter in {folder} does not fit these settings: {error}") from error
        if outcome.unexpected_keys:
            foreign = sorted(outcome.unexpected_keys)[:4]
            raise ValueError(f"the adapter in {folder} has arrays that this model lacks: {foreign}")
        return {name: array for name, array in self.read_adapter().items() if not is_graft_array(name)}


def _to_numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    return np.array(tensor.detach().cpu().float().numpy(), np.float32, order="C")
