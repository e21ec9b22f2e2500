"""Ranks of one machine without GPUs: rows through memory that all of them map.

Shape legend: R rows, W elements of a row, N members, B bytes.

Each member has one slab in each of two lanes. To send, it copies its rows there in one piece, writes its counts beside
them and raises its flag; a receiver waits for all flags and copies its share out of every slab. Exchanges take the
lanes in turn: when a lane comes round again everybody has normally read it, so that an exchange costs one handshake.
What is larger than a slab goes in rounds, each with a handshake of its own; the counts tell everybody how many.

Point-to-point messages go through a ring that the sender makes for each peer when it first needs one, or a larger one.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Sequence
from itertools import accumulate
from struct import Struct

import numpy as np
import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store

from soloist.errors import ClusterError, CommunicationError
from soloist.transport.base import Transport
from soloist.transport.exchange import Exchange, ExchangeTransport, row_bytes
from soloist.transport.shared_segment import (
    CLOSED,
    LANES,
    RING,
    Segment,
    Watch,
    join_segment,
    make_memory,
    open_memory,
    require_machine,
)

SLAB_BYTES = 4 << 20  # address space; memory is taken as it is first used
LETTER_BYTES = 64 << 10  # least room for a point-to-point message


class SharedMemoryTransport(ExchangeTransport):
    """One member of a group on one machine. `store` is the group's own: no two groups may share a prefix."""

    def __init__(
        self, store: Store, ranks: Sequence[int], rank: int, deadline_s: float = 60.0, slab_bytes: int = SLAB_BYTES
    ) -> None:
        super().__init__(tuple(ranks), rank, deadline_s)
        require_machine()
        self._store, self._slab_bytes, self.members = store, slab_bytes, range(self.size)
        self._segment = self._join()
        self._lanes = [_Lane(self._segment, lane) for lane in range(LANES)]
        self.under_way: deque[Exchange] = deque()
        self._started = 0
        self._outboxes: defaultdict[int, _Outbox] = defaultdict(_Outbox)
        self._inboxes: dict[tuple[int, int], memoryview] = {}
        self._subgroups: defaultdict[tuple[int, ...], int] = defaultdict(int)

    def _join(self) -> Segment:
        try:
            segment, fd = join_segment(self._store, self.rank, self.size, self._slab_bytes)
        except RuntimeError as error:  # of the store
            world_rank = self.ranks[self.rank]
            raise CommunicationError(world_rank, self.ranks[0], "connecting", "did not join the group") from error
        self._watch = Watch(segment, self.ranks, self.deadline_s)
        self._segment = segment
        try:
            self.wait_for(segment.pid_N, 1, self.members, "connecting")
        except CommunicationError:
            self._watch.close()
            raise
        finally:
            if fd is not None:
                os.close(fd)
        return segment

    # -- waiting ----------------------------------------------------------------------------------------------------
    def wait_for(self, flags: np.ndarray, target: int, peers: Sequence[int], where: str) -> None:
        """Returns when all flags have reached the target. Whoever gives up on a peer says so to the others."""
        if min(flags.tolist()) >= target:  # for some tens of flags quicker than numpy's
            return
        with self.traffic.waiting(self.rank) as wait:
            lost = self._watch.until(flags, target, peers)
            wait.last = self._watch.last
        if lost:
            culprit, reason = lost
            self._leave(1 + culprit)
            raise CommunicationError(self.ranks[self.rank], culprit, where, reason)

    def _leave(self, why: int) -> None:
        if not self._segment.left_N[self.rank]:
            self._segment.left_N[self.rank] = why

    # -- rows -------------------------------------------------------------------------------------------------------
    def _start(
        self, rows_RW: Tensor, send_counts: Sequence[int] | None, recv_counts: Sequence[int] | None, where: str
    ) -> _LaneExchange:
        if len(self.under_way) == LANES:
            self.under_way[0].wait()
        lane = self._lanes[self._started % LANES]
        self._started += 1
        return _LaneExchange(self, lane, rows_RW, send_counts, where)

    # -- point to point ---------------------------------------------------------------------------------------------
    def send(self, x_N: Tensor, peer: int, where: str = "") -> None:
        self.traffic.count_message(peer, x_N.nbytes)
        pair, segment = (self.rank, peer), self._segment
        number = int(segment.sent_NN[pair])
        self.wait_for(segment.taken_NN[self.rank, peer : peer + 1], number - RING + 1, (peer,), where)
        segment.letters_NN[pair][number % RING] = self._outboxes[peer].put(as_bytes(x_N.contiguous()), number % RING)
        segment.sent_NN[pair] = number + 1

    def recv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, where: str = "") -> Tensor:
        pair, segment = (peer, self.rank), self._segment
        number = int(segment.taken_NN[pair])
        self.wait_for(segment.sent_NN[peer, self.rank : self.rank + 1], number + 1, (peer,), where)
        fd, start, length = segment.letters_NN[pair][number % RING].tolist()
        message = torch.empty(*shape, dtype=dtype)
        assert message.nbytes == length, f"{length} bytes from rank {self.ranks[peer]}, {message.nbytes} were expected"
        as_bytes(message)[:] = self._inbox(peer, fd, where)[start : start + length]
        segment.taken_NN[pair] = number + 1
        return message

    def _inbox(self, peer: int, fd: int, where: str) -> memoryview:
        key = (peer, fd)
        if key not in self._inboxes:
            try:
                memory = open_memory(int(self._segment.pid_N[peer]), fd)
            except ClusterError:
                if not self._watch.has_left(peer):
                    raise
                memory = None
            if memory is None or self._segment.left_N[peer]:  # its descriptors may already mean something else
                raise CommunicationError(self.ranks[self.rank], self.ranks[peer], where, "has closed")
            self._inboxes[key] = memoryview(memory)
        return self._inboxes[key]

    # -- sub-worlds -------------------------------------------------------------------------------------------------
    def subgroup(self, members: Sequence[int]) -> Transport:
        chosen = tuple(members)
        store = PrefixStore(f"{'-'.join(map(str, chosen))}/{self._subgroups[chosen]}", self._store)
        self._subgroups[chosen] += 1
        ranks = [self.ranks[i] for i in chosen]
        return SharedMemoryTransport(store, ranks, chosen.index(self.rank), self.deadline_s, self._slab_bytes)

    def close(self) -> None:
        """Tell the others. The memory goes with the transport: peers may still read what was sent."""
        self._leave(CLOSED)
        self._watch.close()
        self.under_way.clear()
        self._inboxes.clear()
        for outbox in self._outboxes.values():
            outbox.close()


class _Lane:
    """A slab, a flag and a header of each member, used by one exchange at a time.

    `heads_N3N[source, :, target]`: rows from source to target, where they start among the source's rows, and how many
    rows the source sends in all.
    """

    def __init__(self, segment: Segment, lane: int) -> None:
        self.published_N, self.read_N = segment.published_LN[lane], segment.read_LN[lane]
        self.heads_N3N, self.head = segment.heads_LN3N[lane], Struct(f"{3 * len(segment.pid_N)}q")
        self.slabs, self.slab_bytes = segment.slabs(lane), segment.slab_bytes
        self.rounds = 0  # that went through this lane so far: every member arrives at the same number


class _LaneExchange(Exchange):
    """Rows to every member and from every member, under way in a lane. `send_counts = None`: all rows to all."""

    def __init__(
        self,
        transport: SharedMemoryTransport,
        lane: _Lane,
        rows_RW: Tensor,
        send_counts: Sequence[int] | None,
        where: str,
    ) -> None:
        super().__init__(transport.under_way)
        self.transport, self.lane, self.rows_RW, self.where = transport, lane, rows_RW, where
        self.width = row_bytes(rows_RW)
        self._wait_for(lane.read_N)
        self._write_head(send_counts)
        self._publish(0)

    def receive(self) -> tuple[Tensor, list[int]]:
        """Wait for everybody's rows and copy this member's share, round by round."""
        me, lane = self.transport.rank, self.lane
        self._wait_for(lane.published_N)
        heads = lane.heads_N3N[:, :, me].tolist()
        counts = [count for count, _, _ in heads]
        rows_RW = self.rows_RW.new_empty(sum(counts), *self.rows_RW.shape[1:])
        target = as_bytes(rows_RW)
        longest = self.width * max(total for _, _, total in heads)
        for first in range(0, max(longest, 1), lane.slab_bytes):
            if first:
                self._wait_for(lane.read_N)
                self._publish(first)
                self._wait_for(lane.published_N)
            self._copy(target, heads, first)
            lane.read_N[me] = lane.rounds
        return rows_RW, counts

    def _wait_for(self, flags_N: np.ndarray) -> None:
        self.transport.wait_for(flags_N, self.lane.rounds, self.transport.members, self.where)

    def _write_head(self, send_counts: Sequence[int] | None) -> None:
        size, total = self.transport.size, len(self.rows_RW)
        counts = [total] * size if send_counts is None else send_counts
        starts = [0] * size if send_counts is None else list(accumulate(send_counts[:-1], initial=0))
        self.lane.head.pack_into(self.lane.heads_N3N[self.transport.rank], 0, *counts, *starts, *[total] * size)

    def _publish(self, first: int) -> None:
        """Put a slab's worth of this member's bytes, from `first` on, into the lane, then raise the flag."""
        me, lane = self.transport.rank, self.lane
        chunk = as_bytes(self.rows_RW)[first : first + lane.slab_bytes]
        start = me * lane.slab_bytes
        lane.slabs[start : start + len(chunk)] = chunk
        lane.rounds += 1
        lane.published_N[me] = lane.rounds

    def _copy(self, target: memoryview, heads: list[list[int]], first: int) -> None:
        """From every slab, which holds its source's bytes from `first` on, to where they belong in the result."""
        slab_bytes, slabs, width = self.lane.slab_bytes, self.lane.slabs, self.width
        slab, position = -first, 0
        for count, start, _ in heads:
            low, high = max(start * width, first), min((start + count) * width, first + slab_bytes)
            if low < high:
                to = position + low - start * width
                target[to : to + high - low] = slabs[slab + low : slab + high]
            slab += slab_bytes
            position += count * width


class _Outbox:
    """Messages from this member to one peer: a ring in memory of its own, replaced by a larger one when needed."""

    def __init__(self) -> None:
        self.room = 0
        self.fds: list[int] = []  # older rings stay: the peer may not have read them
        self.ring = memoryview(b"")

    def put(self, message: memoryview, slot: int) -> tuple[int, int, int]:
        """Where the peer finds it: descriptor, offset, bytes."""
        if not self.fds or len(message) > self.room:
            self._grow(len(message))
        start = slot * self.room
        self.ring[start : start + len(message)] = message
        return self.fds[-1], start, len(message)

    def _grow(self, least: int) -> None:
        self.room = max(LETTER_BYTES, 1 << (least - 1).bit_length() if least else 0)
        fd, memory = make_memory(RING * self.room)
        self.fds.append(fd)
        self.ring = memoryview(memory)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()


def as_bytes(x_N: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if not x_N.numel():
        return memoryview(bytearray())  # writable: an idle rank receives such a message
    if x_N.itemsize < 4 and x_N.is_floating_point():  # numpy does not know all of these
        x_N = x_N.view(torch.int8 if x_N.itemsize == 1 else torch.int16)
    return x_N.numpy().data.cast("B")
