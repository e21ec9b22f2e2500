"""How many replicas an expert gets, and slots packed into parts by load.

Shape legend: L layers, E experts, S slots of a layer, P parts (nodes, or groups of a node).
"""

from __future__ import annotations

import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.trace import Array


def water_fill(load_LE: Array, slots: int, most: int) -> Array:
    """`[L, E]` replicas of each expert: every free slot goes to the expert with the largest load per replica.

    most: replicas that an expert may have, the number of groups. Source: DeepSeek's EPLB, the replication step.
    """
    layers, experts = load_LE.shape
    if not experts <= slots <= experts * most:
        remedy = f"{experts} experts need between {experts} and {experts * most} slots, on as many groups or fewer"
        raise ConfigurationError.of("slots", slots, remedy)
    count_LE = np.ones((layers, experts), np.int64)
    rows_L = np.arange(layers)
    for _ in range(slots - experts):
        share_LE = np.where(count_LE < most, load_LE / count_LE, -1.0)
        count_LE[rows_L, share_LE.argmax(axis=1)] += 1
    return count_LE


def pack(
    load_S: Array, expert_S: Array, room_P: Array, cost_P: Array | None = None, kept_S: Array | None = None
) -> Array:
    """`[S]` part of each slot: the heaviest first, into the lightest part that has room and lacks its expert.

    Longest processing time first (Graham 1969). Replicas of an expert come together in a part only where there is no
    other way. cost_P: parts of lower cost are filled first. kept_S: the part of slots that have one already, else -1.
    """
    part_S = np.full(len(load_S), -1) if kept_S is None else kept_S.copy()
    parts, settled = len(room_P), part_S >= 0
    load_P = np.bincount(part_S[settled], load_S[settled], parts).astype(np.float64)  # int64 where nothing is settled
    free_P = room_P - np.bincount(part_S[settled], minlength=parts)
    held_EP = np.zeros((expert_S.max(initial=0) + 1, parts), np.int64)
    np.add.at(held_EP, (expert_S[settled], part_S[settled]), 1)
    cost_P = np.zeros(parts) if cost_P is None else cost_P
    for slot in np.argsort(-load_S, kind="stable"):
        if part_S[slot] < 0:
            part = np.lexsort((load_P, cost_P, held_EP[expert_S[slot]], free_P <= 0))[0]
            part_S[slot] = part
            load_P[part] += load_S[slot]
            free_P[part] -= 1
            held_EP[expert_S[slot], part] += 1
    _part_twins(part_S, expert_S, held_EP)
    return part_S


def _part_twins(part_S: Array, expert_S: Array, held_EP: Array) -> None:
    """Swap away replicas that came together, for slots of parts that lack their expert."""
    for slot in range(len(part_S)):
        expert, part = expert_S[slot], part_S[slot]
        if held_EP[expert, part] < 2:
            continue
        can_S = (held_EP[expert, part_S] == 0) & (held_EP[expert_S, part] == 0)
        for other in np.flatnonzero(can_S)[:1]:
            np.add.at(held_EP, ([expert, expert_S[other]], [part, part_S[other]]), -1)
            part_S[slot], part_S[other] = part_S[other], part
            np.add.at(held_EP, ([expert, expert_S[other]], [part_S[slot], part]), 1)
