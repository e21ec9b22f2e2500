"""What the parts of an MoE layer ask of a source of weights (the decoder's `WeightSource` is one)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from soloist.specs.parameters import Param

Span = tuple[int, int]  # start, stop


class Reader(Protocol):
    """Reads one weight, or a rectangle of it; the result is contiguous and belongs to the caller."""

    dtype: torch.dtype
    device: torch.device

    @property
    def threads(self) -> int:
        """So many may call `read` at once."""
        ...

    def read(self, param: Param, rows: Span | None = None, columns: Span | None = None) -> Tensor: ...
