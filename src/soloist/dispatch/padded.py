"""The dispatcher for CUDA graphs over any transport: every pair of groups exchanges the same number of rows.

Shape legend: T tokens of this rank, K top-k, G groups, C rows for a group in one round, R rows, D model width, W bytes
of a row's message, J groups that a token can go to.

    x_TD ─► slab [rounds, G, C] ─► one equal exchange a round ─► rows by source, then token; unused ones name no slot
    y_RD ─► the same way back ─► summed by topology

Shapes and counts are known beforehand, so the host is never asked. What does not fit into one round goes in the next:
nothing is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soloist.dispatch.base import Dispatcher, ExpertBatch, SlotChoice, Topology
from soloist.dispatch.rows import RowFormat, expert_major, phase
from soloist.errors import CapacityError
from soloist.kernels.reference import ordered_sum
from soloist.transport.base import Pending, Transport


@dataclass(frozen=True)
class Places:
    """Where each choice's row stands in the slab. A token's second choice of a group takes no row of its own.

    The ticket of a batch: by it the rows go home.
    """

    place_TK: Tensor  # int64 row of the slab; its last, spare one for a choice without a row
    group_TK: Tensor  # int64; G for a choice without a row

    @classmethod
    def of(cls, group_TK: Tensor, groups: int, rounds: int, capacity: int) -> Places:
        """`capacity`: rows that a round holds for each group."""
        group_TK = group_TK.where(group_TK >= 0, groups)
        one_TG = torch.zeros(len(group_TK), groups + 1, dtype=torch.int64, device=group_TK.device)
        one_TG.scatter_(1, group_TK, 1)
        nth_TK = (one_TG.cumsum(0) - 1).gather(1, group_TK)
        same_TKK = group_TK[:, :, None] == group_TK[:, None, :]
        first_TK = ~same_TKK.tril(-1).any(2) & (group_TK < groups)
        place_TK = nth_TK // capacity * (groups * capacity) + group_TK * capacity + nth_TK % capacity
        return cls(place_TK.where(first_TK, rounds * groups * capacity), group_TK.where(first_TK, groups))

    def sums(self, groups: int) -> tuple[Tensor, Tensor]:
        """place_TJ in order of group, the spare row behind a token's last, and the groups, G behind the last."""
        group_TK, order_TK = self.group_TK.sort(1)
        most = min(groups, group_TK.shape[1])
        return self.place_TK.gather(1, order_TK)[:, :most], group_TK[:, :most]


@dataclass(frozen=True)
class PaddedDispatcher(Dispatcher):
    """Dispatcher with equal splits. `peers`, `topology`, `slots` and `tp` as in RaggedDispatcher.

    capacity: rows that a rank sends to each group in a round. rounds: of every call; a rank may bring up to
    `capacity · rounds` tokens. All ranks use the same numbers.
    """

    peers: Transport
    topology: Topology
    slots: int
    capacity: int
    rounds: int = 1
    tp: Transport | None = None

    @property
    def limit(self) -> int:
        return self.capacity * self.rounds

    def start_dispatch(self, x_TD: Tensor, choice: SlotChoice, where: str = "") -> Arriving:
        if len(x_TD) > self.limit:
            reason = f"{len(x_TD)} tokens in a call, {self.rounds} rounds of {self.capacity} rows may not hold them"
            raise CapacityError(f"{reason}: allow more rounds or a larger capacity")
        groups, where = self.peers.size, phase(where, "dispatch")
        places = Places.of(choice.group_TK, groups, self.rounds, self.capacity)
        form = RowFormat(x_TD.dtype, x_TD.shape[1], choice.group_TK.shape[1])
        slab_RW = self._pack(form, x_TD, choice, places)
        return Arriving(self, form, places, self._exchange(slab_RW, where), where)

    def _pack(self, form: RowFormat, x_TD: Tensor, choice: SlotChoice, places: Places) -> Tensor:
        """The slab's messages; behind them a spare one, into which everything without a row is written."""
        rows = self.rounds * self.peers.size * self.capacity
        message_RW = torch.zeros(rows + 1, form.row_bytes, dtype=torch.uint8, device=x_TD.device)
        x_RD, slot_RK, weight_RK = form.parts(message_RW)
        slot_RK.fill_(-1)
        for k in range(form.top_k):
            place_T, group_T1 = places.place_TK[:, k], places.group_TK[:, k, None]
            x_RD[place_T] = x_TD
            slot_RK[place_T] = choice.slot_TK.where(choice.group_TK == group_T1, -1).to(torch.int32)
            weight_RK[place_T] = choice.weight_TK.float()
        return message_RW[:-1]

    def _exchange(self, rows_RW: Tensor, where: str) -> list[Pending[tuple[Tensor, list[int]]]]:
        """`rows_RW` is `[rounds, G, C]`, flat."""
        counts = [self.capacity] * self.peers.size
        return [
            self.peers.start_rows(part_RW.contiguous(), counts, counts, where) for part_RW in rows_RW.chunk(self.rounds)
        ]

    def _turn(self, parts: list[Tensor]) -> Tensor:
        """`[rounds, G, C]` by rounds to rows by source, then token."""
        return torch.stack(parts).unflatten(1, (self.peers.size, self.capacity)).transpose(0, 1).flatten(0, 2)

    def start_combine(self, y_RD: Tensor, batch: ExpertBatch, where: str = "") -> Returning:
        places, where = batch.ticket, phase(where, "combine")
        assert isinstance(places, Places), "this batch came from another dispatcher"
        if self.tp is not None:
            share = len(y_RD) // self.tp.size
            y_RD = self.tp.reduce_scatter_rows(y_RD.contiguous(), [share] * self.tp.size, where)
        by_round = y_RD.unflatten(0, (self.peers.size, self.rounds, self.capacity)).transpose(0, 1).flatten(0, 2)
        return Returning(self, places, self._exchange(by_round, where))

    def sum(self, y_RD: Tensor, places: Places) -> Tensor:
        """out_TD: fp32 over the groups of a node, rounded, fp32 over the nodes, rounded."""
        place_TJ, group_TJ = places.sums(self.peers.size)
        node_TJ = self._node_G[group_TJ]
        total_TD = torch.zeros(len(place_TJ), y_RD.shape[1], device=y_RD.device)
        for node in range(max(self._nodes) + 1):
            partial_TD = ordered_sum(y_RD, place_TJ.where(node_TJ == node, len(y_RD))).to(y_RD.dtype)
            total_TD = total_TD + partial_TD.float()
        return total_TD.to(y_RD.dtype)

    @cached_property
    def _nodes(self) -> list[int]:
        """The node of each group, numbered from 0."""
        named = sorted(set(self.topology.node_of_group))
        return [named.index(node) for node in self.topology.node_of_group]

    @cached_property
    def _node_G(self) -> Tensor:
        """The same on the device, −1 for no group. Made by the first call, which is never a captured one."""
        return torch.tensor([*self._nodes, -1], device=self.peers.device)


@dataclass(frozen=True)
class Arriving:
    """A dispatch under way."""

    dispatcher: PaddedDispatcher
    form: RowFormat
    places: Places
    rounds: list[Pending[tuple[Tensor, list[int]]]]
    where: str

    def wait(self) -> ExpertBatch:
        dispatcher, tp = self.dispatcher, self.dispatcher.tp
        message_RW = dispatcher._turn([pending.wait()[0] for pending in self.rounds])
        if tp is not None:
            message_RW = tp.all_gather_rows(message_RW.contiguous(), [len(message_RW)] * tp.size, self.where)
        rows_RD, slot_RK, weight_RK = self.form.parts(message_RW)
        index = expert_major(slot_RK, weight_RK, dispatcher.slots)
        return ExpertBatch(rows_RD, *index, self.places, dense=False)


@dataclass(frozen=True)
class Returning:
    """A combine under way."""

    dispatcher: PaddedDispatcher
    places: Places
    rounds: list[Pending[tuple[Tensor, list[int]]]]

    def wait(self) -> Tensor:
        return self.dispatcher.sum(torch.cat([pending.wait()[0] for pending in self.rounds]), self.places)
