"""Collectives from one motion: rows to every member, or the same rows to all.

Shape legend: R rows, W elements of a row, N elements of any shape.

A transport that can do this much gets gathers and reductions with the defined order of summation for nothing. Where a
library or a network has better ones (NCCL), `Transport` is implemented directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from soloist.transport.base import Pending, Transport

GATHER_BYTES = 64 << 10  # an all-reduce up to this size takes one exchange of everything, above it two of 1/size each


class ExchangeTransport(Transport):
    """Implements the collectives of `Transport` over `_start`; accounts for what they move."""

    @abstractmethod
    def _start(
        self, rows_RW: Tensor, send_counts: Sequence[int] | None, recv_counts: Sequence[int] | None, where: str
    ) -> Pending[tuple[Tensor, list[int]]]:
        """`start_rows` without accounting; `send_counts = None` sends all rows to every member."""

    def start_rows(
        self, rows_RW: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None, where: str = ""
    ) -> Pending[tuple[Tensor, list[int]]]:
        assert len(send_counts) == self.size, f"{len(send_counts)} counts for {self.size} members"
        assert sum(send_counts) == len(rows_RW), f"counts {send_counts} for {len(rows_RW)} rows"
        self.traffic.count_rows(self.rank, send_counts, row_bytes(rows_RW))
        return self._start(rows_RW, send_counts, recv_counts, where)

    def exchange_counts(self, counts_MC: Tensor, where: str = "") -> Tensor:
        ones = [1] * self.size
        return self._start(counts_MC.contiguous(), ones, ones, where).wait()[0]

    def all_gather_rows(self, rows_RW: Tensor, counts: Sequence[int] | None = None, where: str = "") -> Tensor:
        gathered = self._gather(rows_RW, counts, where)
        self.traffic.count_ring(self.rank, gathered.nbytes)
        return gathered

    def reduce_scatter_rows(self, rows_RW: Tensor, counts: Sequence[int], where: str = "") -> Tensor:
        self.traffic.count_ring(self.rank, rows_RW.nbytes)
        return self._reduce_scatter(rows_RW, counts, where)

    def all_reduce(self, x_N: Tensor, where: str = "") -> Tensor:
        self.traffic.count_ring(self.rank, x_N.nbytes, passes=2)
        if x_N.nbytes <= GATHER_BYTES or self.size == 1:
            parts = self._gather(x_N.reshape(1, -1), [1] * self.size, where)
            return ordered_sum(parts).view(x_N.shape)
        cuts = [x_N.numel() * i // self.size for i in range(self.size + 1)]
        counts = [stop - start for start, stop in pairwise(cuts)]
        mine = self._reduce_scatter(x_N.reshape(-1, 1), counts, where)
        return self._gather(mine, counts, where).view(x_N.shape)

    def barrier(self, where: str = "") -> None:
        self._gather(torch.zeros(1, 1, dtype=torch.uint8), [1] * self.size, where)

    def _gather(self, rows_RW: Tensor, counts: Sequence[int] | None, where: str) -> Tensor:
        return self._start(rows_RW, None, counts, where).wait()[0]

    def _reduce_scatter(self, rows_RW: Tensor, counts: Sequence[int], where: str) -> Tensor:
        mine = counts[self.rank]
        received, _ = self._start(rows_RW, counts, [mine] * self.size, where).wait()
        return ordered_sum(received.view(self.size, mine, *rows_RW.shape[1:]))


class Exchange(ABC):
    """Rows to and from every member, under way.

    Exchanges end in the order of their starts, whichever of them is awaited first. That order is the same on all
    members, so nobody waits for something that a peer would only do after another exchange.
    """

    def __init__(self, under_way: deque[Exchange]) -> None:
        self._under_way = under_way
        self._received: tuple[Tensor, list[int]] | None = None
        under_way.append(self)

    @abstractmethod
    def receive(self) -> tuple[Tensor, list[int]]:
        """Called once, when all earlier exchanges have ended."""

    def wait(self) -> tuple[Tensor, list[int]]:
        while self._received is None:
            first = self._under_way.popleft()
            first._received = first.receive()
        return self._received


def row_bytes(rows_RW: Tensor) -> int:
    """Bytes of one row."""
    return rows_RW.shape[1:].numel() * rows_RW.element_size()


def parts_of(rows_RW: Tensor, send_counts: Sequence[int] | None, size: int) -> Sequence[Tensor]:
    """What each member gets."""
    return [rows_RW] * size if send_counts is None else rows_RW.split(list(send_counts))


def ordered_sum(parts: Tensor) -> Tensor:
    """The sum over the first dimension in order, in fp32 (fp64 for fp64, integers in their own type), rounded once."""
    dtype = parts.dtype
    wide = parts.float() if dtype.is_floating_point and dtype != torch.float64 else parts
    total = wide[0].clone()
    # numpy's additions cost a third of torch's for the few kilobytes of a decoding step.
    if parts.is_cpu:
        into = total.numpy()
        for part in wide.numpy()[1:]:
            np.add(into, part, out=into)
    else:
        for part in wide[1:]:
            total += part
    return total.to(dtype)
