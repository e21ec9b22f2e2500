"""Search of one layer's placement where a token may use few router groups (DeepSeek): each group stays on one node.

Shape legend: E experts, S slots of the layer, R router groups, P parts (nodes), C classes of tokens, K top-k.

A token then reaches no more nodes than it may use groups, whatever text it belongs to; a placement that follows the
recorded tokens alone promises nothing for others. The problem is the same as without groups, with whole router groups
for slots; replicas stay on their expert's node, where they even out the load of its GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soloist.placement.baselines import layer_slots
from soloist.placement.bound import lower_bound
from soloist.placement.layer import LayerSearch, Solved, Target, Weights, classes
from soloist.placement.packing import pack, water_fill
from soloist.placement.placement import Placement
from soloist.placement.swaps import Partition, Problem
from soloist.placement.trace import Array, RoutingTrace


def whole_groups(target: Target, experts: int, router_groups: int) -> Array | None:
    """`[P]` how many router groups each node takes; None where they do not fit whole, or there is nothing to keep."""
    if router_groups < 2 or experts % router_groups or target.exchange == "flat":
        return None
    size, room_P = experts // router_groups, target.room_P
    count_P = np.zeros(len(room_P), np.int64)
    for _ in range(router_groups):
        count_P[(room_P - size * count_P).argmax()] += 1
    held_P = size * count_P
    most_P = held_P * np.bincount(target.part_G)  # a replica on each group of its node
    return count_P if ((held_P <= room_P) & (room_P <= most_P)).all() else None


class GroupedSearch(LayerSearch):
    """Whole router groups to nodes; then replicas, and experts to the groups of their node, as without them."""

    def __init__(
        self, trace: RoutingTrace, layer: int, target: Target, weights: Weights, current: Placement | None,
        wholes_P: Array,
    ) -> None:  # fmt: skip
        """`wholes_P`: router groups of each node."""
        super().__init__(trace, layer, target, weights, current)
        self.wholes_P, self.groups = wholes_P, int(wholes_P.sum())
        self.size = len(self.load_E) // self.groups  # experts of a router group

    def run(self, count_E: Array, rivals: Sequence[Placement]) -> Solved:
        """`count_E` counts for nothing: each node's free slots go to its own experts."""
        coarse = self._coarse()
        starts = [Partition(coarse, start_R) for start_R in self._group_starts(coarse, rivals)]
        best = min(starts, key=lambda start: start.value)
        swaps = best.improve() if coarse.parts > 1 else 0
        part_E = np.repeat(best.part_S[:-1], self.size)
        expert_S = np.repeat(np.arange(len(part_E)), self._replicas(part_E))
        partition = Partition(self.problem_of(expert_S), part_E[expert_S])
        group_S, more = self._groups(partition)
        slots = layer_slots(expert_S, group_S, self.target.groups)
        least = lower_bound(coarse, self.wholes_P)
        return Solved(slots, partition.value, least, [self._value(rival) for rival in rivals], swaps + more)

    def _coarse(self) -> Problem:
        """Router groups for slots; a token counts once for each that it chose."""
        (ids_TK, weight_T), groups = self.chosen, self.groups
        group_TK = np.sort(ids_TK // self.size, axis=1)
        group_TK[:, 1:][group_TK[:, 1:] == group_TK[:, :-1]] = groups  # the slot that stands for none
        load_R = self.load_E.reshape(groups, self.size).sum(axis=1)
        move_EP = self._move(np.arange(len(self.load_E)))
        move_RP = None
        if move_EP is not None:
            share = len(self.load_E) / int(self.target.room_P.sum())  # of all slots, replicas among them
            move_RP = share * move_EP.reshape(groups, self.size, -1).sum(axis=1)
        parts = len(self.wholes_P)
        return self._weighted(*classes(group_TK, weight_T), load_R, np.arange(groups), parts, move_RP)

    def _group_starts(self, coarse: Problem, rivals: Sequence[Placement]) -> list[Array]:
        """`[R]` each: in order, by load, and as the rivals have it where they keep groups whole."""
        starts = [np.repeat(np.arange(coarse.parts), self.wholes_P)]
        starts.append(pack(coarse.load_S, coarse.expert_S, self.wholes_P))
        for rival in rivals:
            start = self._start(rival.slots[self.layer])
            if len(start.part_S) != len(self.load_E):  # replicas: an expert may lie on several nodes
                continue
            part_RM = start.part_S.reshape(-1, self.size)
            if (part_RM == part_RM[:, :1]).all() and (np.bincount(part_RM[:, 0]) == self.wholes_P).all():
                starts.append(part_RM[:, 0])
        return starts

    def _replicas(self, part_E: Array) -> Array:
        """`[E]` how many slots each expert gets of its node's."""
        count_E = np.ones(len(part_E), np.int64)
        for part, room in enumerate(self.target.room_P.tolist()):
            mine = np.flatnonzero(part_E == part)
            count_E[mine] = water_fill(self.load_E[None, mine], room, len(self.target.groups_of(part)))[0]
        return count_E

    def _value(self, rival: Placement) -> float:
        start = self._start(rival.slots[self.layer])
        return Partition(self.problem_of(start.expert_S), start.part_S).value
