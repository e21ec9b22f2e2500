"""The portable path as a yardstick: dispatchers over NCCL, experts by `F.grouped_mm`, nothing of it in Triton.

Shape legend: T tokens of a rank, D model width, F expert width, X expanded rows, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from soloist.bench.load import Load, check_dispatcher
from soloist.dispatch.base import Dispatcher
from soloist.dispatch.padded import PaddedDispatcher
from soloist.kernels.reference import expand, grouped_linear, weighted_sum
from soloist.probes.gpus import Bench, captured


@dataclass
class PortableRun:
    """A load over one of these dispatchers. Only `padded` can be captured; `ragged` asks the device for its counts."""

    bench: Bench
    load: Load
    dispatcher: Dispatcher

    def __post_init__(self) -> None:
        self.inputs = self.load.everybody(self.bench.size, 0, self.bench.device)
        self.x_TD, self.choice = self.inputs[self.bench.rank]

    def check(self) -> None:
        check_dispatcher(self.dispatcher, self.inputs, self.bench.rank)

    def timed(self, work: Callable[[], object]) -> Callable[[], object]:
        """As a graph where that is possible."""
        return captured(work) if isinstance(self.dispatcher, PaddedDispatcher) else work

    def halves(self) -> Iterator[tuple[str, float]]:
        """Seconds of a dispatch and of a combine."""
        batch = self.dispatcher.dispatch(self.x_TD, self.choice)
        y_RD = batch.rows_RD.contiguous()
        parts = {
            "dispatch": lambda: self.dispatcher.dispatch(self.x_TD, self.choice),
            "combine": lambda: self.dispatcher.combine(y_RD, batch),
        }
        seconds = self.bench.seconds(*(self.timed(part) for part in parts.values()), repeats=9)
        yield from zip(parts, seconds, strict=True)

    def layer(self, gate_up_SND: Tensor, down_SDF: Tensor) -> Callable[[], Tensor]:
        """One expert layer: out_TD."""
        most = min(self.load.top_k, len(gate_up_SND))

        def forward() -> Tensor:
            batch = self.dispatcher.dispatch(self.x_TD, self.choice)
            x_XD = expand(batch.rows_RD, batch.row_X)
            gate_XF, up_XF = grouped_linear(x_XD, gate_up_SND, batch.offsets_S, None).chunk(2, -1)
            y_XD = grouped_linear(F.silu(gate_XF) * up_XF, down_SDF, batch.offsets_S, None)
            rows = len(batch.rows_RD)
            y_RD = weighted_sum(y_XD, batch.row_X, batch.weight_X, batch.offsets_S, rows, most, batch.dense)
            return self.dispatcher.combine(y_RD, batch)

        return forward
