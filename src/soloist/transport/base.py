"""The seam between ranks: rows to every peer, reductions, point to point; every wait bounded.

Shape legend: R rows, W elements of a row, N elements of any shape.

One conformance suite (`tests/transport/test_conformance.py`) runs over every implementation. All collectives are called
by all ranks of the transport in the same order. Where two implementations could round differently, the order is
defined here: sums are taken in fp32 (fp64 for fp64, integers in their own type) in order of rank and rounded once to
the input's dtype. NCCL alone is excepted: its reductions have their own order, and agree within rounding.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", covariant=True)


class Pending(Protocol[Result]):
    """Something under way. `wait` is called exactly once; until then the tensors given must not be written."""

    def wait(self) -> Result: ...


@dataclass
class Wait:
    """Under way; `last` is the member that it is laid to."""

    last: int


@dataclass
class Traffic:
    """What a transport moved: filled by the transport, read and reset by whoever reports.

    `bytes_to[peer]` counts payload bytes by destination, its own rank left out. For reductions and gathers it counts
    what the usual ring would send, whatever the implementation does: (n − 1)/n of the tensor for a reduce-scatter or an
    all-gather, twice that for an all-reduce, all of it to the next rank.

    `waited_for_s[peer]`: seconds in which this rank had nothing to do but wait, by the member that came last. Where
    members are waited for one after the other (gloo, threads) each has those in which it was its turn. The own entry
    holds what cannot be told apart: NCCL does not say whom it waits for. What kernels wait for on a GPU is not seen.
    """

    bytes_to: list[int]
    waited_for_s: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.waited_for_s = [0.0] * len(self.bytes_to)

    @property
    def waited_s(self) -> float:
        """For whomever."""
        return sum(self.waited_for_s)

    def count_rows(self, rank: int, counts: Sequence[int], row_bytes: int) -> None:
        """Rows that `rank` sends: `counts[p]` to member p."""
        own = self.bytes_to[rank]
        self.bytes_to[:] = [moved + count * row_bytes for moved, count in zip(self.bytes_to, counts, strict=True)]
        self.bytes_to[rank] = own

    def count_message(self, peer: int, message_bytes: int) -> None:
        self.bytes_to[peer] += message_bytes

    def count_ring(self, rank: int, total_bytes: int, passes: int = 1) -> None:
        """A gather or reduction of `total_bytes` in which the ring goes round `passes` times."""
        size = len(self.bytes_to)
        self.bytes_to[(rank + 1) % size] += passes * total_bytes * (size - 1) // size

    def reset(self) -> None:
        self.bytes_to[:] = [0] * len(self.bytes_to)
        self.waited_for_s[:] = [0.0] * len(self.bytes_to)

    @contextmanager
    def waiting(self, peer: int) -> Iterator[Wait]:
        """Adds the time inside to what was waited for `peer`, or for whom else the block finds to come last."""
        wait, start = Wait(peer), time.perf_counter()
        try:
            yield wait
        finally:
            self.waited_for_s[wait.last] += time.perf_counter() - start


@dataclass
class Transport(ABC):
    """A set of ranks that can exchange tensors. `ranks[i]` is the world rank of member i; `rank` is this one's index.

    Every wait ends after `deadline_s` in a CommunicationError that names the world ranks of both sides and `where`,
    a text that the caller passes: for instance "layer 3, dispatch". After such an error the transport is broken: only
    `close` may be called. `close` never waits for a peer.
    """

    ranks: tuple[int, ...]
    rank: int
    deadline_s: float = 60.0
    device: torch.device = torch.device("cpu")  # where the tensors live
    traffic: Traffic = field(init=False)

    def __post_init__(self) -> None:
        self.traffic = Traffic([0] * self.size)

    @property
    def size(self) -> int:
        return len(self.ranks)

    # -- rows -------------------------------------------------------------------------------------------------------
    @abstractmethod
    def start_rows(
        self, rows_RW: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None, where: str = ""
    ) -> Pending[tuple[Tensor, list[int]]]:
        """Send `rows_RW[sum(send_counts[:p]) :][: send_counts[p]]` to every member p, this one included.

        rows_RW: contiguous, any dtype, W equal on all ranks, R = sum(send_counts). `recv_counts`, where the caller
        knows them, saves an exchange of counts on some transports. The result is the rows received, in order of
        source, and their counts; the tensor belongs to the caller.
        """

    def all_to_all_rows(
        self, rows_RW: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None, where: str = ""
    ) -> tuple[Tensor, list[int]]:
        """`start_rows`, awaited."""
        return self.start_rows(rows_RW, send_counts, recv_counts, where).wait()

    @abstractmethod
    def exchange_counts(self, counts_MC: Tensor, where: str = "") -> Tensor:
        """Row p of `counts_MC` to member p; returns one row from each, in order of source.

        For numbers that the host needs to post the receives of several exchanges: int64 on the CPU, C equal on all
        ranks. They are no payload, so `traffic` leaves them out.
        """

    # -- collectives ------------------------------------------------------------------------------------------------
    @abstractmethod
    def all_reduce(self, x_N: Tensor, where: str = "") -> Tensor:
        """The sum over all ranks, equal in every bit on all of them. Returns a new tensor or `x_N`, overwritten."""

    @abstractmethod
    def all_gather_rows(self, rows_RW: Tensor, counts: Sequence[int] | None = None, where: str = "") -> Tensor:
        """Everybody's rows, in order of rank. R may differ between ranks; `counts` gives it for all where known."""

    @abstractmethod
    def reduce_scatter_rows(self, rows_RW: Tensor, counts: Sequence[int], where: str = "") -> Tensor:
        """The sum over ranks of this rank's part: `counts[p]` rows go to p, R = sum(counts) on every rank."""

    def gather_columns(
        self, part_Cv: Tensor, widths: Sequence[int], where: str = "", out_CV: Tensor | None = None
    ) -> Tensor:
        """The members' columns side by side, `widths[p]` of member p; C equal on all ranks. In `out_CV`, if given."""
        rows, counts = len(part_Cv), [len(part_Cv) * width for width in widths]
        parts = self.all_gather_rows(part_Cv.reshape(-1, 1), counts, where).split(counts)
        return torch.cat([part.view(rows, width) for part, width in zip(parts, widths, strict=True)], 1, out=out_CV)

    @abstractmethod
    def barrier(self, where: str = "") -> None:
        """Returns when all ranks have called it."""

    # -- point to point ---------------------------------------------------------------------------------------------
    @abstractmethod
    def send(self, x_N: Tensor, peer: int, where: str = "") -> None:
        """Send to member `peer`. May return before it is received; `x_N` may be written again on return.

        At least two messages to the same peer can be on their way before `send` waits for the receiver.
        """

    @abstractmethod
    def recv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, where: str = "") -> Tensor:
        """The next message of member `peer`; sender and receiver agree on shape and dtype."""

    # -- sub-worlds -------------------------------------------------------------------------------------------------
    @abstractmethod
    def subgroup(self, members: Sequence[int]) -> Transport:
        """A transport of some members (ascending indices into this one), called by exactly those, in the same order."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent; waits for nobody, so what peers have not yet received may be lost."""
