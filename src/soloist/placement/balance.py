"""From measured load to a placement, for the live balancer: replicate the hottest, pack, move as little as possible.

Shape legend: L MoE layers, E experts, G expert groups, S slots of a layer.

The number of slots of each group stays what it is. A fresh placement would move nearly everything, so balancing starts
from the current one: replicas follow the load (an expert loses one only to an expert that needs it much more), then
pairs of slots are exchanged while that lowers the fullest group, the largest gain for a move first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from soloist.placement.baselines import layer_slots
from soloist.placement.packing import pack, water_fill
from soloist.placement.placement import LayerSlots, Placement
from soloist.placement.trace import Array

HYSTERESIS = 1.25  # times the load per replica that an expert must have to take another one's replica
LEAST_GAIN = 0.01  # of the mean load, for which a swap is worth two moves


@dataclass(frozen=True)
class Balanced:
    """A placement, what it takes to get there, and the imbalance of both."""

    placement: Placement
    moves: int  # slots that have to fetch their expert
    before: float  # imbalance: fullest group over the mean, averaged over the layers
    after: float


def balance(current: Placement, load_LE: Array, most_moves: int | None = None) -> Balanced:
    """Even out the groups' load with few moves; `most_moves` of slots in each layer."""
    layers = [
        _balance_layer(slots, load_E, 1_000_000 if most_moves is None else most_moves)
        for slots, load_E in zip(current.slots, np.asarray(load_LE, dtype=float), strict=True)
    ]
    placement = Placement(experts=current.experts, slots=tuple(layers))
    moves = sum(
        len(set(new) - set(old))
        for before, after in zip(current.slots, layers, strict=True)
        for old, new in zip(before, after, strict=True)
    )
    return Balanced(placement, moves, imbalance(current, load_LE), imbalance(placement, load_LE))


def place(load_LE: Array, room_G: Array) -> Placement:
    """A placement by load alone, from nothing."""
    load_LE, layers = np.asarray(load_LE, dtype=float), list[LayerSlots]()
    count_LE = water_fill(load_LE, int(room_G.sum()), len(room_G))
    for load_E, count_E in zip(load_LE, count_LE, strict=True):
        expert_S = np.repeat(np.arange(len(load_E)), count_E)
        group_S = pack(load_E[expert_S] / count_E[expert_S], expert_S, room_G)
        groups = [set(members) for members in layer_slots(expert_S, group_S, len(room_G))]
        _even_out(groups, load_E, sum(map(len, groups)))
        layers.append(_frozen(groups))
    return Placement(experts=load_LE.shape[1], slots=tuple(layers))


def group_load(slots: LayerSlots, load_E: Array) -> Array:
    """`[G]` load of the groups of a layer, an expert's tokens shared evenly by its replicas."""
    share_E = load_E / np.bincount([e for group in slots for e in group], minlength=len(load_E))
    return np.array([share_E[list(group)].sum() for group in slots])


def imbalance(placement: Placement, load_LE: Array) -> float:
    """Fullest group over the mean, averaged over the layers; 1 is even."""
    loads = [group_load(slots, load_E) for slots, load_E in zip(placement.slots, load_LE, strict=True)]
    return float(np.mean([load_G.max() / load_G.mean() if load_G.any() else 1.0 for load_G in loads]))


def _balance_layer(slots: LayerSlots, load_E: Array, most_moves: int) -> LayerSlots:
    groups = [set(group) for group in slots]
    moves = _follow_load(groups, load_E, most_moves)
    _even_out(groups, load_E, most_moves - moves)
    return _frozen(groups)


def _frozen(groups: list[set[int]]) -> LayerSlots:
    return tuple(tuple(sorted(group)) for group in groups)


def _even_out(groups: list[set[int]], load_E: Array, most_moves: int) -> None:
    """Exchange pairs of slots while that lowers the fullest group."""
    for _ in range(most_moves // 2):
        swap = _best_swap(groups, load_E)
        if swap is None:
            return
        full, light, leaving, coming = swap
        groups[full] ^= {leaving, coming}
        groups[light] ^= {leaving, coming}


def _follow_load(groups: list[set[int]], load_E: Array, most_moves: int) -> int:
    """Give replicas of cold experts to hot ones; returns the moves."""
    count_E = np.bincount([e for group in groups for e in group], minlength=len(load_E))
    for moves in range(most_moves):
        share_E = np.where(count_E < len(groups), load_E / count_E, -1)
        hot = int(share_E.argmax())
        load_G = group_load(_frozen(groups), load_E)
        found = _replica_to_give(groups, load_E, count_E, hot, share_E[hot] / HYSTERESIS, load_G)
        if found is None:
            return moves
        cold, group = found
        groups[group] ^= {hot, cold}
        count_E[[hot, cold]] += (1, -1)
    return most_moves


def _replica_to_give(
    groups: list[set[int]], load_E: Array, count_E: Array, hot: int, most: float, load_G: Array
) -> tuple[int, int] | None:
    """The expert that needs its replica least, and the lightest of its groups that lacks the hot one."""
    spare_E = np.where(count_E > 1, load_E / np.maximum(count_E - 1, 1), np.inf)
    for cold in np.argsort(spare_E, kind="stable").tolist():
        places = [g for g, group in enumerate(groups) if cold in group and hot not in group]
        if spare_E[cold] >= most:
            return None
        if places:
            return cold, min(places, key=load_G.__getitem__)
    return None


def _best_swap(groups: list[set[int]], load_E: Array) -> tuple[int, int, int, int] | None:
    """The exchange between the fullest and another group that lowers the fuller of the two most."""
    count_E = np.bincount([e for group in groups for e in group], minlength=len(load_E))
    share_E, load_G = load_E / count_E, group_load(_frozen(groups), load_E)
    full = int(load_G.argmax())
    best, found = load_G[full] - LEAST_GAIN * load_G.mean(), None
    for light in range(len(groups)):
        leaving, coming = sorted(groups[full] - groups[light]), sorted(groups[light] - groups[full])
        if not leaving or not coming:
            continue
        shift = share_E[leaving][:, None] - share_E[coming][None, :]
        peak = np.maximum(load_G[full] - shift, load_G[light] + shift)
        i, j = divmod(int(peak.argmin()), len(coming))
        if peak[i, j] < best:
            best, found = peak[i, j], (full, light, leaving[i], coming[j])
    return found
