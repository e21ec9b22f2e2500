"""Rows over MPI, for clusters whose network speaks it best: Open MPI, MPICH and their kin through mpi4py.

Shape legend: R rows, W elements of a row, N elements of any shape.

A transfer of B bytes travels in messages of `message_bytes`, the last of which is shorter, perhaps empty; so a receiver
that does not know B asks the first message for its length, and no exchange of counts is needed. Every exchange has a
tag of its own. Waits test and sleep in turn, so that they end at the deadline and leave the core to others. A member
that closes or gives up on a peer sends the others a last message that says so. Where MPI takes no GPU memory, rows are
copied through pinned host memory.

A process that dies is noticed by its launcher, which ends the others (mpirun's default).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from soloist.errors import CommunicationError
from soloist.transport.base import Transport
from soloist.transport.exchange import Exchange, ExchangeTransport, parts_of, row_bytes
from soloist.transport.mpi_options import MpiOptions
from soloist.transport.mpi_process import MpiProcess, mpi_process

LEFT_TAG, MESSAGE_TAG, EXCHANGE_TAG = range(3)  # exchanges take EXCHANGE_TAG and TAGS - 1 tags after it in turn
TAGS = 1 << 14  # every MPI has twice as many
UNDER_WAY = 4  # messages to one peer before `send` waits
CLOSED = -1  # what a member says that has closed; otherwise the world rank that it has given up on
YIELD_S = 100e-6  # of a wait in which the core is only offered to others; then sleeps
SLEEP_S = (20e-6, 1e-3)  # shortest and longest sleep; between them a share of the time waited so far
SLEEP_SHARE = 0.02
CHECK_S = 0.02  # how often a wait looks whether the peers are still there


class MpiTransport(ExchangeTransport):
    """One member of an MPI communicator, which is its own."""

    def __init__(
        self,
        process: MpiProcess,
        communicator: Any,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        deadline_s: float = 60.0,
    ) -> None:
        super().__init__(tuple(ranks), rank, deadline_s, device)
        self.process, self.mpi, self.communicator = process, process.mpi, communicator
        self.under_way: deque[Exchange] = deque()
        self._started = 0
        self._sent: defaultdict[int, deque[_Outgoing]] = defaultdict(deque)
        self._left: dict[int, int] = {}  # member that has left: CLOSED or the world rank that it has given up on
        self._last = rank  # member that was waited for
        self._closed = False
        self._unfinished: set[Transfer] = set()

    @classmethod
    def world(
        cls, rank: int, size: int, device: torch.device, deadline_s: float, options: MpiOptions | None = None
    ) -> MpiTransport:
        """All ranks, in a communicator of their own. Raises ClusterError if MPI counts them otherwise."""
        process = mpi_process(options or MpiOptions())
        process.check_place(rank, size)
        with process.lock:
            communicator, request = process.mpi.COMM_WORLD.Idup()
        t = cls(process, communicator, range(size), rank, device, deadline_s)
        if not t.poll(request.Test):
            raise t.failure(None, "connecting", f"not all {size} ranks came within {deadline_s:g} s")
        return t

    # -- rows -------------------------------------------------------------------------------------------------------
    def _start(
        self, rows_RW: Tensor, send_counts: Sequence[int] | None, recv_counts: Sequence[int] | None, where: str
    ) -> _MpiExchange:
        tag = EXCHANGE_TAG + self._started % TAGS
        self._started += 1
        return _MpiExchange(self, rows_RW, send_counts, recv_counts, tag, where)

    # -- point to point ---------------------------------------------------------------------------------------------
    def send(self, x_N: Tensor, peer: int, where: str = "") -> None:
        self.traffic.count_message(peer, x_N.nbytes)
        sent = self._sent[peer]
        while len(sent) >= UNDER_WAY:
            self.finish([sent.popleft()], where)
        sent.append(self.post_send(self.stage_out(x_N, copy=True), peer, MESSAGE_TAG))

    def recv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, where: str = "") -> Tensor:
        message = self.stage(shape, dtype, self.device)
        self.finish([self.post_recv(peer, MESSAGE_TAG, message, self.device)], where)
        return message.to(self.device)

    # -- host memory for what lies on a GPU -------------------------------------------------------------------------
    def stage(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory that MPI can receive into what shall go to `device`."""
        if device.type == "cpu" or self.process.gpu_aware:
            return torch.empty(*shape, dtype=dtype, device=device)
        return torch.empty(*shape, dtype=dtype, pin_memory=True)

    def stage_out(self, x_N: Tensor, copy: bool = False) -> Tensor:
        """`x_N` where MPI can read it, and complete there."""
        if x_N.is_cpu:
            return x_N.clone(memory_format=torch.contiguous_format) if copy else x_N.contiguous()
        staged = self.stage(x_N.shape, x_N.dtype, x_N.device)
        staged.copy_(x_N, non_blocking=True)
        torch.cuda.current_stream(x_N.device).synchronize()
        return staged

    # -- messages ---------------------------------------------------------------------------------------------------
    def post_send(self, tensor: Tensor, peer: int, tag: int) -> _Outgoing:
        with self.process.lock:
            return self._under_way(_Outgoing(self, tensor, peer, tag))

    def post_recv(self, peer: int, tag: int, into: Tensor | None, device: torch.device) -> _Incoming:
        """Into a tensor, or, where its length is not known, into memory of the device taken as messages come."""
        with self.process.lock:
            return self._under_way(_Incoming(self, into, peer, tag, device))

    def _under_way(self, message: Moving) -> Moving:
        assert not self._closed, "the transport is closed"
        self._unfinished.add(message)
        self.process.keep_moving(message)
        return message

    def finish(self, messages: Sequence[Transfer], where: str) -> None:
        """Wait until all have ended, for as long as one deadline in all."""
        left = list(messages)

        def ended() -> bool:
            if left:
                self._last = left[0].peer
            left[:] = [message for message in left if not message.advance()]
            return not left

        try:
            if not self.poll(ended, lambda: any(message.peer in self._left for message in left)):
                raise self._lost([message.peer for message in left], where)
        except self.mpi.Exception as error:
            raise self.failure(self.ranks[left[0].peer], where, f"MPI failed: {error}") from error
        self._unfinished.difference_update(messages)

    def poll(self, done: Callable[[], bool], hopeless: Callable[[], bool] = lambda: False) -> bool:
        """Wait until `done`, which calls MPI; False at the deadline, or when it is `hopeless`."""
        with self.process.lock:
            if done():
                return True
        start = time.perf_counter()
        waited = checked = 0.0
        with self.traffic.waiting(self._last) as wait:
            while waited < self.deadline_s:
                if waited < YIELD_S:
                    os.sched_yield()
                else:
                    time.sleep(min(max(SLEEP_S[0], waited * SLEEP_SHARE), SLEEP_S[1]))
                waited = time.perf_counter() - start
                with self.process.lock:
                    if waited > checked + CHECK_S:
                        checked = waited
                        self._read_last_words()
                    wait.last = self._last
                    # Only now: a peer may have sent everything just before it left.
                    if done():
                        return True
                    if hopeless():
                        return False
        return False

    # -- members that leave -----------------------------------------------------------------------------------------
    def _read_last_words(self) -> None:
        status = self.mpi.Status()
        while self.communicator.Iprobe(self.mpi.ANY_SOURCE, LEFT_TAG, status):
            word, source = bytearray(8), status.Get_source()
            self.communicator.Recv([word, self.mpi.BYTE], source, LEFT_TAG)
            self._left[source] = int.from_bytes(word, "little", signed=True)

    def _lost(self, peers: Sequence[int], where: str) -> CommunicationError:
        told = sorted((self._left[peer] == CLOSED, peer) for peer in peers if peer in self._left)
        if not told:
            first, *others = (self.ranks[peer] for peer in dict.fromkeys(peers))
            reason = f"no answer within {self.deadline_s:g} s" + (f", nor from ranks {others}" if others else "")
            return self.failure(first, where, reason)
        peer = told[0][1]
        if self._left[peer] == CLOSED:
            return self.failure(self.ranks[peer], where, "has closed")
        return self.failure(self._left[peer], where, f"rank {self.ranks[peer]} has given up on it")

    def failure(self, culprit: int | None, where: str, reason: str) -> CommunicationError:
        """The error; the others are told at once who is to blame."""
        self.process.failed = True
        self._leave(CLOSED if culprit is None else culprit)
        return CommunicationError(self.ranks[self.rank], culprit, where, reason)

    def _leave(self, word: int) -> None:
        if self._closed:
            return
        self._closed = True
        data = word.to_bytes(8, "little", signed=True)
        with self.process.lock:
            self.process.abandon(self._unfinished)
            peers = [peer for peer in range(self.size) if peer != self.rank and peer not in self._left]
            words = [self.communicator.Isend([data, self.mpi.BYTE], peer, LEFT_TAG) for peer in peers]
            self.process.keep([data, *words])

    # -- sub-worlds -------------------------------------------------------------------------------------------------
    def subgroup(self, members: Sequence[int]) -> Transport:
        """The making of a communicator cannot be bounded, so that all members first show that they are there."""
        chosen = tuple(members)
        peers = [peer for peer in chosen if peer != self.rank]
        hello = torch.zeros(1, dtype=torch.uint8)
        there: list[Transfer] = [self.post_recv(peer, MESSAGE_TAG, hello.clone(), hello.device) for peer in peers]
        self.finish(there + [self.post_send(hello, peer, MESSAGE_TAG) for peer in peers], "connecting")
        with self.process.lock:
            group = self.communicator.Get_group().Incl(list(chosen))
            communicator = self.communicator.Create_group(group)
        ranks = [self.ranks[i] for i in chosen]
        return MpiTransport(self.process, communicator, ranks, chosen.index(self.rank), self.device, self.deadline_s)

    def close(self) -> None:
        self._leave(CLOSED)
        self.under_way.clear()
        self._sent.clear()
        self._unfinished.clear()


class _Outgoing:
    """A transfer to a peer, under way. The tensor must not be written meanwhile."""

    def __init__(self, t: MpiTransport, tensor: Tensor, peer: int, tag: int) -> None:
        self.peer, self.tensor, self._test = peer, tensor, t.mpi.Request.Testall
        self._requests = [t.communicator.Isend([piece, t.mpi.BYTE], peer, tag) for piece in _pieces(t, tensor)]

    def advance(self) -> bool:
        return self._test(self._requests)


class _Incoming:
    """A transfer from a peer, under way: into `tensor`, or, where that is None, into pieces of `data` on `device`."""

    def __init__(self, t: MpiTransport, tensor: Tensor | None, peer: int, tag: int, device: torch.device) -> None:
        self.t, self.peer, self.tag, self.tensor, self.device = t, peer, tag, tensor, device
        self.data: list[Tensor] = []
        self._all_posted = tensor is not None
        pieces = [] if tensor is None else _pieces(t, tensor)
        self._requests = [t.communicator.Irecv([piece, t.mpi.BYTE], peer, tag) for piece in pieces]

    def advance(self) -> bool:
        while not self._all_posted and (found := self._next()):
            self._requests.append(found)
        return self._all_posted and self.t.mpi.Request.Testall(self._requests)

    def _next(self) -> Any:
        """The receipt of the next message that has come, None if there is none yet."""
        mpi, status = self.t.mpi, self.t.mpi.Status()
        message = self.t.communicator.Improbe(self.peer, self.tag, status)
        if message is None:
            return None
        count = status.Get_count(mpi.BYTE)
        self._all_posted = count < self.t.process.options.message_bytes
        self.data.append(self.t.stage((count,), torch.uint8, self.device))
        return message.Irecv([_memory(mpi, self.data[-1].data_ptr(), count), mpi.BYTE])


class _MpiExchange(Exchange):
    """Rows to every member and from every member, under way. `send_counts = None`: all rows to all."""

    def __init__(
        self,
        t: MpiTransport,
        rows_RW: Tensor,
        send_counts: Sequence[int] | None,
        counts: Sequence[int] | None,
        tag: int,
        where: str,
    ) -> None:
        super().__init__(t.under_way)
        self.t, self.where, self.device, self.counts = t, where, rows_RW.device, counts
        parts = parts_of(t.stage_out(rows_RW), send_counts, t.size)
        self.mine = parts[t.rank]
        # Starting with the next rank spreads the load: not everybody sends to member 0 first.
        peers = [(t.rank + i) % t.size for i in range(1, t.size)]
        self.rows_RW: Tensor | None = None
        into: Sequence[Tensor | None] = [None] * t.size
        if counts is not None:
            self.rows_RW = t.stage((sum(counts), *rows_RW.shape[1:]), rows_RW.dtype, rows_RW.device)
            into = self.rows_RW.split(list(counts))
            self.rows_RW.split(list(counts))[t.rank].copy_(self.mine)
        self.recvs = {peer: t.post_recv(peer, tag, into[peer], rows_RW.device) for peer in peers}
        self.sends = [t.post_send(parts[peer], peer, tag) for peer in peers]

    def receive(self) -> tuple[Tensor, list[int]]:
        self.t.finish([*self.recvs.values(), *self.sends], self.where)
        if self.rows_RW is not None and self.counts is not None:
            return self.rows_RW.to(self.device), list(self.counts)
        assert row_bytes(self.mine), "rows without elements cannot be counted by their bytes"
        own = [self.mine.reshape(-1).view(torch.uint8)]
        pieces = [self.recvs[peer].data if peer in self.recvs else own for peer in range(self.t.size)]
        counts = [sum(map(len, part)) // row_bytes(self.mine) for part in pieces]
        data = torch.cat([piece for part in pieces for piece in part])
        return data.view(self.mine.dtype).view(-1, *self.mine.shape[1:]).to(self.device), counts


def _pieces(t: MpiTransport, tensor: Tensor) -> list[Any]:
    """The memory of a transfer, cut into messages; only the last is shorter than `message_bytes`."""
    assert tensor.is_contiguous()
    most, start, size = t.process.options.message_bytes, tensor.data_ptr(), tensor.nbytes
    return [_memory(t.mpi, start + done, min(most, size - done)) for done in range(0, size + 1, most)]


def _memory(mpi: Any, address: int, size: int) -> Any:
    return mpi.buffer.fromaddress(address, size) if size else bytearray()


Transfer = _Outgoing | _Incoming
Moving = TypeVar("Moving", _Outgoing, _Incoming)
