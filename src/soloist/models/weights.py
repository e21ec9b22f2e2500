"""The seam between a decoder and whatever its weights come from.

`models/checkpoint.py` reads safetensors, `models/random_weights.py` makes weights up. Both give any rank exactly the
share that it asks for, so that the same model results under every layout.
"""

from __future__ import annotations

from typing import Protocol

from soloist.moe.reader import Reader, Span

__all__ = ["Span", "WeightSource"]


class WeightSource(Reader, Protocol):
    """Reads one weight, or a rectangle of it, in the engine's dtype on the engine's device.

    `rows` and `columns` are spans of the full logical shape (`specs/parameters.py`; linear weights are `[out, in]`,
    vectors have rows only), None for all. The result is contiguous and belongs to the caller. Raises CheckpointError
    for a weight that is missing, of a wrong shape, truncated or not finite.
    """

    bytes_read: int
