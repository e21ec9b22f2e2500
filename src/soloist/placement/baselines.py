"""Placements that take no notice of who is chosen together, to compare with.

Shape legend: L MoE layers, E experts, G expert groups, S slots of a layer.
"""

from __future__ import annotations

import numpy as np

from soloist.placement.packing import pack, water_fill
from soloist.placement.placement import LayerSlots, Placement
from soloist.placement.trace import Array, RoutingTrace


def contiguous(trace: RoutingTrace, room_G: Array) -> Placement:
    """Slot s of a layer holds expert s mod E, neighbouring slots in a group: linear, replicas wrapping round."""
    expert_S = np.arange(room_G.sum()) % trace.model.experts
    return _every_layer(trace, expert_S, np.repeat(np.arange(len(room_G)), room_G), len(room_G))


def round_robin(trace: RoutingTrace, room_G: Array) -> Placement:
    """Slot s of a layer lies on group s mod G, as far as there is room; it holds expert s mod E, replicas shifted."""
    turns = range(int(room_G.max(initial=0)))
    group_S = np.array([group for turn in turns for group in np.flatnonzero(room_G > turn)], np.int64)
    slot_S = np.arange(len(group_S))
    expert_S = (slot_S + slot_S // trace.model.experts) % trace.model.experts  # a replica not beside its expert
    return _every_layer(trace, expert_S, group_S, len(room_G))


def greedy(trace: RoutingTrace, room_G: Array, bandwidth_GG: Array, latency_GG: Array, row_bytes: float) -> Placement:
    """Each expert, the most chosen first, to the group to which its tokens travel at the least expected cost.

    The cost of expert e on group g is tokens(e) · mean over s of (latency[s, g] + row_bytes / bandwidth[s, g]), every
    group s sending its share. Ties go to the group with the least tokens so far. Free slots
    hold replicas of the most chosen (water-filling). Matrices in bytes/s and seconds, as of ClusterSpec.
    """
    with np.errstate(divide="ignore"):
        cost_G = (latency_GG + row_bytes / bandwidth_GG).mean(axis=0)
    count_LE = water_fill(trace.counts_LE, int(room_G.sum()), len(room_G))
    layers: list[LayerSlots] = []
    for load_E, count_E in zip(trace.counts_LE, count_LE, strict=True):
        expert_S = np.repeat(np.arange(len(load_E)), count_E)
        group_S = pack(load_E[expert_S] / count_E[expert_S], expert_S, room_G, cost_P=np.round(cost_G, 12))
        layers.append(layer_slots(expert_S, group_S, len(room_G)))
    return Placement(experts=trace.model.experts, slots=tuple(layers))


def layer_slots(expert_S: Array, group_S: Array, groups: int) -> LayerSlots:
    """A layer of a Placement; experts ascend in a group, where a second replica is left out."""
    return tuple(tuple(np.unique(expert_S[group_S == group]).tolist()) for group in range(groups))


def _every_layer(trace: RoutingTrace, expert_S: Array, group_S: Array, groups: int) -> Placement:
    layer = layer_slots(expert_S, group_S, groups)
    return Placement(experts=trace.model.experts, slots=(layer,) * trace.model.moe_layers)
