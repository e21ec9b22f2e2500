"""How tokens cross the declared nodes: flat or by node, over which links, in how many chunks.

    exchange = flat           every copy of a token crosses by itself
               hierarchical   a token crosses to each node once (dispatch/hierarchical.py)
               auto           whichever the links' rates make faster for a call's tokens (planner/batching.py)

Rates are those that the options declare, or measured at the start, when all ranks agree on the slowest of each kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from soloist.dispatch.base import Dispatcher, ExpertBatch, PendingBatch, PendingTokens, SlotChoice
from soloist.dispatch.hierarchical import HierarchicalDispatcher
from soloist.dispatch.ragged import RaggedDispatcher
from soloist.dispatch.rows import RowFormat
from soloist.engine.options import EngineOptions
from soloist.engine.world import World
from soloist.planner.batching import Batching, Link, Links, Traffic, choose
from soloist.specs.model import ModelSpec
from soloist.transport.base import Transport
from soloist.transport.link import measure_link


@dataclass
class Crossings:
    """One rank's choices, shared by all its layers. `used` keeps what was chosen, for whoever asks why."""

    spec: ModelSpec
    world: World
    options: EngineOptions
    dtype: torch.dtype
    links: Links | None = None
    used: dict[int, Batching] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Collective where links have to be measured."""
        fixed = self.options.exchange == "hierarchical" and self.options.exchange_chunks
        if self.world.rails is not None and not fixed:
            self.links = declared_links(self.options) or measure_links(self.world)

    def of(self, slots: int, tp: Transport | None = None) -> Dispatcher:
        """The dispatcher of a layer whose group has so many slots."""
        world = self.world
        flat = RaggedDispatcher(world.experts, world.topology, slots, tp)
        if world.rails is None or world.rail is None or world.node is None:
            return flat
        by_node = HierarchicalDispatcher(world.rail, world.node, world.rails, slots, tp)
        if self.links is None:
            return replace(by_node, chunks=self.options.exchange_chunks or 1)
        return BySize(flat, replace(by_node, chunks_for=lambda tokens: self.batching(tokens).chunks), self)

    def batching(self, tokens: int) -> Batching:
        """How a call of at most `tokens` tokens a rank travels; the same on all ranks."""
        if tokens not in self.used:
            options = self.options
            assert self.links is not None, "nothing to choose"
            self.used[tokens] = choose(
                tokens, self.traffic, self.links, options.exchange, options.exchange_chunks,
                int(options.exchange_buffer_MB * 1e6),
            )  # fmt: skip
        return self.used[tokens]

    @cached_property
    def traffic(self) -> Traffic:
        row_bytes = RowFormat(self.dtype, self.spec.d_model, self.spec.router.top_k).row_bytes
        return Traffic.of(self.spec, self.world.seat.layout, self.world.gpus_per_node, row_bytes)

    def explain(self) -> list[str]:
        """What was chosen so far, and from which rates, or why there was nothing to choose."""
        links = self.links
        if self.world.rails is None:
            return [self._flat_because()]
        if links is None:
            return [f"by node in {self.options.exchange_chunks} chunks, as exchange and exchange_chunks say"]
        rates = f"across nodes {links.network}, inside {links.inside}, flat {links.flat}"
        return [f"links ({links.source}): {rates}", *(str(self.used[tokens]) for tokens in sorted(self.used))]

    def _flat_because(self) -> str:
        layout, options = self.world.seat.layout, self.options
        if layout.ep == 1:
            return "one expert group: no token leaves it"
        if layout.size <= options.gpus_per_node:
            return f"flat: {layout.size} ranks are one node of gpus_per_node = {options.gpus_per_node}"
        if options.exchange == "flat":
            return "flat, as exchange says"
        if options.gpus_per_node % layout.tp:
            return f"flat: nodes of gpus_per_node = {options.gpus_per_node} cut expert groups of tp = {layout.tp}"
        return "flat: all ranks are on this machine and share its memory; to cross by node, set exchange=hierarchical"


def declared_links(options: EngineOptions) -> Links | None:
    """Those of the options, where they name both."""
    if not options.network_link or not options.inside_link:
        return None
    network, inside = Link.parse(options.network_link, "network_link"), Link.parse(options.inside_link, "inside_link")
    return Links(network=network, inside=inside, flat=network, source="declared")


def measure_links(world: World) -> Links:
    """Of the rail, the node and the flat exchange, while all ranks use them: the slowest rank's. Collective."""
    assert world.rail is not None, "flat exchange has no rail to measure"
    assert world.node is not None, "flat exchange has no node to measure"
    figures = [number for t in (world.rail, world.node, world.experts) for number in measure_link(t)]
    own = torch.tensor([figures], dtype=torch.float64, device=world.root.device)
    everybody = world.root.all_gather_rows(own, [1] * world.root.size, "measuring the links").cpu()
    latencies, rates = everybody[:, ::2].amax(0).tolist(), everybody[:, 1::2].amin(0).tolist()
    for transport in (*world.data_transports, world.root):
        transport.traffic.reset()
    network, inside, flat = (Link(latency_s=s, rate=rate) for s, rate in zip(latencies, rates, strict=True))
    return Links(network=network, inside=inside, flat=flat, source="measured")


@dataclass(frozen=True)
class BySize(Dispatcher):
    """Flat or by node, by the tokens of a call. Without `fit` it goes by node."""

    flat: RaggedDispatcher
    by_node: HierarchicalDispatcher
    crossings: Crossings

    def fit(self, tokens: int) -> Dispatcher:
        return self.by_node.fit(tokens) if self.crossings.batching(tokens).hierarchical else self.flat

    def start_dispatch(self, x_TD: torch.Tensor, choice: SlotChoice, where: str = "") -> PendingBatch:
        return self.by_node.start_dispatch(x_TD, choice, where)

    def start_combine(self, y_RD: torch.Tensor, batch: ExpertBatch, where: str = "") -> PendingTokens:
        return self.by_node.start_combine(y_RD, batch, where)
