"""The dispatcher across nodes: a token crosses to each node once and fans out there; sums are made before they cross.

Shape legend: T tokens of this rank, D model width, K top-k, R rows, W bytes of a row's message, N nodes, G groups,
M members of a rail, C chunks.

A *rail* joins the ranks that have one index in all nodes. Two transports do the work, each for what it is good at:

    dispatch   x_TD ─► one row to each node, over the rail ─► copies to its groups, inside the node ─► ExpertBatch
    combine    y_RD ─► back, inside the node ─► fp32 sum over its groups, rounded ─► one row home, over the rail
                                                                   ─► fp32 sum over the nodes, rounded ─► out_TD

These are the sums of the flat exchange (dispatch/base.py), made elsewhere, so the results are equal in every bit. A
call travels in chunks: while one of them fans out inside the nodes, or is summed there, the next ones are crossing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpertBatch, SlotChoice, Topology
from soloist.dispatch.rows import Departures, RowFormat, expert_major, join_group, phase, sum_rows
from soloist.specs.layout import share
from soloist.transport.base import Pending, Transport

TAG_BITS = 16  # of a row's slots: the group inside its node while the row crosses, the source's group while it fans out
TAG_MASK = (1 << TAG_BITS) - 1
MOST = 1 << (TAG_BITS - 1)
Rows = Pending[tuple[Tensor, list[int]]]  # on their way, with how many come from each member


@dataclass(frozen=True)
class Rails:
    """How one group reaches the others: over its rail to each node, from there inside the node.

    Nodes need not be equally full. There are as many rails as the emptiest node has groups; the further groups of a
    fuller node share its rails, each of them taking one gateway in every node.
    """

    topology: Topology
    group: int

    @cached_property
    def nodes(self) -> list[list[int]]:
        """Groups by node, in order."""
        of_group = self.topology.node_of_group
        assert list(of_group) == sorted(of_group), "neighbouring groups fill the nodes in order"
        return [[g for g, at in enumerate(of_group) if at == node] for node in sorted(set(of_group))]

    @cached_property
    def node(self) -> list[int]:
        """Groups of this group's node."""
        return next(groups for groups in self.nodes if self.group in groups)

    @cached_property
    def gateways(self) -> list[int]:
        """The group of each node to which this one sends; itself in its own."""
        width = min(map(len, self.nodes))
        turn, rail = divmod(self.node.index(self.group), width)
        members = [groups[rail::width] for groups in self.nodes]
        return [groups[turn % len(groups)] for groups in members]

    @cached_property
    def rail(self) -> list[int]:
        """Groups of this group's rail, itself included."""
        width = min(map(len, self.nodes))
        index = self.node.index(self.group) % width
        return [group for groups in self.nodes for group in groups[index::width]]


@dataclass(frozen=True)
class Crossing:
    """A chunk on its way over the rail, and what is needed for its way home."""

    leaving: Departures  # by node
    sent: list[int]  # rows to each member of the rail
    received: list[int]
    pending: Rows


@dataclass(frozen=True)
class FanOut:
    """The rows of a chunk that came over the rail, on their way to the groups of this node."""

    leaving: Departures  # by group of the node
    pending: Rows


@dataclass(frozen=True)
class Ticket:
    """How the rows of a batch go home."""

    crossings: list[Crossing]
    fans: list[Departures]
    received: list[list[int]]  # by chunk: rows from each group of the node
    order_R: Tensor  # place of each row of the batch among the rows as they came
    gathered: list[int] | None  # rows of each member of the TP group


@dataclass(frozen=True)
class HierarchicalDispatcher(Dispatcher):
    """Dispatcher over two transports. `slots` and `tp` as in RaggedDispatcher.

    rail, node: one rank of each group of `rails.rail` and of `rails.node`, in that order. chunks: of every call, the
    same number on all ranks; `fit` takes it from `chunks_for`, given the most tokens of a rank.
    """

    rail: Transport
    node: Transport
    rails: Rails
    slots: int
    tp: Transport | None = None
    chunks: int = 1
    chunks_for: Callable[[int], int] | None = None

    def __post_init__(self) -> None:
        assert self.rail.size == len(self.rails.rail), f"{self.rail.size} ranks on a rail of {self.rails.rail}"
        assert self.node.size == len(self.rails.node), f"{self.node.size} ranks on a node of {self.rails.node}"
        assert max(len(self.rails.topology.node_of_group), self.slots) < MOST, "more than a row's tag can name"

    def fit(self, tokens: int) -> HierarchicalDispatcher:
        return replace(self, chunks=self.chunks_for(tokens)) if self.chunks_for else self

    # -- dispatch -----------------------------------------------------------------------------------------------
    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Arriving:
        """The host waits for the counts of the rail's other ranks, once for all chunks."""
        form, where = RowFormat(x_TD.dtype, x_TD.shape[1], choice.group_TK.shape[1]), phase(where, "dispatch")
        nodes = by_node(choice, self.rails.topology, self.rail.device)
        spans = [share(len(x_TD), self.chunks, chunk) for chunk in range(self.chunks)]
        parts = [SlotChoice(*(t[start:stop] for t in vars(nodes).values())) for start, stop in spans]
        leaving = [Departures.of(part, len(self.rails.nodes)) for part in parts]
        sent_CM = [self._to_members(departures.counts) for departures in leaving]
        received_MC = self.rail.exchange_counts(torch.tensor(sent_CM).T, phase(where, "across nodes"))
        crossings = []
        for (start, stop), part, departures, sent, received in zip(
            spans, parts, leaving, sent_CM, received_MC.T.tolist(), strict=True
        ):
            message_RW = form.pack(x_TD[start:stop], part, departures)
            pending = self.rail.start_rows(message_RW, sent, received, phase(where, "across nodes"))
            crossings.append(Crossing(departures, sent, received, pending))
        return Arriving(self, form, crossings, where)

    def _to_members(self, counts_N: list[int]) -> list[int]:
        """Rows to each member of the rail, from those to each node."""
        to = dict(zip(self.rails.gateways, counts_N, strict=True))
        return [to.get(group, 0) for group in self.rails.rail]

    def fan_out(self, form: RowFormat, crossing: Crossing, where: str) -> FanOut:
        """Await a chunk that comes over the rail, and send each of its rows to the node's groups that it chose."""
        message_RW, received = crossing.pending.wait()
        x_RD, place_RK, weight_RK = form.parts(message_RW)
        rail = torch.tensor(self.rails.rail, device=message_RW.device)
        source_R = rail.repeat_interleave(torch.tensor(received, device=message_RW.device))
        tagged_RK = (source_R[:, None] << TAG_BITS) | (place_RK & TAG_MASK)
        inside = SlotChoice((place_RK >> TAG_BITS).long(), tagged_RK, weight_RK)  # −1 >> 16 is −1
        leaving = Departures.of(inside, self.node.size)
        message_RW = form.pack(x_RD, inside, leaving)
        return FanOut(leaving, self.node.start_rows(message_RW, leaving.counts, where=phase(where, "inside the node")))

    # -- combine ------------------------------------------------------------------------------------------------
    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Returning:
        ticket, where = batch.ticket, phase(where, "combine")
        assert isinstance(ticket, Ticket), "this batch came from another dispatcher"
        if self.tp is not None and ticket.gathered is not None:
            y_RD = self.tp.reduce_scatter_rows(y_RD.contiguous(), ticket.gathered, where)
        as_came_RD = torch.empty_like(y_RD)
        as_came_RD[ticket.order_R] = y_RD
        parts = as_came_RD.split([sum(received) for received in ticket.received])
        inside = [
            self.node.start_rows(part_RD.contiguous(), received, fan.counts, phase(where, "inside the node"))
            for part_RD, received, fan in zip(parts, ticket.received, ticket.fans, strict=True)
        ]
        chunks = zip(inside, ticket.fans, ticket.crossings, strict=True)
        return Returning(self, ticket, [self._cross_back(*chunk, where) for chunk in chunks])

    def _cross_back(self, pending: Rows, fan: Departures, crossing: Crossing, where: str) -> Rows:
        """Await a chunk's results of the node's groups, and send their sums home over the rail."""
        y_PD, _ = pending.wait()
        partial_RD = sum_rows(y_PD, fan.token_R, fan.tokens, min(fan.top_k, len(self.rails.node)))
        return self.rail.start_rows(partial_RD, crossing.received, crossing.sent, phase(where, "across nodes"))


@dataclass(frozen=True)
class Arriving:
    """A dispatch under way."""

    dispatcher: HierarchicalDispatcher
    form: RowFormat
    crossings: list[Crossing]
    where: str

    def wait(self) -> ExpertBatch:
        fans = [self.dispatcher.fan_out(self.form, crossing, self.where) for crossing in self.crossings]
        arrived = [fan.pending.wait() for fan in fans]
        message_RW, order_R = self._by_source(torch.cat([message_RW for message_RW, _ in arrived]))
        message_RW, gathered = join_group(message_RW, self.dispatcher.tp, self.where)
        rows_RD, slot_RK, weight_RK = self.form.parts(message_RW)
        row_X, weight_X, offsets_S = expert_major(slot_RK, weight_RK, self.dispatcher.slots)
        used = int(offsets_S[-1]) if self.dispatcher.slots else 0
        received = [counts for _, counts in arrived]
        ticket = Ticket(self.crossings, [fan.leaving for fan in fans], received, order_R, gathered)
        return ExpertBatch(rows_RD, row_X[:used], weight_X[:used], offsets_S, ticket)

    def _by_source(self, message_RW: Tensor) -> tuple[Tensor, Tensor]:
        """The rows by source, then token, without their tags, and where each of them stood.

        All rows of one source came through one rank of this node, chunk after chunk, in order of token.
        """
        place_RK = self.form.parts(message_RW)[1]
        order_R = (place_RK >> TAG_BITS).amax(1).argsort(stable=True)
        message_RW = message_RW.index_select(0, order_R)
        place_RK = self.form.parts(message_RW)[1]
        place_RK.copy_(torch.where(place_RK < 0, -1, place_RK & TAG_MASK))
        return message_RW, order_R


@dataclass(frozen=True)
class Returning:
    """A combine under way: the chunks are crossing to their nodes."""

    dispatcher: HierarchicalDispatcher
    ticket: Ticket
    pending: list[Rows]

    def wait(self) -> Tensor:
        nodes, crossings = len(self.dispatcher.rails.nodes), self.ticket.crossings
        summed = [
            sum_rows(home.wait()[0], leaving.token_R, leaving.tokens, min(leaving.top_k, nodes))
            for home, leaving in zip(self.pending, (crossing.leaving for crossing in crossings), strict=True)
        ]
        return torch.cat(summed)


def by_node(choice: SlotChoice, topology: Topology, device: torch.device) -> SlotChoice:
    """The choice as a rail sees it: nodes for groups; for slots the group inside its node, above TAG_BITS of slot."""
    node_G, local_G = places_of(topology, device)
    place_TK = (local_G[choice.group_TK] << TAG_BITS) | choice.slot_TK
    return SlotChoice(node_G[choice.group_TK], place_TK, choice.weight_TK)


@lru_cache(maxsize=64)
def places_of(topology: Topology, device: torch.device) -> tuple[Tensor, Tensor]:
    """Node of each group and its index there; behind the last, −1 for the group −1 of a token that goes nowhere.

    Kept from a first call, so that a captured one copies nothing from the host.
    """
    nodes = Rails(topology, 0).nodes
    places = [(node, index) for node, groups in enumerate(nodes) for index in range(len(groups))]
    node_G, local_G = torch.tensor([*places, (-1, 0)], device=device).T
    return node_G, local_G
