"""Sums and gathers of decode by kernels over the peers' memory; everything else by the transport beneath.

Shape legend: T tokens, D model width, C rows, V columns of all members, v of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from soloist.kernels.collective import all_reduce_kernel, gather_kernel
from soloist.kernels.flags import LINE_BYTES
from soloist.kernels.follow import early
from soloist.transport.base import Pending, Transport
from soloist.transport.symmetric import Watch, Window

PROGRAMS = 128  # all of them can run at once on an H100's 132 SMs
ROOM = 1 << 16  # bytes of a program's channel from one peer
CHUNK = 4096  # columns of a gather that a program moves at a time
WIDEST = 16384  # elements of a row, which a program holds in registers
ONE_SHOT_BYTES = 4 << 20  # of a sum, sent by a member; above, the transport beneath is faster
GATHER_BYTES = 2 << 20  # of a gather, the same


class Channels:
    """The window of one group's collectives, and this member's counts of calls."""

    def __init__(self, window: Window) -> None:
        assert window.bytes_of[window.rank].numel() >= self.size(window.ranks)
        self.window, self.flags_at = window, 2 * PROGRAMS * window.ranks * ROOM
        lines = LINE_BYTES // 8
        self.flags = window.view(self.flags_at, (PROGRAMS * window.ranks, lines), torch.int64)
        self.calls = torch.zeros(PROGRAMS, lines, dtype=torch.int64, device=window.device)

    @staticmethod
    def size(ranks: int) -> int:
        """Bytes of a window for so many members."""
        return PROGRAMS * ranks * (2 * ROOM + LINE_BYTES)


class NvlinkTransport(Transport):
    """A transport whose small sums and gathers are kernels: one launch, no host, capturable, and bounded waits.

    A kernel that gives up on a peer leaves that in `watch`; whoever steps looks at it (World.check).
    """

    def __init__(self, beneath: Transport, channels: Channels, watch: Watch) -> None:
        super().__init__(beneath.ranks, beneath.rank, beneath.deadline_s, channels.window.device)
        self.beneath, self.channels, self.watch = beneath, channels, watch
        self.traffic = beneath.traffic
        self._firsts: dict[tuple[int, ...], Tensor] = {}

    # -- by kernels -------------------------------------------------------------------------------------------------
    def serves(self, x_TD: Tensor) -> bool:
        """Whether the kernel sums these rows, and faster than the transport beneath."""
        d_model = x_TD.shape[-1] if x_TD.dim() else 1
        rows = x_TD.numel() // max(d_model, 1)
        aligned = 0 < d_model <= WIDEST and d_model * x_TD.itemsize % 16 == 0 and x_TD.is_floating_point()
        fits = -(-rows // PROGRAMS) * d_model * x_TD.itemsize <= ROOM
        return aligned and fits and x_TD.nbytes * (self.size - 1) <= ONE_SHOT_BYTES

    def all_reduce(self, x_N: Tensor, where: str = "") -> Tensor:
        if not self.serves(x_N):
            return self.beneath.all_reduce(x_N, where)
        return self.start_sum(x_N, where)[0]

    def all_reduce_norm(
        self, part_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, where: str = ""
    ) -> tuple[Tensor, Tensor]:
        """residual + the sum over members, and its RMS norm times `weight_D`; for what `serves` says."""
        return self.start_sum(part_TD, where, residual_TD, weight_D, eps)

    def start_sum(
        self,
        part_TD: Tensor,
        where: str = "",
        residual_TD: Tensor | None = None,
        weight_D: Tensor | None = None,
        eps: float = 0.0,
        send: bool = True,
        receive: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """One launch, or one of its halves. The sum twice where there is no norm."""
        self.traffic.count_ring(self.rank, part_TD.nbytes, passes=2)
        part_TD = part_TD.contiguous()
        d_model = part_TD.shape[-1]
        tokens = part_TD.numel() // d_model
        sum_TD = torch.empty_like(part_TD)
        normed_TD = sum_TD if weight_D is None else torch.empty_like(part_TD)
        block = 1 << (d_model - 1).bit_length()
        if tokens:
            all_reduce_kernel[(min(PROGRAMS, tokens),)](
                part_TD, residual_TD, weight_D, sum_TD, normed_TD, *self._common(where), tokens, self.rank, eps, ROOM,
                0, self.channels.flags_at,
                D=d_model, BLOCK=block, BYTES=part_TD.itemsize, RANKS=self.size, RESIDUAL=residual_TD is not None,
                NORM=weight_D is not None, SEND=send, RECEIVE=receive, num_warps=max(1, min(16, block // 512)),
                **early(self.device),
            )  # fmt: skip
        return sum_TD, normed_TD

    def gather_columns(
        self, part_Cv: Tensor, widths: Sequence[int], where: str = "", out_CV: Tensor | None = None
    ) -> Tensor:
        """The members' columns side by side; `widths` are all members' v. In `out_CV`, if given."""
        if len(part_Cv) * max(widths) * part_Cv.itemsize * (self.size - 1) > GATHER_BYTES:
            return super().gather_columns(part_Cv, widths, where, out_CV)
        part_Cv = part_Cv.contiguous()
        out_CV = part_Cv.new_empty(len(part_Cv), sum(widths)) if out_CV is None else out_CV
        for rows in self.rounds(part_Cv, widths):
            self.start_gather(part_Cv[rows], out_CV[rows], widths, where)
        return out_CV

    def rounds(self, part_Cv: Tensor, widths: Sequence[int]) -> list[slice]:
        """The rows of a gather in parts that fit into the channels."""
        chunks = -(-max(widths) // CHUNK)
        each = max(1, PROGRAMS * (ROOM // (CHUNK * part_Cv.itemsize)) // chunks)
        return [slice(first, first + each) for first in range(0, len(part_Cv), each)]

    def start_gather(
        self, part_Cv: Tensor, out_CV: Tensor, widths: Sequence[int], where: str = "", send: bool = True,
        receive: bool = True,
    ) -> None:  # fmt: skip
        """One launch, or one of its halves."""
        self.traffic.count_ring(self.rank, part_Cv.itemsize * out_CV.numel())
        rows, chunks = len(part_Cv), -(-max(widths) // CHUNK)
        gather_kernel[(min(PROGRAMS, rows * chunks),)](
            part_Cv, out_CV, self._first_columns(tuple(widths)), *self._common(where), rows, sum(widths), self.rank,
            ROOM, 0, self.channels.flags_at,
            CHUNKS=chunks, BLOCK=CHUNK, BYTES=part_Cv.itemsize, RANKS=self.size, SEND=send, RECEIVE=receive,
            num_warps=8, **early(self.device),
        )  # fmt: skip

    def _common(self, where: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int]:
        channels, watch = self.channels, self.watch
        place = re.sub(r"^step \d+, ", "", where)  # a watch keeps what it has a number for
        return (
            channels.window.bases, channels.calls, channels.flags, watch.failed, watch.report, watch.number(place),
            watch.timeout_ns,
        )  # fmt: skip

    def _first_columns(self, widths: tuple[int, ...]) -> Tensor:
        """Made by the first call, before any capture."""
        if widths not in self._firsts:
            firsts = [sum(widths[:index]) for index in range(len(widths) + 1)]
            self._firsts[widths] = torch.tensor(firsts, dtype=torch.int32, device=self.device)
        return self._firsts[widths]

    # -- by the transport beneath -----------------------------------------------------------------------------------
    def start_rows(
        self, rows_RW: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int] | None = None, where: str = ""
    ) -> Pending[tuple[Tensor, list[int]]]:
        return self.beneath.start_rows(rows_RW, send_counts, recv_counts, where)

    def exchange_counts(self, counts_MC: Tensor, where: str = "") -> Tensor:
        return self.beneath.exchange_counts(counts_MC, where)

    def all_gather_rows(self, rows_RW: Tensor, counts: Sequence[int] | None = None, where: str = "") -> Tensor:
        return self.beneath.all_gather_rows(rows_RW, counts, where)

    def reduce_scatter_rows(self, rows_RW: Tensor, counts: Sequence[int], where: str = "") -> Tensor:
        return self.beneath.reduce_scatter_rows(rows_RW, counts, where)

    def barrier(self, where: str = "") -> None:
        self.beneath.barrier(where)

    def send(self, x_N: Tensor, peer: int, where: str = "") -> None:
        self.beneath.send(x_N, peer, where)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, peer: int, where: str = "") -> Tensor:
        return self.beneath.recv(shape, dtype, peer, where)

    def subgroup(self, members: Sequence[int]) -> Transport:
        return self.beneath.subgroup(members)

    def close(self) -> None:
        self.beneath.close()
