"""What the parts of an MoE layer ask of a source of weights (the decoder's `WeightSource` is one)."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

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


Fp8Form = Literal["row", "block"]  # what has a scale of its own: a row, or a block of 128 × 128


@runtime_checkable
class Fp8Reader(Protocol):
    """A reader that can also give weights in fp8 (e4m3) as they are stored."""

    def fp8_form(self, param: Param) -> Fp8Form | None:
        """How a weight's scales are kept; None where the weight is not in fp8, or can only be read as numbers."""
        ...

    def read_fp8(self, param: Param, rows: Span | None = None, columns: Span | None = None) -> tuple[Tensor, Tensor]:
        """Values and scales (fp32): `[rows]`, or `[rows / 128, columns / 128]` of spans that end where blocks do."""
        ...
