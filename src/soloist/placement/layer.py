"""Search of one layer's placement.

Shape legend: E experts, S slots of the layer, C classes of tokens, K top-k, G expert groups, P parts.

Traffic alone would pile the experts that are chosen together, and often, on one node, whose NIC and GPUs everybody then
waits for. So the objective of a layer adds the fullest NIC and the fullest part:

    traffic · D  +  nic · P · max_p rows_p / T  +  load · D_even · max_p load_p / mean load     (+ migration)

D = Σ_p rows_p / T is the mean number of different parts that a token goes to, D_even the same for experts strewn at
random, so that each term is of the size of D. The parts are the nodes for hierarchical exchange, the groups for flat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.baselines import layer_slots
from soloist.placement.bound import lower_bound
from soloist.placement.packing import pack
from soloist.placement.placement import LayerSlots, Placement
from soloist.placement.swaps import Partition, Problem
from soloist.placement.trace import Array, RoutingTrace

Exchange = Literal["hierarchical", "flat"]
MOST_TOKENS = 8192  # of a layer that the search looks at
LOAD_MARGIN = 1.03  # over the mean, up to which a part attracts the experts that are chosen together with its own


class Weights(msgspec.Struct, frozen=True, kw_only=True):
    """What a row more, a fuller NIC and a fuller part cost against each other; `migration`: moving every slot."""

    traffic: float = 1.0
    nic: float = 1.0
    load: float = 1.0
    migration: float = 0.0

    def __post_init__(self) -> None:
        for key in self.__struct_fields__:
            if not getattr(self, key) >= 0:
                raise ConfigurationError.of(f"weights.{key}", getattr(self, key), "must not be negative")


@dataclass(frozen=True)
class Target:
    """Where experts may lie: groups on nodes, each with room for some slots, and what an exchange sends once for."""

    node_G: Array
    room_G: Array
    exchange: Exchange = "hierarchical"

    @classmethod
    def of(
        cls, experts: int, node_of_group: Sequence[int], slots: int | None = None,
        exchange: Exchange = "hierarchical",
    ) -> Target:  # fmt: skip
        """`slots` of each group; None: no more than every expert needs, at least one a group."""
        node_G = np.unique(node_of_group, return_inverse=True)[1]
        groups = len(node_G)
        if slots is not None and not experts <= slots * groups <= experts * groups:
            remedy = f"{groups} groups must hold each of {experts} experts at least once and at most once a group"
            raise ConfigurationError.of("slots", slots, remedy)
        each = np.diff(np.arange(groups + 1) * experts // groups) if slots is None else np.full(groups, slots)
        return cls(node_G, np.maximum(each, 1), exchange if node_G.max() else "flat")

    @property
    def groups(self) -> int:
        return len(self.node_G)

    @property
    def part_G(self) -> Array:
        """The part of the objective that each group belongs to."""
        return self.node_G if self.exchange == "hierarchical" else np.arange(self.groups)

    @property
    def room_P(self) -> Array:
        return np.bincount(self.part_G, self.room_G).astype(np.int64)

    def groups_of(self, part: int) -> Array:
        return np.flatnonzero(self.part_G == part)


@dataclass(frozen=True)
class Solved:
    """One layer's slots, its objective and a lower bound of it."""

    slots: LayerSlots
    value: float
    bound: float
    rivals: list[float]  # objectives of the placements to beat
    swaps: int


@dataclass(frozen=True)
class Start:
    """Slots in order of their experts, and the part in which each of them begins."""

    expert_S: Array
    part_S: Array


class LayerSearch:
    """One layer: makes problems of it, finds a good partition into parts, and splits the parts into groups."""

    def __init__(
        self, trace: RoutingTrace, layer: int, target: Target, weights: Weights, current: Placement | None
    ) -> None:
        self.trace, self.layer, self.target, self.weights = trace, layer, target, weights
        self.load_E = trace.counts_LE[layer]
        self.current = current.slots[layer] if current else None
        self._known: dict[tuple[int, ...], tuple[Array, Array]] = {}

    def run(self, count_E: Array, rivals: Sequence[Placement]) -> Solved:
        """Begin with the best start, swap until nothing improves, and divide the parts among their groups."""
        starts = [*(self._start(rival.slots[self.layer]) for rival in rivals), *self._starts(count_E)]
        partitions = [Partition(self.problem_of(start.expert_S), start.part_S) for start in starts]
        values = [partition.value for partition in partitions]
        best = partitions[int(np.argmin(values))]
        swaps = best.improve() if best.problem.parts > 1 else 0
        group_S, more = self._groups(best)
        slots = layer_slots(best.problem.expert_S, group_S, self.target.groups)
        least = lower_bound(best.problem, self.target.room_P)
        return Solved(slots, best.value, least, values[: len(rivals)], swaps + more)

    # -- the problem ------------------------------------------------------------------------------------------------
    @cached_property
    def chosen(self) -> tuple[Array, Array]:
        """Experts that tokens chose, `[T, K]`, and how much each of these tokens counts."""
        sample = self.trace.sample
        if sample is not None:
            step = -(-sample.tokens // MOST_TOKENS)
            ids_TK = sample.ids_LTK[self.layer, ::step]
            return ids_TK, np.ones(len(ids_TK))
        together_EE = self.trace.together_LEE[self.layer]
        first, second = np.nonzero(np.triu(together_EE, 1))
        if not len(first):  # one choice a token, or nothing known of pairs
            return np.arange(len(together_EE))[:, None], np.diagonal(together_EE).astype(float)
        return np.stack([first, second], axis=1), together_EE[first, second] / (self.trace.model.top_k - 1)

    def problem_of(self, expert_S: Array) -> Problem:
        """Slots in order of expert; every token takes the replicas of an expert in turn."""
        count_E = np.bincount(expert_S, minlength=len(self.load_E))
        choices_CK, weight_C = self._choices(tuple(count_E.tolist()))
        load_S = self.load_E[expert_S] / count_E[expert_S]
        parts = len(self.target.room_P)
        return self._weighted(choices_CK, weight_C, load_S, expert_S, parts, self._move(expert_S))

    def _choices(self, counts: tuple[int, ...]) -> tuple[Array, Array]:
        """Classes of tokens that chose the same slots, where expert e has `counts[e]` of them."""
        if counts not in self._known:
            count_E, (ids_TK, weight_T) = np.array(counts), self.chosen
            first_E = np.cumsum(count_E) - count_E
            turns = 1 if self.trace.sample else max(counts)  # a pair of experts stands for many tokens
            ids_TK, weight_T = np.repeat(ids_TK, turns, axis=0), np.repeat(weight_T / turns, turns)
            slot_TK = first_E[ids_TK] + np.arange(len(ids_TK))[:, None] % count_E[ids_TK]
            self._known[counts] = classes(slot_TK, weight_T)
        return self._known[counts]

    def _weighted(
        self, choices_CK: Array, weight_C: Array, load_S: Array, expert_S: Array, parts: int, move_SP: Array | None
    ) -> Problem:
        w, tokens = self.weights, max(weight_C.sum(), 1e-9)
        spread = parts * (1 - (1 - 1 / parts) ** self.trace.model.top_k)
        return Problem(
            choices_CK=choices_CK,
            weight_C=weight_C,
            load_S=load_S,
            expert_S=expert_S,
            parts=parts,
            rows=w.traffic / tokens,
            nic=w.nic * parts / tokens,
            load=w.load * spread * parts / max(load_S.sum(), 1e-9),
            move_SP=move_SP,
        )

    def _move(self, expert_S: Array) -> Array | None:
        """`[S, P]` what it costs to have a slot in a part which has to fetch its expert."""
        if self.current is None or not self.weights.migration:
            return None
        held_EP = np.zeros((len(self.load_E), len(self.target.room_P)), dtype=bool)
        for group, members in enumerate(self.current):
            held_EP[list(members), self.target.part_G[group]] = True
        return self.weights.migration / len(expert_S) * ~held_EP[expert_S]

    # -- starts -----------------------------------------------------------------------------------------------------
    def _starts(self, count_E: Array) -> list[Start]:
        """By load alone, by attraction, and as near as possible to the current placement."""
        expert_S = np.repeat(np.arange(len(count_E)), count_E)
        load_S, room_P = self.load_E[expert_S] / count_E[expert_S], self.target.room_P
        starts = [pack(load_S, expert_S, room_P), self._attracted(expert_S, load_S)]
        if self.current is not None:
            kept_S = kept(expert_S, self.current, self.target.part_G, room_P)
            starts.append(pack(load_S, expert_S, room_P, kept_S=kept_S))
        return [Start(expert_S, part_S) for part_S in starts]

    def _attracted(self, expert_S: Array, load_S: Array) -> Array:
        """The heaviest slot first, each into the part with which it shares most tokens while that is not too full."""
        together_SS = self.trace.together_LEE[self.layer][expert_S][:, expert_S]
        room_P, load_P = self.target.room_P.copy(), np.zeros(len(self.target.room_P))
        part_S, pull_SP = np.full(len(expert_S), -1), np.zeros((len(expert_S), len(room_P)))
        most_P = LOAD_MARGIN * load_S.sum() * room_P / room_P.sum()
        for slot in np.argsort(-load_S, kind="stable"):
            twin_P = np.bincount(part_S[(expert_S == expert_S[slot]) & (part_S >= 0)], minlength=len(room_P)) > 0
            is_heavy_P = load_P + load_S[slot] > most_P
            pull_P = np.where(is_heavy_P, 0, pull_SP[slot])
            part = np.lexsort((load_P / most_P, -pull_P, is_heavy_P, twin_P, room_P <= 0))[0]
            part_S[slot] = part
            room_P[part] -= 1
            load_P[part] += load_S[slot]
            pull_SP[:, part] += together_SS[:, slot]
        return pack(load_S, expert_S, self.target.room_P, kept_S=part_S)

    def _start(self, slots: LayerSlots) -> Start:
        """A placement as it is."""
        expert_S = np.array([expert for group in slots for expert in group], np.int64)
        part_S = np.repeat(self.target.part_G, [len(group) for group in slots])
        order = np.argsort(expert_S, kind="stable")
        return Start(expert_S[order], part_S[order])

    # -- groups -----------------------------------------------------------------------------------------------------
    def _groups(self, partition: Partition) -> tuple[Array, int]:
        """`[S]` the group of each slot inside its part, and the swaps it took."""
        part_S = partition.part_S[:-1]
        if self.target.exchange == "flat":
            return part_S, 0
        group_S, swaps = np.zeros_like(part_S), 0
        for part in range(partition.problem.parts):
            mine = np.flatnonzero(part_S == part)
            groups = self.target.groups_of(part)
            inside_s, done = self._divide(partition.problem, mine, groups)
            group_S[mine], swaps = groups[inside_s], swaps + done
        return group_S, swaps

    def _divide(self, whole: Problem, mine: Array, groups: Array) -> tuple[Array, int]:
        """Slots of one part to its groups: by load, then by swaps on what its tokens do inside."""
        load_s, expert_s, room_g = whole.load_S[mine], whole.expert_S[mine], self.target.room_G[groups]
        kept_s = None
        if self.current is not None:
            kept_s = kept(expert_s, tuple(self.current[group] for group in groups), np.arange(len(groups)), room_g)
        start_s = pack(load_s, expert_s, room_g, kept_S=kept_s)
        if len(groups) == 1 or (room_g.max() == 1 and kept_s is None):
            return start_s, 0
        local_S = np.full(len(whole.load_S) + 1, len(mine))
        local_S[mine] = np.arange(len(mine))
        choices_CK = np.sort(local_S[whole.choices_CK], axis=1)
        inside = choices_CK[:, 0] < len(mine)
        choices_CK, weight_C = classes(choices_CK[inside], whole.weight_C[inside])
        moves = None
        if self.current is not None and self.weights.migration:
            current = self.current
            held_sg = np.array([[expert in current[group] for group in groups] for expert in expert_s])
            moves = self.weights.migration / len(whole.load_S) * ~held_sg
        problem = self._weighted(choices_CK, weight_C, load_s, expert_s, len(groups), moves)
        partition = Partition(problem, start_s)
        swaps = partition.improve()
        return partition.part_S[:-1], swaps


def classes(choices_TK: Array, weight_T: Array) -> tuple[Array, Array]:
    """Tokens that chose the same, taken together; choices ascend."""
    choices_CK, class_T = np.unique(np.sort(choices_TK, axis=1), axis=0, return_inverse=True)
    return choices_CK, np.bincount(class_T.ravel(), weight_T)


def kept(expert_S: Array, current: Sequence[Sequence[int]], part_G: Array, room_P: Array) -> Array:
    """`[S]` the part in which a slot's expert lies already, one slot for each replica there, else −1."""
    kept_S, free_P = np.full(len(expert_S), -1), room_P.copy()
    for group, members in enumerate(current):
        part = part_G[group]
        for expert in members:
            slots = np.flatnonzero((expert_S == expert) & (kept_S < 0))
            if len(slots) and free_P[part] > 0:
                kept_S[slots[0]] = part
                free_P[part] -= 1
    return kept_S
