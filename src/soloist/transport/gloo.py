"""Rows over torch.distributed's gloo: ranks on CPUs, over TCP between any machines.

Shape legend: R rows, W elements of a row, N elements of any shape.

Everything goes by gloo's point-to-point messages, one per pair and call, because its collectives cannot say which
peer kept them waiting. The group is built on a given store and is never the default group, so that a broken one
can be dropped and the next built beside it. Messages are moved by gloo's own thread: an exchange that was started goes
on while this rank computes, except that rows whose counts are not known are received from `wait` onwards.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store

from soloist.errors import CommunicationError
from soloist.transport.base import Transport
from soloist.transport.exchange import Exchange, ExchangeTransport, parts_of

MESSAGE_TAG = 0  # of point-to-point messages; each exchange has two tags of its own, for counts and for rows
TAGS = 1 << 30  # that exchanges take in turn, behind it
UNDER_WAY = 4  # messages to one peer before `send` waits


@dataclass(eq=False)
class _Posted:
    """A message under way. gloo reads or writes the tensor until it has ended; its connections live as long as it."""

    work: torch.distributed.Work | None
    tensor: Tensor | None
    peer: int

    def drop(self) -> None:
        self.work = self.tensor = None


class GlooTransport(ExchangeTransport):
    """One member of a gloo group. `store` is the group's own: no two groups may share a prefix.

    host: this member's address in the network that joins the members. Without it gloo takes what the host's name
    resolves to, which on many machines is an address of its own loopback. GLOO_SOCKET_IFNAME goes before both.
    """

    def __init__(
        self, store: Store, ranks: Sequence[int], rank: int, deadline_s: float = 60.0, host: str | None = None
    ) -> None:
        super().__init__(tuple(ranks), rank, deadline_s)
        self._store, self._host = store, host
        self._group: ProcessGroupGloo | None = self._connect()
        self.under_way: deque[Exchange] = deque()
        self._tag = MESSAGE_TAG
        self._posted: WeakSet[_Posted] = WeakSet()
        self._sent: defaultdict[int, deque[_Posted]] = defaultdict(deque)
        self._subgroups: defaultdict[tuple[int, ...], int] = defaultdict(int)

    def _connect(self) -> ProcessGroupGloo:
        deadline = timedelta(seconds=self.deadline_s)
        try:
            if self._host is None or "GLOO_SOCKET_IFNAME" in os.environ:
                return ProcessGroupGloo(self._store, self.rank, self.size, deadline)
            gloo: Any = ProcessGroupGloo  # the stubs do not know its options
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=self._host)]
            options._timeout = deadline
            return gloo(self._store, self.rank, self.size, options)
        except RuntimeError as error:
            reason = f"did not join the group: {error}"
            raise CommunicationError(self.ranks[self.rank], None, "connecting", reason) from error

    # -- rows -------------------------------------------------------------------------------------------------------
    def _start(
        self, rows_RW: Tensor, send_counts: Sequence[int] | None, recv_counts: Sequence[int] | None, where: str
    ) -> _GlooExchange:
        self._tag = self._tag % TAGS + 2
        parts = parts_of(rows_RW, send_counts, self.size)
        return _GlooExchange(self, parts, recv_counts, self._tag, where)

    # -- point to point ---------------------------------------------------------------------------------------------
    def send(self, x_N: Tensor, peer: int, where: str = "") -> None:
        self.traffic.count_message(peer, x_N.nbytes)
        under_way = self._sent[peer]
        while len(under_way) >= UNDER_WAY:
            self.finish([under_way.popleft()], where)
        under_way.append(self.post_send(x_N.clone(memory_format=torch.contiguous_format), peer, MESSAGE_TAG, where))

    def recv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, where: str = "") -> Tensor:
        message = torch.empty(*shape, dtype=dtype)
        self.finish([self.post_recv(message, peer, MESSAGE_TAG, where)], where)
        return message

    # -- gloo -------------------------------------------------------------------------------------------------------
    def post_send(self, tensor: Tensor, peer: int, tag: int, where: str) -> _Posted:
        return self._post("send", tensor, peer, tag, where)

    def post_recv(self, tensor: Tensor, peer: int, tag: int, where: str) -> _Posted:
        return self._post("recv", tensor, peer, tag, where)

    def _post(self, direction: str, tensor: Tensor, peer: int, tag: int, where: str) -> _Posted:
        assert self._group is not None, "the transport is closed"
        try:
            posted = _Posted(getattr(self._group, direction)([tensor], peer, tag), tensor, peer)
        except RuntimeError as error:
            raise self._failure(peer, error, where) from error
        self._posted.add(posted)
        return posted

    def finish(self, posted: Sequence[_Posted], where: str) -> None:
        """Wait until all have ended, for as long as one deadline in all."""
        until = time.monotonic() + self.deadline_s
        for message in posted:
            left = timedelta(seconds=max(until - time.monotonic(), 0.001))  # gloo takes 0 for no limit
            assert message.work is not None, "the transport is closed"
            try:
                with self.traffic.waiting(message.peer):
                    message.work.wait(left)
            except RuntimeError as error:
                raise self._failure(message.peer, error, where) from error

    def _failure(self, peer: int, error: RuntimeError, where: str) -> CommunicationError:
        """Who is to blame. The group is dropped at once, so that whoever waits for this member learns of it."""
        culprit, reason = self.ranks[peer], _reason(error, self.deadline_s)
        try:
            if self._store.check([f"gave up/{peer}"]):
                culprit, reason = int(self._store.get(f"gave up/{peer}")), f"rank {culprit} has given up on it"
            self._store.set(f"gave up/{self.rank}", str(culprit))
        except RuntimeError as unreachable:  # the store may have been lost with the peer that kept it
            error.add_note(f"and the store cannot be asked: {unreachable}")
        self.close()
        return CommunicationError(self.ranks[self.rank], culprit, where, reason)

    # -- sub-worlds -------------------------------------------------------------------------------------------------
    def subgroup(self, members: Sequence[int]) -> Transport:
        chosen = tuple(members)
        name = f"{'-'.join(map(str, chosen))}/{self._subgroups[chosen]}"
        self._subgroups[chosen] += 1
        ranks = [self.ranks[i] for i in chosen]
        store = PrefixStore(name, self._store)
        return GlooTransport(store, ranks, chosen.index(self.rank), self.deadline_s, self._host)

    def close(self) -> None:
        self._sent.clear()
        self.under_way.clear()
        for posted in self._posted:
            posted.drop()
        self._group = None


class _GlooExchange(Exchange):
    """Rows to every member and from every member, under way."""

    def __init__(
        self, transport: GlooTransport, parts: Sequence[Tensor], counts: Sequence[int] | None, tag: int, where: str
    ) -> None:
        super().__init__(transport.under_way)
        self.transport, self.where, self.tag, self.mine = transport, where, tag, parts[transport.rank]
        # Starting with the next rank spreads the load: not everybody sends to member 0 first.
        self.peers = [(transport.rank + i) % transport.size for i in range(1, transport.size)]
        self.sends: list[_Posted] = []
        self.recvs: list[_Posted] = []
        self.rows_RW: Tensor | None = None
        self.counts = torch.tensor([len(part) for part in parts] if counts is None else counts)
        if counts is None:
            self._start_counts()
        for peer in self.peers:
            if len(parts[peer]):
                self.sends.append(transport.post_send(parts[peer], peer, tag + 1, where))
        if counts is not None:
            self._start_rows()

    def _start_counts(self) -> None:
        sent, self.counts = self.counts, torch.full_like(self.counts, len(self.mine))
        for peer in self.peers:
            self.sends.append(self.transport.post_send(sent[peer : peer + 1], peer, self.tag, self.where))
            self.recvs.append(self.transport.post_recv(self.counts[peer : peer + 1], peer, self.tag, self.where))

    def _start_rows(self) -> None:
        counts = self.counts.tolist()
        rows_RW = self.rows_RW = self.mine.new_empty(sum(counts), *self.mine.shape[1:])
        parts = rows_RW.split(counts)
        parts[self.transport.rank].copy_(self.mine)
        self.recvs = [
            self.transport.post_recv(parts[peer], peer, self.tag + 1, self.where) for peer in self.peers if counts[peer]
        ]

    def receive(self) -> tuple[Tensor, list[int]]:
        if self.rows_RW is None:
            self.transport.finish(self.recvs, self.where)
            self._start_rows()
        self.transport.finish(self.recvs + self.sends, self.where)
        assert self.rows_RW is not None
        return self.rows_RW, self.counts.tolist()


def _reason(error: RuntimeError, deadline_s: float) -> str:
    """gloo's message in our words; its text stays in the chain of exceptions."""
    late = "timed out" in str(error).lower()
    return f"no answer within {deadline_s:g} s" if late else "the connection broke"
