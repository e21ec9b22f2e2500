"""The plain dispatcher: exactly the rows that are needed, in one exchange each way. It defines what the others deliver.

Shape legend: T tokens of this rank, D model width, R rows, W bytes of a row's message.

With `tp`, the tokens are sharded over a group's ranks, while each rank holds a share of every expert of the group:

    dispatch   x_TD ─► rows to the same member of every group ─► gathered inside the group ─► ExpertBatch
    combine    y_RD ─► partial sums reduce-scattered inside the group ─► rows go home ─► summed by topology ─► out_TD
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpertBatch, SlotChoice, Topology
from soloist.dispatch.rows import Departures, RowFormat, expert_major, join_group, phase, sum_at_home
from soloist.transport.base import Pending, Transport


@dataclass(frozen=True)
class Ticket:
    """How the rows of a batch go home."""

    leaving: Departures
    received: list[int]  # rows from each group
    gathered: list[int] | None  # rows of each member of the TP group


@dataclass(frozen=True)
class RaggedDispatcher(Dispatcher):
    """Dispatcher over any transport.

    peers: one rank of each expert group, in order of group. slots: those of this rank's group, 0 included. tp: the
    ranks of this rank's group where they hold different tokens; then rows are ordered by member first. Without it
    nothing is gathered, and with TP inside the experts the result is this rank's partial sum.
    """

    peers: Transport
    topology: Topology
    slots: int
    tp: Transport | None = None

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Arriving:
        leaving = Departures.of(choice, self.peers.size)
        form = RowFormat(x_TD.dtype, x_TD.shape[1], leaving.top_k)
        message_RW = form.pack(x_TD, choice, leaving)
        where = phase(where, "dispatch")
        return Arriving(self, form, leaving, self.peers.start_rows(message_RW, leaving.counts, where=where), where)

    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Returning:
        ticket, where = batch.ticket, phase(where, "combine")
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        if self.tp is not None and ticket.gathered is not None:
            y_RD = self.tp.reduce_scatter_rows(y_RD.contiguous(), ticket.gathered, where)
        pending = self.peers.start_rows(y_RD.contiguous(), ticket.received, ticket.leaving.counts, where)
        return Returning(ticket.leaving, self.topology, pending)


@dataclass(frozen=True)
class Arriving:
    """A dispatch under way."""

    dispatcher: RaggedDispatcher
    form: RowFormat
    leaving: Departures
    pending: Pending[tuple[Tensor, list[int]]]
    where: str

    def wait(self) -> ExpertBatch:
        message_RW, received = self.pending.wait()
        message_RW, gathered = join_group(message_RW, self.dispatcher.tp, self.where)
        rows_RD, slot_RK, weight_RK = self.form.parts(message_RW)
        row_X, weight_X, offsets_S = expert_major(slot_RK, weight_RK, self.dispatcher.slots)
        used = int(offsets_S[-1]) if self.dispatcher.slots else 0
        return ExpertBatch(rows_RD, row_X[:used], weight_X[:used], offsets_S, Ticket(self.leaving, received, gathered))


@dataclass(frozen=True)
class Returning:
    """A combine under way."""

    leaving: Departures
    topology: Topology
    pending: Pending[tuple[Tensor, list[int]]]

    def wait(self) -> Tensor:
        y_RD, _ = self.pending.wait()
        return sum_at_home(y_RD, self.leaving, self.topology)
