"""Rows over NCCL: ranks on GPUs of one host or many.

Shape legend: R rows, W elements of a row, N elements of any shape, M members,
C numbers to each of them.

The group is built on a given store and is never the default group. Results are ordered on the current stream: `wait`
makes that stream wait, not the host. The host waits in two places only: for the counts of rows where the caller does
not know them (once for each call), and in `barrier`. With counts given a collective can be captured in a CUDA graph.

Who waits for the stream elsewhere must bound that wait itself; NCCL's watchdog aborts the group some time after the
deadline, so that the device is free again, and later calls raise. NCCL does not know who kept it waiting: those who
waited say so in the store, and who does not is named.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, Store
from torch.distributed.distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    AllToAllOptions,
    ReduceScatterOptions,
)

from soloist.errors import CommunicationError
from soloist.transport.base import Pending, Transport
from soloist.transport.exchange import row_bytes

UNDER_WAY = 4  # messages whose tensors are kept without asking whether they have arrived
ROLL_CALL_S = 2.0  # for others to say that they waited too
CLEAN_UP_ONLY = "2"  # TORCH_NCCL_ASYNC_ERROR_HANDLING: abort the communicator, do not end the process


@dataclass(frozen=True)
class _Rows:
    """An exchange under way; it keeps the tensors until the current stream is ordered behind it."""

    work: Any
    sent_RW: Tensor
    received_RW: Tensor
    counts: list[int]

    def wait(self) -> tuple[Tensor, list[int]]:
        self.work.wait()
        return self.received_RW, self.counts


class NcclTransport(Transport):
    """One member of an NCCL group. `store` is the group's own: no two groups may share a prefix.

    All tensors live on `device`. Reductions have NCCL's own order: within rounding of the defined one, equal in every
    bit on all members. The first message between two members makes a communicator for the pair: there the host of
    whoever comes first waits for the other one.
    """

    def __init__(
        self, store: Store, ranks: Sequence[int], rank: int, device: torch.device, deadline_s: float = 60.0
    ) -> None:
        super().__init__(tuple(ranks), rank, deadline_s, device)
        self._store = store
        self._roll_call("present", "connecting")
        self._group: Any = self._build("rows")
        self._run(self._group.eager_connect_single_device, device, where="connecting")
        self._pairs: Any = None  # a second group: one that is connected eagerly would use one stream for all peers
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._counts: dict[int, _Counts] = {}
        self._subgroups: defaultdict[tuple[int, ...], int] = defaultdict(int)
        self._parts: list[Transport] = []

    def _build(self, name: str) -> Any:
        from torch.distributed import ProcessGroupNCCL  # absent from builds without CUDA

        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", CLEAN_UP_ONLY)
        options = ProcessGroupNCCL.Options()
        # Later than our own deadline: an aborted exchange looks like one that has ended.
        options._timeout = timedelta(seconds=2 * self.deadline_s + ROLL_CALL_S)
        return ProcessGroupNCCL(PrefixStore(name, self._store), self.rank, self.size, options)

    # -- rows -------------------------------------------------------------------------------------------------------
    def start_rows(
        self, rows_RW: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None, where: str = ""
    ) -> Pending[tuple[Tensor, list[int]]]:
        assert sum(send_counts) == len(rows_RW), f"counts {send_counts} for {len(rows_RW)} rows"
        self.traffic.count_rows(self.rank, send_counts, row_bytes(rows_RW))
        received = self._counts_for(send_counts, where) if recv_counts is None else list(recv_counts)
        received_RW = rows_RW.new_empty(sum(received), *rows_RW.shape[1:])
        options = AllToAllOptions()
        options.asyncOp = True  # on NCCL's own stream, so that the current one goes on
        work = self._run(
            self._group.alltoall_base, received_RW, rows_RW, received, list(send_counts), options, where=where
        )
        return _Rows(work, rows_RW, received_RW, received)

    def exchange_counts(self, counts_MC: Tensor, where: str = "") -> Tensor:
        """On a stream of its own: it need not wait for whatever computes the rows."""
        width = counts_MC.shape[1]
        if width not in self._counts:
            self._counts[width] = _Counts((self.size, width), self.device)
        counts = self._counts[width]
        with torch.cuda.stream(counts.stream):
            counts.load(counts_MC)
            self._run(self._group.alltoall_base, counts.received_MC, counts.sent_MC, [], [], where=where).wait()
            event = counts.fetch()
        self._wait_for(event, where)
        received_MC = counts.host_received_MC.clone()
        if received_MC.min() < 0:  # NCCL's watchdog has ended the exchange
            raise self._broken("the connection broke", where)
        return received_MC

    def _counts_for(self, send_counts: Sequence[int], where: str) -> list[int]:
        """One number to and from every member."""
        return self.exchange_counts(torch.tensor(send_counts)[:, None], where).flatten().tolist()

    # -- collectives ------------------------------------------------------------------------------------------------
    def all_reduce(self, x_N: Tensor, where: str = "") -> Tensor:
        self.traffic.count_ring(self.rank, x_N.nbytes, passes=2)
        x_N = x_N.contiguous()
        self._run(self._group.allreduce, [x_N], AllreduceOptions(), where=where).wait()
        return x_N

    def all_gather_rows(self, rows_RW: Tensor, counts: Sequence[int] | None = None, where: str = "") -> Tensor:
        counts = self._counts_for([len(rows_RW)] * self.size, where) if counts is None else list(counts)
        self.traffic.count_ring(self.rank, sum(counts) * row_bytes(rows_RW))
        most = max(counts)
        if not most:
            return rows_RW
        mine_RW = _padded(rows_RW, most)
        gathered_RW = rows_RW.new_empty(self.size * most, *rows_RW.shape[1:])
        self._run(self._group._allgather_base, gathered_RW, mine_RW, AllgatherOptions(), where=where).wait()
        if min(counts) == most:
            return gathered_RW
        return torch.cat([part[:count] for part, count in zip(gathered_RW.split(most), counts, strict=True)])

    def reduce_scatter_rows(self, rows_RW: Tensor, counts: Sequence[int], where: str = "") -> Tensor:
        self.traffic.count_ring(self.rank, rows_RW.nbytes)
        most = max(counts)
        if not most:
            return rows_RW
        if min(counts) < most:
            rows_RW = torch.cat([_padded(part, most) for part in rows_RW.split(list(counts))])
        mine_RW = rows_RW.new_empty(most, *rows_RW.shape[1:])
        options = ReduceScatterOptions()
        self._run(self._group._reduce_scatter_base, mine_RW, rows_RW.contiguous(), options, where=where).wait()
        return mine_RW[: counts[self.rank]]

    def barrier(self, where: str = "") -> None:
        self._counts_for([0] * self.size, where)

    # -- point to point ---------------------------------------------------------------------------------------------
    def send(self, x_N: Tensor, peer: int, where: str = "") -> None:
        """Nothing goes where there is nothing to send; the receiver knows."""
        if not x_N.numel():
            return
        self.traffic.count_message(peer, x_N.nbytes)
        copy_N = x_N.clone(memory_format=torch.contiguous_format)
        self._sent.append((self._run(self._pair_group().send, [copy_N], peer, 0, where=where), copy_N))
        while len(self._sent) > UNDER_WAY:
            self._sent.popleft()[0].wait()

    def recv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, where: str = "") -> Tensor:
        message_N = torch.empty(*shape, dtype=dtype, device=self.device)
        if not message_N.numel():
            return message_N
        self._run(self._pair_group().recv, [message_N], peer, 0, where=where).wait()
        return message_N

    def _pair_group(self) -> Any:
        if self._pairs is None:
            self._pairs = self._build("pairs")
        return self._pairs

    # -- failures ---------------------------------------------------------------------------------------------------
    def _run(self, call: Callable[..., Any], *args: Any, where: str) -> Any:
        try:
            return call(*args)
        except RuntimeError as error:
            raise self._failure(None, f"NCCL failed: {error}", where) from error

    def _wait_for(self, event: torch.cuda.Event, where: str) -> None:
        """The host waits, as long as one deadline."""
        until = time.monotonic() + self.deadline_s
        with self.traffic.waiting(self.rank):
            while not event.query():
                if time.monotonic() > until:
                    raise self._broken(f"no answer within {self.deadline_s:g} s", where)
                time.sleep(20e-6)

    def _broken(self, reason: str, where: str) -> CommunicationError:
        missing = self._absent("waited", min(ROLL_CALL_S, self.deadline_s))
        self._group.abort()
        return self._failure(missing, reason, where)

    def _roll_call(self, name: str, where: str) -> None:
        """Building a communicator cannot be bounded, so nobody begins before all are there."""
        missing = self._absent(name, self.deadline_s)
        if missing is not None:
            raise self._failure(missing, f"did not join within {self.deadline_s:g} s", where)

    def _absent(self, name: str, grace_s: float) -> int | None:
        """Say in the store that this member is there; the first one that has not said so when the time is up."""
        keys = [f"{name}/{member}" for member in range(self.size)]
        until = time.monotonic() + grace_s
        self._store.set(keys[self.rank], "")
        while missing := [member for member, key in enumerate(keys) if not self._store.check([key])]:
            if time.monotonic() > until:
                return missing[0]
            time.sleep(0.01)
        return None

    def _failure(self, peer: int | None, reason: str, where: str) -> CommunicationError:
        return CommunicationError(self.ranks[self.rank], None if peer is None else self.ranks[peer], where, reason)

    # -- sub-worlds -------------------------------------------------------------------------------------------------
    def subgroup(self, members: Sequence[int]) -> Transport:
        chosen = tuple(members)
        store = PrefixStore(f"{'-'.join(map(str, chosen))}/{self._subgroups[chosen]}", self._store)
        self._subgroups[chosen] += 1
        ranks = [self.ranks[i] for i in chosen]
        self._parts.append(NcclTransport(store, ranks, chosen.index(self.rank), self.device, self.deadline_s))
        return self._parts[-1]

    def close(self) -> None:
        """Abort rather than shut down: a shutdown would wait for what is under way. Subgroups are closed, too: one that
        is only forgotten would be shut down."""
        for part in self._parts:
            part.close()
        self._sent.clear()
        for group in (self._group, self._pairs):
            if group is not None:
                group.abort()
        self._group = self._pairs = None


class _Counts:
    """Buffers for some numbers to and from every member. The host waits for each exchange, so one set is enough."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.sent_MC, self.received_MC = torch.zeros(2, *shape, dtype=torch.int64, device=device)
        self.host_sent_MC, self.host_received_MC = torch.zeros(2, *shape, dtype=torch.int64).pin_memory()
        self.stream.wait_stream(torch.cuda.current_stream(device))

    def load(self, counts_MC: Tensor) -> None:
        self.host_sent_MC.copy_(counts_MC)
        self.received_MC.fill_(-1)
        self.sent_MC.copy_(self.host_sent_MC, non_blocking=True)

    def fetch(self) -> torch.cuda.Event:
        self.host_received_MC.copy_(self.received_MC, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self.stream)
        return event


def _padded(rows_RW: Tensor, count: int) -> Tensor:
    """Contiguous rows, `count` of them, the additional ones zero."""
    if len(rows_RW) == count:
        return rows_RW.contiguous()
    return torch.cat([rows_RW, rows_RW.new_zeros(count - len(rows_RW), *rows_RW.shape[1:])])
