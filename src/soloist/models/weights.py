"""The seam between a decoder and whatever its weights come from.

`models/checkpoint.py` reads safetensors, `models/random_weights.py` makes weights up. Both give any rank exactly the
share that it asks for, so that the same model results under every layout.
"""

from __future__ import annotations

from typing import Protocol

import torch

from soloist.moe.reader import Reader, Span
from soloist.specs.parameters import Param

__all__ = ["Span", "WeightSource", "dtype_of"]


class WeightSource(Reader, Protocol):
    """Reads one weight, or a rectangle of it, in the engine's dtype on the engine's device.

    `rows` and `columns` are spans of the full logical shape (`specs/parameters.py`; linear weights are `[out, in]`,
    vectors have rows only), None for all. The result is contiguous and belongs to the caller. Raises CheckpointError
    for a weight that is missing, of a wrong shape, truncated or not finite. `correction_bias` is float32 whatever the
    dtype: it is added to scores that differ by less than bfloat16 resolves.
    """

    @property
    def bytes_read(self) -> int:
        """Bytes taken from files so far."""
        ...


def dtype_of(param: Param, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a source of `dtype` gives this weight."""
    return torch.float32 if param.name == "correction_bias" else dtype
