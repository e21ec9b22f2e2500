"""Numbers on their way between host and device, while the device goes on and the host waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soloist.errors import ClusterError

_POLL_S = 20e-6


def sent(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers, nested or not, as a tensor on the device.

    From page-locked memory: of any other the host would wait until the device has finished all that it was given.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostCopy:
    """Several tensors in one copy. They may be written again on the same stream at once."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._shapes = [part.shape for part in parts]
        self._numbers = torch.cat([part.flatten().double() for part in parts])
        self._event = None
        if self._numbers.is_cuda:
            host = torch.empty(self._numbers.shape, dtype=torch.float64, pin_memory=True)
            self._numbers = host.copy_(self._numbers, non_blocking=True)
            self._event = torch.cuda.current_stream().record_event()

    @property
    def is_here(self) -> bool:
        """`wait` would return at once."""
        return self._event is None or self._event.query()

    def wait(self, deadline_s: float = 60.0) -> list[Tensor]:
        """The tensors as doubles on the host. Raises ClusterError where the device does not come to it in time."""
        until = time.monotonic() + deadline_s
        while not self.is_here:
            if time.monotonic() > until:
                raise ClusterError(f"the GPU has not finished a step within {deadline_s:g} s")
            time.sleep(_POLL_S)
        pieces = self._numbers.split([shape.numel() for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]
