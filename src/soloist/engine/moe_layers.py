"""The expert layers of one rank's stage: which slots it holds, and what each layer is made of."""

from __future__ import annotations

from collections.abc import Iterator

from soloist.engine.dispatchers import Dispatchers
from soloist.engine.options import EngineOptions
from soloist.engine.world import World
from soloist.models.weights import WeightSource
from soloist.moe.fp8_experts import load_experts
from soloist.moe.layer import MoELayer
from soloist.moe.router import Router, SlotTable
from soloist.moe.stats import LoadStats
from soloist.placement.placement import Placement
from soloist.placement.replicas import Closeness
from soloist.specs.layout import Seat
from soloist.specs.model import ModelSpec
from soloist.timing import Stopwatch


def moe_layers_of(spec: ModelSpec, seat: Seat) -> list[int]:
    """Those of the seat's stage."""
    stage = seat.layout.stage_layers(seat.stage, spec.layers)
    return [layer for layer in spec.moe_layers if layer in stage]


def slots_of(spec: ModelSpec, placement: Placement, seat: Seat) -> dict[int, tuple[int, ...]]:
    """The experts in the slots that the placement gives the seat's group, by MoE layer of its stage."""
    return {layer: placement.slots[spec.moe_layers.index(layer)][seat.group] for layer in moe_layers_of(spec, seat)}


def moe_layers(
    spec: ModelSpec,
    placement: Placement,
    world: World,
    source: WeightSource,
    options: EngineOptions,
    dispatchers: Dispatchers,
    stats: LoadStats,
    watch: Stopwatch,
) -> Iterator[tuple[int, MoELayer]]:
    """Read the weights, layer by layer."""
    seat, device = world.seat, source.device
    nodes, closeness = world.topology.node_of_group, Closeness.parse(options.replicas)
    keep = options.keep_fp8 and device.type == "cuda"
    for layer, expert_ids in slots_of(spec, placement, seat).items():
        experts = load_experts(spec, source, layer, expert_ids, seat.tp_index, seat.layout.tp, keep)
        sharded, replicated = dispatchers.of(len(expert_ids))
        yield (
            layer,
            MoELayer(
                router=Router.load(spec, source, layer),
                table=SlotTable(placement, spec.moe_layers.index(layer), seat.group, device, nodes, closeness),
                dispatcher=sharded,
                replicated=replicated,
                own=dispatchers.own,
                experts=experts,
                layer=layer,
                stats=stats,
                watch=watch,
            ),
        )
