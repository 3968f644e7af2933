"""A simulated run in this process, without Flower: the same sites, rules and draws, one site after the other.

It ends with the adapter that ``bouquet run`` ends with (``tests/benchmarks/test_federation.py``), and costs nothing
but training: the base model is loaded once for any number of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from client.assemble import model_for, simulated_site
from client.data import site_names
from client.model import AdaptedModel
from client.site import Site, shared_arrays
from conf.schema import Config
from server.round_record import sample_sites
from strategies.adapters import Arrays, check_finite
from strategies.base import Aggregation, ClientUpdate
from strategies.screen import screened

Watch = Callable[[Arrays, Sequence[ClientUpdate], Aggregation, Mapping[str, Arrays]], object]
"""Told of every round: the adapter before it, the updates, what became of them, and by site what it got of its own."""


class Federation:
    """The rounds of one run; ``adapter`` is the global adapter after ``server_round`` rounds."""

    def __init__(self, config: Config, adapted: AdaptedModel, sites: Mapping[str, Site]) -> None:
        """Start from the adapter before round 1.

        Args:
            config: The run's settings.
            adapted: The model that all sites share.
            sites: By name; any data they hold.
        """
        self.config = config
        self.adapted = adapted
        self.sites = sites
        self.strategy = screened(config.strategy, config.screen)
        self.adapter: Arrays = shared_arrays(adapted.initial_adapter(config.seed), config)
        self.state = self.strategy.init_state(self.adapter)
        self.personal: Mapping[str, Arrays] = {}
        self.server_round = 0
        self.bytes_down = self.bytes_up = 0
        """Bytes of adapters and what goes beside them so far: values alone, no names or headers."""
        self.watch: Watch | None = None

    def received(self, site: str) -> Arrays:
        """What the server would send the site now."""
        return self.personal.get(site, self.adapter)

    def train(self, server_round: int) -> list[ClientUpdate]:
        """What the sites asked in this round make of what they receive, in the order of their names.

        Raises:
            ValueError: If training fails at a site, or its update would be refused.
        """
        asked = sample_sites(sorted(self.sites), self.config, server_round)
        broadcast = self.strategy.broadcast(self.state)
        updates = [self.sites[name].train(server_round, self.received(name), broadcast) for name in asked]
        for update in updates:
            self.strategy.check_update(self.adapter, update)
        return updates

    def play(self) -> list[ClientUpdate]:
        """Play the next round; the updates it was made from.

        Raises:
            ValueError: As ``train``, or if the next adapter is not finite.
        """
        updates = self.train(self.server_round + 1)
        broadcast = self.strategy.broadcast(self.state)
        self.bytes_down += sum(_num_bytes(self.received(update.site)) + _num_bytes(broadcast) for update in updates)
        self.bytes_up += sum(_num_bytes(update.adapter) + _num_bytes(update.extras) for update in updates)
        aggregation = self.strategy.aggregate(self.adapter, self.state, updates)
        check_finite(aggregation.adapter)
        if self.watch is not None:
            self.watch(self.adapter, updates, aggregation, self.personal)
        self.adapter, self.state = aggregation.adapter, aggregation.state
        self.personal = {**self.personal, **aggregation.personal}
        self.server_round += 1
        return updates

    def rounds(self) -> Iterator[list[ClientUpdate]]:
        """Play the rounds that are left of ``config.rounds``."""
        while self.server_round < self.config.rounds:
            yield self.play()

    def whole_adapter(self) -> Arrays:
        """The global adapter with the initial value of whatever is not shared: what a run folder holds."""
        return {**self.adapted.initial_adapter(self.config.seed), **self.adapter}


def simulated(config: Config, private_folder: Path) -> Federation:
    """The federation that ``bouquet run`` would simulate.

    Raises:
        ValueError: If data or model settings do not work out; the message names the setting.
    """
    adapted = model_for(config)
    sites = {name: simulated_site(config, name, private_folder) for name in site_names(config)}
    return Federation(config, adapted, sites)


def _num_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())
