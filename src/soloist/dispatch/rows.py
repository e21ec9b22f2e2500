"""What every dispatcher does with rows: which ones leave, what a message holds, the index, the sum at home.

Shape legend: T tokens of this rank, D model width, K top-k, R rows, X expanded rows, S local slots, G groups, N nodes,
P pairs of a token and a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from soloist.dispatch.base import SlotChoice, Topology
from soloist.kernels.reference import member_table, ordered_sum
from soloist.transport.base import Transport


@dataclass(frozen=True)
class Departures:
    """The rows that leave a rank: one for each token and group that holds an expert of it, by group, then token."""

    tokens: int
    top_k: int
    token_R: Tensor  # int64
    group_R: Tensor  # int64
    counts: list[int]  # rows to each group

    @classmethod
    def of(cls, choice: SlotChoice, groups: int) -> Departures:
        """Waits for the device, since the host has to know the counts."""
        tokens, top_k = choice.group_TK.shape
        token_T1 = torch.arange(tokens, device=choice.group_TK.device)[:, None]
        group_R, token_R, going_GT = distinct(choice.group_TK, token_T1, groups, tokens)
        return cls(tokens, top_k, token_R, group_R, going_GT.sum(1).tolist())


def distinct(first: Tensor, second: Tensor, firsts: int, seconds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct pairs of two index tensors that broadcast, in order, and the matrix that marks them.

    A first of −1 makes no pair: it marks a spare last row.
    """
    marked = torch.zeros(firsts + 1, seconds, dtype=torch.bool, device=first.device)
    marked[first, second] = True
    marked = marked[:firsts]
    found_first, found_second = marked.nonzero(as_tuple=True)
    return found_first, found_second, marked


@dataclass(frozen=True)
class RowFormat:
    """One row as bytes, so that any transport moves it in one piece:

    | x: D elements | 0-3 pad | slots: K int32, −1 for a choice of another group | weights: K fp32 | pad to 16 |
    """

    dtype: torch.dtype
    d_model: int
    top_k: int

    @property
    def x_bytes(self) -> int:
        return self.d_model * self.dtype.itemsize

    @property
    def slots_at(self) -> int:
        return _round_up(self.x_bytes, 4)

    @property
    def weights_at(self) -> int:
        return self.slots_at + 4 * self.top_k

    @property
    def end(self) -> int:
        return self.weights_at + 4 * self.top_k

    @property
    def row_bytes(self) -> int:
        return _round_up(self.end, 16)

    def parts(self, message: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_RD, slot_RK, weight_RK: views of the uint8 message `[R, row_bytes]`."""
        return (
            message[:, : self.x_bytes].view(self.dtype),
            message[:, self.slots_at : self.weights_at].view(torch.int32),
            message[:, self.weights_at : self.end].view(torch.float32),
        )

    def pack(self, x_TD: Tensor, choice: SlotChoice, leaving: Departures) -> Tensor:
        """The message of the rows that leave. The pads are not initialised."""
        token_R, group_R1 = leaving.token_R, leaving.group_R[:, None]
        message = torch.empty(len(token_R), self.row_bytes, dtype=torch.uint8, device=x_TD.device)
        x_RD, slot_RK, weight_RK = self.parts(message)
        torch.index_select(x_TD, 0, token_R, out=x_RD)
        slot_RK.copy_(choice.slot_TK[token_R].where(choice.group_TK[token_R] == group_R1, -1))
        weight_RK.copy_(choice.weight_TK[token_R])
        return message


def _round_up(size: int, to: int) -> int:
    return -(-size // to) * to


def expert_major(slot_RK: Tensor, weight_RK: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """row_X, weight_X, offsets_S of an ExpertBatch, by slot, then row; X = R · K.

    slot_RK: a local slot, or −1 where the choice belongs to another group. Those stand behind the last offset. Needs no
    host synchronisation; whoever knows the last offset may cut the rest off.
    """
    slot_X = slot_RK.where(slot_RK >= 0, slots).flatten()
    order_X = torch.argsort(slot_X, stable=True)
    slot_S = torch.arange(slots, dtype=slot_X.dtype, device=slot_X.device)
    offsets_S = torch.searchsorted(slot_X[order_X], slot_S, right=True, out_int32=True)
    return order_X // slot_RK.shape[1], weight_RK.flatten()[order_X], offsets_S


def join_group(message_RW: Tensor, tp: Transport | None, where: str) -> tuple[Tensor, list[int] | None]:
    """What all ranks of a TP group received, in order of rank, and how many rows each of them did."""
    if tp is None:
        return message_RW, None
    own = torch.tensor([[len(message_RW)]], device=message_RW.device)
    gathered = tp.all_gather_rows(own, [1] * tp.size, where).flatten().tolist()
    return tp.all_gather_rows(message_RW, gathered, where), gathered


def phase(where: str, name: str) -> str:
    """A place in the program, as errors name it."""
    return f"{where}, {name}" if where else name


def sum_at_home(y_RD: Tensor, leaving: Departures, topology: Topology) -> Tensor:
    """out_TD: the rows that came home, summed for each token along the topology's tree (dispatch/base.py).

    y_RD: in the order in which the rows left.
    """
    node_of_group, nodes, groups_of_node = _nodes(topology, y_RD.device)
    if nodes == 1:
        return sum_rows(y_RD, leaving.token_R, leaving.tokens, min(leaving.top_k, groups_of_node))
    node_R = node_of_group[leaving.group_R]
    _, token_P, marked_NT = distinct(node_R, leaving.token_R, nodes, leaving.tokens)
    pair_NT = marked_NT.flatten().cumsum(0).view_as(marked_NT) - 1
    pair_R = pair_NT[node_R, leaving.token_R]
    partial_PD = sum_rows(y_RD, pair_R, len(token_P), min(leaving.top_k, groups_of_node))
    return sum_rows(partial_PD, token_P, leaving.tokens, min(leaving.top_k, nodes))


@lru_cache(maxsize=64)
def _nodes(topology: Topology, device: torch.device) -> tuple[Tensor, int, int]:
    """The node of each group, counted from 0 without gaps; the nodes; the groups of the largest node."""
    order = sorted(set(topology.node_of_group))
    node_of_group = [order.index(node) for node in topology.node_of_group]
    return torch.tensor(node_of_group, device=device), len(order), max(map(node_of_group.count, node_of_group))


def sum_rows(values_XD: Tensor, sum_X: Tensor, sums: int, most: int) -> Tensor:
    """Each sum in fp32 in order of its entries, rounded once to the dtype of the values."""
    return ordered_sum(values_XD, member_table(sum_X, sums, most)).to(values_XD.dtype)
