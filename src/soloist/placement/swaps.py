"""Local search by swaps of two slots on the exact number of distinct parts that tokens go to.

Shape legend: S slots of a layer, P parts (nodes, or groups of a node), C classes of tokens, K choices of a token.

A token's choices are slots; a token costs one row for each different part among them. The objective is

    rows · Σ_p rows_p  +  nic · max_p rows_p  +  load · max_p load_p  +  Σ_s move[s, part of s]

where rows_p counts the tokens that go to part p. Every swap of slot a in part p with slot b in part q changes it by a
sum of counts that are kept up to date, so the best of all pairs is found by a few operations on
`[S, S]` matrices; in part p they change rows_p to

    rows_p − alone[a] + enter[b, p] + both[a, b]

alone[a]: tokens for which a is the only slot of its part; enter[b, p]: tokens of b that do not go to p yet; both[a, b]:
those of alone[a] that also chose b. It is the exact gain of Kernighan–Lin swaps (1970), or Fiduccia–Mattheyses gains
(1982) for the hypergraph whose hyperedges are the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from soloist.placement.trace import Array

LEAST_GAIN = 1e-9


@dataclass(frozen=True)
class Problem:
    """One layer's slots. `choices_CK` holds slots, S where a token has fewer; classes count `weight_C` tokens each."""

    choices_CK: Array
    weight_C: Array
    load_S: Array
    expert_S: Array
    parts: int
    rows: float
    nic: float
    load: float
    move_SP: Array | None = None


class Partition:
    """A partition of the slots and everything that a swap changes.

    What only the search needs is made when it is first asked for: most partitions are only valued.
    """

    def __init__(self, problem: Problem, part_S: Array) -> None:
        self.problem, self.slots = problem, len(problem.load_S)
        self.part_S = np.append(part_S, problem.parts)  # the slot that stands for none lies in a part of its own
        self.load_P = np.bincount(part_S, problem.load_S, problem.parts)
        classes, parts = len(problem.weight_C), problem.parts
        cells_CK = np.arange(classes)[:, None] * (parts + 1) + self.part_S[problem.choices_CK]
        self.count_CP = np.bincount(cells_CK.ravel(), minlength=classes * (parts + 1)).reshape(classes, parts + 1)
        self.rows_P = problem.weight_C @ (self.count_CP[:, :-1] > 0)

    @cached_property
    def held_PE(self) -> Array:
        """How many replicas of each expert a part holds."""
        held_PE = np.zeros((self.problem.parts, self.problem.expert_S.max(initial=0) + 1), np.int64)
        np.add.at(held_PE, (self.part_S[:-1], self.problem.expert_S), 1)
        return held_PE

    @cached_property
    def both(self) -> Array:
        """both[a, b] as above, row after row, with a row and a column for the slot that stands for none."""
        p, size = self.problem, self.slots + 1
        token, k = np.nonzero(self._is_alone(np.arange(len(p.weight_C)), p.choices_CK))
        cells = p.choices_CK[token, k][:, None] * size + p.choices_CK[token]
        weights = np.repeat(p.weight_C[token], cells.shape[1])
        return np.bincount(cells.ravel(), weights, size * size).astype(np.float64)  # integers where there are none

    @cached_property
    def enter_PS(self) -> Array:
        """enter[b, p] as above, transposed."""
        return np.stack([self._weight_by_slot(self.count_CP[:, part] == 0) for part in range(self.problem.parts)])

    @cached_property
    def _classes_of(self) -> list[Array]:
        return _members(self.problem.choices_CK, self.slots)

    @property
    def value(self) -> float:
        """The objective."""
        p, part_S = self.problem, self.part_S[:-1]
        moved = 0.0 if p.move_SP is None else p.move_SP[np.arange(self.slots), part_S].sum()
        return p.rows * self.rows_P.sum() + p.nic * self.rows_P.max() + p.load * self.load_P.max() + float(moved)

    def improve(self) -> int:
        """Swap until no pair improves; returns the number of swaps.

        In a round the best pair goes first, then the best of the parts that the round has not touched yet: their gains
        are nearly what they were, and a swap that turns out to gain nothing is taken back.
        """
        swaps = 0
        while True:
            change_SS, found = self.changes(), 0
            enough = -LEAST_GAIN * max(1.0, abs(self.value))
            while change_SS.flat[best := int(change_SS.argmin())] < enough:
                a, b = divmod(best, self.slots)
                if not self._try(a, b):
                    break
                found += 1
                busy_S = np.isin(self.part_S[:-1], self.part_S[[a, b]])
                change_SS[busy_S] = np.inf
                change_SS[:, busy_S] = np.inf
            if not found:
                return swaps
            swaps += found

    def _try(self, a: int, b: int) -> bool:
        """Swap, and back if that was no gain."""
        before = self.value
        self.swap(a, b)
        if self.value < before:
            return True
        self.swap(a, b)
        return False

    def changes(self) -> Array:
        """`[S, S]` what the swap of two slots adds to the objective; infinite where it is not allowed."""
        p, part_S = self.problem, self.part_S[:-1]
        both_SS = self.both.reshape(self.slots + 1, -1)[:-1, :-1]
        alone_S = np.diagonal(both_SS)
        delta_SS = both_SS + self.enter_PS[part_S] - alone_S[:, None]  # of the rows of the first slot's part
        change_SS = new_peak(self.rows_P, part_S, delta_SS)
        change_SS *= p.nic
        change_SS += p.load * new_peak(self.load_P, part_S, p.load_S[None, :] - p.load_S[:, None])
        delta_SS *= p.rows
        if p.move_SP is not None:
            moves_PS = p.move_SP.T
            delta_SS += moves_PS[part_S] - moves_PS[part_S, np.arange(self.slots)][:, None]
        change_SS += delta_SS
        change_SS += delta_SS.T
        holds_PS = self.held_PE[:, p.expert_S] > 0
        meets_twin_SS = holds_PS[part_S]  # the second slot, in the first one's part; also where both lie together
        change_SS[meets_twin_SS | meets_twin_SS.T] = np.inf
        return change_SS

    def swap(self, a: int, b: int) -> None:
        """Exchange the parts of two slots. Only classes that chose one of them change, and only in these two parts."""
        p, part_a, part_b = self.problem, self.part_S[a], self.part_S[b]
        both, held_PE, _ = self.both, self.held_PE, self.enter_PS  # made before anything changes
        touched = np.union1d(self._classes_of[a], self._classes_of[b])
        choices_cK = p.choices_CK[touched]
        leaves_c = (choices_cK == a).any(1).astype(np.int64) - (choices_cK == b).any(1)
        alone_cK = self._is_alone(touched, choices_cK)
        for part, less_c in ((part_a, leaves_c), (part_b, -leaves_c)):
            self._recount(part, touched, less_c)
        self.part_S[a], self.part_S[b] = part_b, part_a
        more_cK = self._is_alone(touched, choices_cK).astype(np.int64) - alone_cK
        found, k = np.nonzero(more_cK)
        cells = choices_cK[found, k][:, None] * (self.slots + 1) + choices_cK[found]
        weights = p.weight_C[touched[found]] * more_cK[found, k]
        np.add.at(both, cells.ravel(), np.repeat(weights, cells.shape[1]))
        self.load_P[part_a] += p.load_S[b] - p.load_S[a]
        self.load_P[part_b] += p.load_S[a] - p.load_S[b]
        for slot, old, new in ((a, part_a, part_b), (b, part_b, part_a)):
            held_PE[old, p.expert_S[slot]] -= 1
            held_PE[new, p.expert_S[slot]] += 1

    def _recount(self, part: int, classes: Array, less_c: Array) -> None:
        """Some classes have fewer slots in a part: what follows for `count`, `rows` and `enter`."""
        before_c = self.count_CP[classes, part]
        after_c = before_c - less_c
        self.count_CP[classes, part] = after_c
        absent_c = (after_c == 0).astype(np.int64) - (before_c == 0)
        changed = np.flatnonzero(absent_c)
        self.rows_P[part] -= self.problem.weight_C[classes[changed]] @ absent_c[changed]
        self.enter_PS[part] += self._weight_by_slot(classes[changed], absent_c[changed])

    def _is_alone(self, classes: Array, choices_cK: Array) -> Array:
        """Whether each choice is the only one of its class in its part."""
        count_cK = self.count_CP[classes[:, None], self.part_S[choices_cK]]
        return (count_cK == 1) & (choices_cK < self.slots)

    def _weight_by_slot(self, classes: Array, factor: Array | int = 1) -> Array:
        """`[S]` weight, `factor` times, of those of the classes that chose a slot."""
        choices_cK, weight_c = self.problem.choices_CK[classes], self.problem.weight_C[classes] * factor
        weights = np.repeat(weight_c, choices_cK.shape[1])
        return np.bincount(choices_cK.ravel(), weights, self.slots + 1)[:-1].astype(np.float64)


def new_peak(value_P: Array, part_S: Array, delta_SS: Array) -> Array:
    """By how much the largest value grows if those of two slots' parts change by delta and its transpose."""
    new_SS = value_P[part_S][:, None] + delta_SS
    peak_SS = np.maximum(new_SS, new_SS.T)
    np.maximum(peak_SS, _largest_of_others(value_P)[:, part_S][part_S], out=peak_SS)
    peak_SS -= value_P.max()
    return peak_SS


def _largest_of_others(value_P: Array) -> Array:
    """`[P, P]` the largest value of the parts other than these two."""
    order = np.argsort(-value_P)
    first, second = order[:2]
    others_PP = np.full((len(value_P), len(value_P)), value_P[first])
    others_PP[first, :] = others_PP[:, first] = value_P[second]
    others_PP[first, second] = others_PP[second, first] = value_P[order[2]] if len(order) > 2 else -np.inf
    return others_PP


def _members(choices_CK: Array, slots: int) -> list[Array]:
    """For each slot the classes that chose it, ascending."""
    narrow = choices_CK.ravel().astype(np.min_scalar_type(slots))  # of 16 bits or fewer: sorted digit by digit
    order = np.argsort(narrow, kind="stable") // choices_CK.shape[1]
    counts = np.bincount(choices_CK.ravel(), minlength=slots + 1)
    return np.split(order, np.cumsum(counts)[:-1])[:slots]
