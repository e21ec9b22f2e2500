"""How a one-sided exchange is carried out, and the stream beside it.

    form       dispatch                                       combine
    latency    one kernel: choices and rows, flag             weighted rows straight home, flag; sum
    push       choices, flag; rows by kernel beside the       rows stay, flag; the sum reads them from the peers
               index, flag                                    (from expanded rows: as in the latency form)
    copy       the same, whole blocks by copy engine          the same; or whole blocks home by copy engine

The copy form sends tokens to groups that they did not choose as well, without using an SM: it pays where most tokens go
to most groups. In both larger forms rows may travel in pieces, each with its flag: the first ones are expanded while
the last ones travel.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from soloist.dispatch.lane import ExchangeShape
from soloist.kernels.language import next_power

STREAMING = 256  # elements a warp: many small programs, where a kernel is bound by this GPU's own memory


@dataclass(frozen=True)
class Form:
    """How a call is carried out. What only moves or sums tokens takes at most as many SMs as `programs`."""

    name: str  # latency, push, copy
    programs: int = 528
    block: int = 8192  # elements of a row that a program moves at a time
    weigh_block: int = 2048  # the same for the weighted sum
    weigh_warp: int = STREAMING  # of them for each warp
    stages: int = 1  # of them that it loads ahead
    pull: bool = True  # push and copy forms: the sum reads from the peers instead of having blocks copied home
    pieces: int = 1  # of the rows, in the push and copy forms

    def chunks(self, d_model: int, whole: bool = False) -> tuple[int, int, int]:
        """BLOCK, CHUNKS and warps for rows of `d_model`; `whole` rows in one piece."""
        return cut(d_model, d_model if whole else self.block)


def cut(d_model: int, block: int, per_warp: int = 1024) -> tuple[int, int, int]:
    """BLOCK (a power of two), CHUNKS and warps for rows of `d_model` of which a program moves `block` at a time."""
    block = next_power(min(block, d_model))
    return block, -(-d_model // block), max(1, min(16, block // per_warp))


LATENCY = Form("latency", programs=1056, block=2048, weigh_warp=1024)
PUSH = Form("push", pieces=2)
COPY = Form("copy", pieces=2)
LATENCY_BYTES = 8 << 20  # of a rank's tokens: up to which one kernel a direction is faster


def choose_form(shape: ExchangeShape, sms: int = 0) -> Form:
    """By size, and by the share of groups that a token goes to under uniform routing. `sms`: a limit; 0: none."""
    visited = 1 - (1 - 1 / shape.groups) ** shape.top_k
    sent = shape.capacity * shape.d_model * shape.dtype.itemsize
    form = LATENCY if sent <= LATENCY_BYTES else COPY if visited > 0.8 else PUSH
    return replace(form, programs=min(form.programs, sms)) if sms else form


class SideStream:
    """Work beside the current stream and before it, so that a flag does not wait until a large kernel has started all
    of its programs; on the CPU it is done at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def fork(self) -> AbstractContextManager[object]:
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self.stream)

    def mark(self) -> torch.Event | None:
        """The work given so far."""
        return None if self.stream is None else self.stream.record_event()

    def join(self, mark: torch.Event | None) -> None:
        if mark is not None:
            torch.cuda.current_stream().wait_event(mark)
