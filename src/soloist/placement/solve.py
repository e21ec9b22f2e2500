"""Which expert where: replicas by water-filling, experts to nodes by swaps on exact traffic, then to groups and rails.

Shape legend: L MoE layers, E experts, G expert groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from soloist.placement.baselines import contiguous, greedy, round_robin
from soloist.placement.layer import LayerSearch, Target, Weights
from soloist.placement.packing import water_fill
from soloist.placement.placement import LayerSlots, Placement
from soloist.placement.router_groups import GroupedSearch, whole_groups
from soloist.placement.trace import Array, RoutingTrace


@dataclass(frozen=True)
class Solution:
    """A placement, and for each layer its objective, a lower bound of it for the same replicas, and baselines'."""

    placement: Placement
    value_L: Array
    bound_L: Array
    baselines: dict[str, tuple[Placement, Array]]
    swaps: int
    keeps_groups: bool = False  # every router group lies whole on one node

    @property
    def gap(self) -> float:
        """How far the objective is above its bound, as a share of the bound."""
        return float(self.value_L.sum() / self.bound_L.sum() - 1)


def solve(
    trace: RoutingTrace,
    target: Target,
    weights: Weights | None = None,
    matrices: tuple[Array, Array] | None = None,
    row_bytes: float = 16384.0,
    current: Placement | None = None,
    router_groups: int = 1,
) -> Solution:
    """The best placement found for recorded routing; never worse than the baselines in the objective.

    router_groups: the model's, each of which stays whole on one node where nodes have room for that; then it is never
    worse than those baselines that keep them, too, and hold no replicas.

    matrices: bytes/s and seconds between groups, for the greedy baseline; by default all alike. current: where the
    experts lie now; the search starts there too, and every slot on a part that would have to fetch its expert costs its
    share of `weights.migration`. Where the trace holds counts only, pairs of experts stand in for tokens.
    """
    baselines = _baselines(trace, target, matrices, row_bytes)
    count_LE = water_fill(trace.counts_LE, int(target.room_G.sum()), target.groups)
    rivals = [*baselines.values(), *([current] if current else [])]
    wholes_P = whole_groups(target, trace.model.experts, router_groups)

    def search(layer: int) -> LayerSearch:
        given = (trace, layer, target, weights or Weights(), current)
        return LayerSearch(*given) if wholes_P is None else GroupedSearch(*given, wholes_P)

    solved = [search(layer).run(count_E, rivals) for layer, count_E in enumerate(count_LE)]
    values = np.array([layer.rivals for layer in solved])
    slots = tuple(
        layer.slots if current else _spread_rails(layer.slots, count, target)
        for layer, count in zip(solved, trace.counts_LE, strict=True)
    )
    return Solution(
        placement=Placement(experts=trace.model.experts, slots=slots),
        value_L=np.array([layer.value for layer in solved]),
        bound_L=np.array([layer.bound for layer in solved]),
        baselines={name: (found, values[:, i]) for i, (name, found) in enumerate(baselines.items())},
        swaps=sum(layer.swaps for layer in solved),
        keeps_groups=wholes_P is not None,
    )


def _baselines(
    trace: RoutingTrace, target: Target, matrices: tuple[Array, Array] | None, row_bytes: float
) -> dict[str, Placement]:
    even_GG = np.ones((target.groups, target.groups))
    bandwidth_GG, latency_GG = matrices or (even_GG, even_GG)
    return {
        "linear": contiguous(trace, target.room_G),
        "round-robin": round_robin(trace, target.room_G),
        "greedy": greedy(trace, target.room_G, bandwidth_GG, latency_GG, row_bytes),
    }


def _spread_rails(slots: LayerSlots, load_E: Array, target: Target) -> LayerSlots:
    """Exchange the contents of equal groups of a node, so that the rails (groups of one index) are loaded evenly."""
    share_E = load_E / np.bincount([e for group in slots for e in group], minlength=len(load_E))
    load_G = np.array([share_E[list(group)].sum() for group in slots])
    rail_G = np.arange(target.groups) - np.searchsorted(target.node_G, target.node_G)
    load_R, spread = np.zeros(rail_G.max() + 1), list(slots)
    for node in range(target.node_G.max() + 1):
        for size in {len(slots[group]) for group in np.flatnonzero(target.node_G == node)}:
            places = [g for g in np.flatnonzero(target.node_G == node) if len(slots[g]) == size]
            free = sorted(places, key=lambda group: load_R[rail_G[group]])
            for source, place in zip(sorted(places, key=lambda group: -load_G[group]), free, strict=True):
                spread[place] = slots[source]
                load_R[rail_G[place]] += load_G[source]
    return tuple(spread)
