"""The seam between router and experts: a token travels once to each group that holds one of its experts.

Shape legend: T tokens of this rank, D model width, K top-k, R received rows, X expanded rows (one per row and local
slot chosen), S local slots, G groups.

    x_TD, SlotChoice ──dispatch──► ExpertBatch(rows_RD, index) ──experts──► y_RD ──combine──► out_TD

Equality is defined here. For the same placement and topology every dispatcher over every transport delivers equal
`rows_RD` and, for equal `y_RD`, equal `out_TD`. Rows are ordered by source rank, then token. The sum over the groups of
a token follows the topology: fp32 over the groups of a node in order of group, one rounding to the payload type, fp32
over the nodes in order, one rounding to the payload type. `ragged` over the `local` transport is the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class SlotChoice:
    """Where each token goes: filled by the router from its expert choice and the placement.

    A token that goes nowhere, as those do that only fill up a batch, has −1 for all its groups and slots.
    """

    group_TK: Tensor  # int64: expert group
    slot_TK: Tensor  # int64: slot within the group
    weight_TK: Tensor  # fp32 gate weight

    def of_group(self, group: int) -> SlotChoice:
        """What one group is to do, as group 0 of a world where there is no other."""
        is_own_TK = self.group_TK == group
        return SlotChoice(is_own_TK.long() - 1, self.slot_TK.where(is_own_TK, -1), self.weight_TK)


@dataclass(frozen=True)
class ExpertBatch:
    """The rows that arrived and which local slots each of them chose.

    The expanded rows are ordered by slot, then by row: slot s has `offsets_S[s - 1] … offsets_S[s]`. A row that
    chose three local slots stands three times in `row_X`.
    """

    rows_RD: Tensor
    row_X: Tensor  # int64: index into rows_RD, up to the last offset
    weight_X: Tensor  # fp32 gate weight
    offsets_S: Tensor  # int32: end of each slot's expanded rows
    ticket: object  # opened by `combine` alone
    dense: bool = True  # every row came; otherwise those that `row_X` does not name hold anything
    slots_RK: Tensor | None = None  # what kernels made the index of, until combine: local slots chosen, −1 elsewhere


class PendingBatch(Protocol):
    """A dispatch under way."""

    def wait(self) -> ExpertBatch: ...


class PendingTokens(Protocol):
    """A combine under way."""

    def wait(self) -> Tensor: ...


class PendingRows(PendingBatch, Protocol):
    """A dispatch under way that can expand the rows itself."""

    @property
    def rows(self) -> int:
        """R of the batch to come."""
        ...

    def wait_expanded(self) -> tuple[ExpertBatch, Tensor]:
        """The batch and x_XD, each row once for every slot that it chose. `rows_RD` is not to be used then."""
        ...


@dataclass(frozen=True)
class Topology:
    """Which node each expert group lies on. Nodes are declared, never guessed."""

    node_of_group: tuple[int, ...]

    @classmethod
    def of(cls, groups: int, tp: int, gpus_per_node: int, first_rank: int = 0) -> Topology:
        """Groups of `tp` neighbouring ranks, nodes of `gpus_per_node` neighbouring ranks."""
        return cls(tuple((first_rank + g * tp) // gpus_per_node for g in range(groups)))


class Dispatcher(Protocol):
    """Moves tokens to the groups of their experts and back. Called by all ranks of a stage in the same order.

    `start_dispatch` and `start_combine` return at once where the transport allows, so that something else runs in
    between; until `wait` returns, the tensors given must not be written. A rank without tokens joins with T = 0.
    `where` names the layer in errors.
    """

    @property
    def limit(self) -> int | None:
        """The most tokens of a rank in one call; None: any number. Whoever has more sends them in rounds."""
        return None

    def fit(self, tokens: int) -> Self:
        """The same for calls of at most `tokens` tokens a rank, a number that all ranks agree on."""
        return self

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> PendingBatch: ...

    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> PendingTokens: ...

    def dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> ExpertBatch:
        """`start_dispatch`, awaited."""
        return self.start_dispatch(x_TD, choice, where).wait()

    def combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Tensor:
        """out_TD: for each token the sum over its groups of the `y_RD` row that it got there."""
        return self.start_combine(y_RD, batch, where).wait()


@runtime_checkable
class ExpandedDispatcher(Protocol):
    """A dispatcher that also takes the experts' results before they are weighed and summed; it waits for no host."""

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> PendingRows: ...

    def start_combine_expanded(self, y_XD: Tensor, batch: ExpertBatch, where: str = "") -> PendingTokens: ...
