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

import numpy as np
from scipy.sparse import csr_array

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
    """A partition of the slots and everything that a swap changes."""

    def __init__(self, problem: Problem, part_S: Array) -> None:
        self.problem, self.slots = problem, len(problem.load_S)
        self.part_S = np.append(part_S, problem.parts)  # the slot that stands for none lies in a part of its own
        self.load_P = np.bincount(part_S, problem.load_S, problem.parts)
        self.held_PE = np.zeros((problem.parts, problem.expert_S.max(initial=0) + 1), np.int64)
        np.add.at(self.held_PE, (part_S, problem.expert_S), 1)
        self._classes_of = _members(problem.choices_CK, self.slots)
        classes, parts = len(problem.weight_C), problem.parts
        self.count_CP = np.zeros((classes, parts + 1), np.int32)
        np.add.at(self.count_CP, (np.arange(classes)[:, None], self.part_S[problem.choices_CK]), 1)
        self.both_SS = np.zeros((self.slots, self.slots))
        self.enter_PS = np.zeros((parts, self.slots))
        self.rows_P = np.zeros(parts)
        self._add(np.arange(classes), 1)

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
        alone_S = np.diagonal(self.both_SS)
        delta_SS = self.both_SS + self.enter_PS[part_S] - alone_S[:, None]  # of the rows of the first slot's part
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
        """Exchange the parts of two slots."""
        p, part_a, part_b = self.problem, self.part_S[a], self.part_S[b]
        touched = np.union1d(self._classes_of[a], self._classes_of[b])
        self._add(touched, -1)
        choices_cK = p.choices_CK[touched]
        leaves_c = (choices_cK == a).any(1).astype(np.int32) - (choices_cK == b).any(1)
        self.count_CP[touched, part_a] -= leaves_c
        self.count_CP[touched, part_b] += leaves_c
        self.part_S[a], self.part_S[b] = part_b, part_a
        self._add(touched, 1)
        self.load_P[part_a] += p.load_S[b] - p.load_S[a]
        self.load_P[part_b] += p.load_S[a] - p.load_S[b]
        for slot, old, new in ((a, part_a, part_b), (b, part_b, part_a)):
            self.held_PE[old, p.expert_S[slot]] -= 1
            self.held_PE[new, p.expert_S[slot]] += 1

    def _add(self, classes: Array, sign: int) -> None:
        """Add what some classes contribute to `both`, `enter` and `rows`, or take it away."""
        choices_cK = self.problem.choices_CK[classes]
        weight_c = sign * self.problem.weight_C[classes]
        count_cP = self.count_CP[classes]
        count_cK = np.take_along_axis(count_cP, self.part_S[choices_cK], axis=1)
        self.rows_P += weight_c @ (count_cP[:, :-1] > 0)
        found, k = np.nonzero((count_cK == 1) & (choices_cK < self.slots))
        pairs = choices_cK[found, k][:, None] * (self.slots + 1) + choices_cK[found]
        weights = np.broadcast_to(weight_c[found][:, None], pairs.shape)
        size = (self.slots + 1) ** 2
        both_SS = np.bincount(pairs.ravel(), weights.ravel(), size).reshape(self.slots + 1, self.slots + 1)
        self.both_SS += both_SS[:-1, :-1]
        starts = np.arange(0, choices_cK.size + 1, choices_cK.shape[1])
        entries, shape = (
            (np.repeat(weight_c, choices_cK.shape[1]), choices_cK.ravel(), starts),
            (len(classes), self.slots + 1),
        )
        incidence_cS = csr_array(entries, shape=shape)  # also of no classes: slots that nobody chose are swapped, too
        self.enter_PS += (incidence_cS.T @ (count_cP[:, :-1] == 0).astype(float))[:-1].T


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
    order = np.argsort(choices_CK.ravel(), kind="stable") // choices_CK.shape[1]
    counts = np.bincount(choices_CK.ravel(), minlength=slots + 1)
    return np.split(order, np.cumsum(counts)[:-1])[:slots]
