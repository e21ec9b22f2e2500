"""The hierarchical exchange with equal splits: shapes are known beforehand, so that a CUDA graph can hold it.

Shape legend: T tokens of this rank, C most tokens of any rank, D model width, K top-k, N nodes, R = N · C rows,
W bytes of a row's message.

    x_TD ─► a message for every token and node [N, C] ─► equal splits over the rail ─► any dispatcher inside the node,
                                                                                       for which those are R tokens
    the node's sums [N, C] ◄─ back over the rail ◄─ what that dispatcher's combine gives, rounded
    out_TD: fp32 over the nodes in order, rounded

Over NCCL with the one-sided dispatcher inside a node of GPUs nothing asks the host. A row also travels to nodes where
the token has no expert: fewer than one in three where a token goes to most nodes. For many tokens, whose bytes
count more than the host's time, there is dispatch/hierarchical.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, cast

import torch
from torch import Tensor

from soloist.dispatch.base import (
    Dispatcher,
    ExpertBatch,
    PendingBatch,
    PendingRows,
    PendingTokens,
    SlotChoice,
)
from soloist.dispatch.hierarchical import TAG_BITS, TAG_MASK, Rails, by_node
from soloist.dispatch.local import LocalDispatcher
from soloist.dispatch.one_sided import OneSidedDispatcher
from soloist.dispatch.rows import RowFormat, phase
from soloist.errors import CapacityError, ConfigurationError
from soloist.transport.base import Pending, Transport


@dataclass(frozen=True)
class Ticket:
    """How the rows of a batch go home."""

    tokens: int
    inside: ExpertBatch


def require_equal_nodes(rails: Rails) -> None:
    """Raises ConfigurationError where a rank would share its rail with several ranks of one node."""
    held = [len(groups) for groups in rails.nodes]
    if len(set(held)) > 1:
        remedy = "choose a layout and gpus_per_node that fill all nodes alike, or leave exchange_captured off"
        raise ConfigurationError.of("exchange_captured", True, f"nodes hold {held} expert groups; {remedy}")


@dataclass(frozen=True)
class RailedDispatcher(Dispatcher):
    """Dispatcher over a rail and, inside the node, over another dispatcher. All nodes hold equally many groups.

    rail: one rank of each node, in order. inside: between the groups of the node, numbered from 0, for calls of
    N · capacity tokens. capacity: the most tokens of a rank in a call, equal on all ranks.
    """

    rail: Transport
    inside: Dispatcher
    rails: Rails
    capacity: int

    def __post_init__(self) -> None:
        require_equal_nodes(self.rails)
        assert self.rail.size == len(self.rails.nodes), f"{self.rail.size} ranks on a rail of {self.rails.rail}"

    @property
    def limit(self) -> int:
        return self.capacity

    def fit(self, tokens: int) -> Self:
        return replace(self, capacity=tokens, inside=self.inside.fit(self.rail.size * tokens))

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Arriving:
        if len(x_TD) > self.capacity:
            raise CapacityError(f"{len(x_TD)} tokens in a call, buffers hold {self.capacity}: send them in rounds")
        form, counts = RowFormat(x_TD.dtype, x_TD.shape[1], choice.group_TK.shape[1]), [self.capacity] * self.rail.size
        message_RW = self._pack(form, x_TD, choice)
        crossing = self.rail.start_rows(message_RW, counts, counts, phase(phase(where, "dispatch"), "across nodes"))
        return Arriving(self, form, crossing, len(x_TD), where)

    def _pack(self, form: RowFormat, x_TD: Tensor, choice: SlotChoice) -> Tensor:
        """[N · C, W]; rows behind a rank's last token go nowhere."""
        nodes = by_node(choice, self.rails.topology, self.rail.device)
        message_NCW = x_TD.new_zeros(self.rail.size, self.capacity, form.row_bytes, dtype=torch.uint8)
        x_RD, place_RK, weight_RK = form.parts(message_NCW.flatten(0, 1))
        place_RK.fill_(-1)
        for node in range(self.rail.size):
            rows = slice(node * self.capacity, node * self.capacity + len(x_TD))
            x_RD[rows] = x_TD
            place_RK[rows] = nodes.slot_TK.where(nodes.group_TK == node, -1).to(torch.int32)
            weight_RK[rows] = choice.weight_TK
        return message_NCW.flatten(0, 1)

    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Returning:
        ticket = batch.ticket
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        return self.cross_back(self.inside.start_combine(y_RD, ticket.inside, where), ticket.tokens, where)

    def cross_back(self, pending: PendingTokens, tokens: int, where: str) -> Returning:
        """Await the results of the node's groups, and send their sums home over the rail."""
        counts, where = [self.capacity] * self.rail.size, phase(phase(where, "combine"), "across nodes")
        return Returning(self, self.rail.start_rows(pending.wait().contiguous(), counts, counts, where), tokens)


@dataclass(frozen=True)
class RailedExpandedDispatcher(RailedDispatcher):
    """The same by kernels inside the node, which take the experts' results before they are summed."""

    inside: OneSidedDispatcher | LocalDispatcher

    def with_slots(self, slots: int) -> RailedExpandedDispatcher:
        """For a layer in which this rank's group has so many slots, or fewer than memory was made for."""
        return replace(self, inside=self.inside.with_slots(slots))

    def start_combine_expanded(self, y_XD: Tensor, batch: ExpertBatch, where: str = "") -> Returning:
        ticket = batch.ticket
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        return self.cross_back(self.inside.start_combine_expanded(y_XD, ticket.inside, where), ticket.tokens, where)


@dataclass
class Arriving:
    """A dispatch under way: what comes over the rail goes on inside the node when it is awaited."""

    dispatcher: RailedDispatcher
    form: RowFormat
    crossing: Pending[tuple[Tensor, list[int]]]
    tokens: int
    where: str

    @property
    def rows(self) -> int:
        """Of the batch to come."""
        return cast(PendingRows, self._fan_out).rows

    @cached_property
    def _fan_out(self) -> PendingBatch:
        x_RD, place_RK, weight_RK = self.form.parts(self.crossing.wait()[0])
        place_RK = place_RK.contiguous()
        group_RK, is_none_RK = (place_RK >> TAG_BITS).long(), place_RK < 0  # −1 >> 16 is −1
        choice = SlotChoice(group_RK, (place_RK & TAG_MASK).long().where(~is_none_RK, -1), weight_RK.contiguous())
        return self.dispatcher.inside.start_dispatch(x_RD.contiguous(), choice, self.where)

    def wait(self) -> ExpertBatch:
        return self._wrapped(self._fan_out.wait())

    def wait_expanded(self) -> tuple[ExpertBatch, Tensor]:
        batch, x_XD = cast(PendingRows, self._fan_out).wait_expanded()
        return self._wrapped(batch), x_XD

    def _wrapped(self, batch: ExpertBatch) -> ExpertBatch:
        return replace(batch, ticket=Ticket(self.tokens, batch))


@dataclass(frozen=True)
class Returning:
    """A combine under way: the node's sums are crossing to their nodes."""

    dispatcher: RailedDispatcher
    crossing: Pending[tuple[Tensor, list[int]]]
    tokens: int

    def wait(self) -> Tensor:
        home_RD, _ = self.crossing.wait()
        total_TD = torch.zeros(self.tokens, home_RD.shape[1], device=home_RD.device)
        for part_CD in home_RD.split(self.dispatcher.capacity):
            total_TD += part_CD[: self.tokens].float()
        return total_TD.to(home_RD.dtype)
