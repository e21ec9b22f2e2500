"""The memory of one exchange under way: what peers write, what the index kernel makes of it, flags and the call count.

Shape legend: R rows (`ranks · capacity`), D model width, K top-k, X expanded rows (R · most), S local slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from soloist.errors import CapacityError
from soloist.kernels.flags import LINE_BYTES, PHASES
from soloist.transport.symmetric import Window

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class ExchangeShape:
    """What is exchanged. `capacity` is the most tokens that a rank brings to one call, equal on all ranks."""

    ranks: int
    tp: int  # ranks of an expert group, each holding a share of its slots
    slots: int  # of this rank's group
    top_k: int
    d_model: int
    capacity: int
    dtype: torch.dtype
    fp8: bool = False  # rows travel to the experts in fp8 with a scale each

    @property
    def groups(self) -> int:
        return self.ranks // self.tp

    @property
    def rows(self) -> int:
        return self.ranks * self.capacity

    @property
    def most(self) -> int:
        """Slots of one group that a row can have chosen."""
        return min(self.top_k, max(self.slots, 1))

    @property
    def row_dtype(self) -> torch.dtype:
        return FP8 if self.fp8 else self.dtype

    def order(self, rank: int) -> int:
        """Place of a rank's tokens among the rows: member of the group first, then group."""
        return (rank % self.tp) * self.groups + rank // self.tp

    def fit(self, tokens: int) -> ExchangeShape:
        """The same for calls of at most `tokens` tokens a rank, in the same memory."""
        if tokens > self.capacity:
            raise CapacityError(f"{tokens} tokens in a call, buffers hold {self.capacity}: send them in rounds")
        return replace(self, capacity=tokens)


class WindowPlan:
    """Where each part of a lane lies in its window: byte offsets, equal on all ranks."""

    def __init__(self, shape: ExchangeShape) -> None:
        self.size = 0
        row_K = shape.rows * shape.top_k * 4
        self.rows = self._take(shape.rows * shape.d_model * shape.row_dtype.itemsize)
        self.scales = self._take(shape.rows * 4)
        self.slots = self._take(row_K)
        self.weights = self._take(row_K)
        self.y = self._take(shape.rows * shape.d_model * shape.dtype.itemsize)
        self.home = self._take(shape.rows * shape.d_model * shape.dtype.itemsize)
        self.flags = self._take(len(PHASES) * shape.ranks * LINE_BYTES)

    def _take(self, size: int) -> int:
        at, self.size = self.size, self.size + -(-size // 256) * 256
        return at


class Lane:
    """One window and what belongs to it. Between a dispatch and the end of its combine nobody else may use it.

    Then its buffers need no further barrier: a rank sends into a lane again only after it got the rows of its last
    combine, which each peer sent after reading what came before; and it makes new rows only after it was sent tokens,
    which each peer sent after taking the old ones.
    """

    def __init__(self, window: Window, shape: ExchangeShape) -> None:
        self.window, self.at, self.busy = window, WindowPlan(shape), False
        assert window.bytes_of[window.rank].numel() >= self.at.size
        device = window.device
        self._rows = shape.rows
        self.slots_RK = window.view(self.at.slots, (shape.rows, shape.top_k), torch.int32)
        self.weights_RK = window.view(self.at.weights, (shape.rows, shape.top_k), torch.float32)
        self.flags = window.view(self.at.flags, (len(PHASES) * shape.ranks, LINE_BYTES // 8), torch.int64)
        self.calls = torch.zeros(len(PHASES), LINE_BYTES // 8, dtype=torch.int64, device=device)
        # Zeroed once: entries behind the last offset are rows of this lane, if not of a smaller call.
        self.row_X = torch.zeros(shape.rows * shape.most, dtype=torch.int64, device=device)
        self.weight_X = torch.zeros(shape.rows * shape.most, dtype=torch.float32, device=device)
        self.place_RK = torch.zeros(shape.rows * shape.top_k, dtype=torch.int32, device=device)
        self.offsets_S = torch.zeros(max(shape.slots, 1), dtype=torch.int32, device=device)

    def rows_RD(self, shape: ExchangeShape, rank: int | None = None) -> Tensor:
        return self.window.view(self.at.rows, (shape.rows, shape.d_model), shape.row_dtype, rank)

    def scale_R(self, shape: ExchangeShape, rank: int | None = None) -> Tensor:
        return self.window.view(self.at.scales, (shape.rows,), torch.float32, rank)

    def y_RD(self, shape: ExchangeShape) -> Tensor:
        return self.window.view(self.at.y, (shape.rows, shape.d_model), shape.dtype)

    def home_RD(self, shape: ExchangeShape, rank: int | None = None) -> Tensor:
        return self.window.view(self.at.home, (shape.rows, shape.d_model), shape.dtype, rank)
