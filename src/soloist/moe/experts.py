"""The experts of one group in one layer: this rank's share of every slot.

Shape legend: S slots, D model width, F this rank's share of the experts' width, R rows, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch
from soloist.errors import ConfigurationError
from soloist.kernels.experts import ExpertTiles, choose_tiles, fits, swiglu_experts
from soloist.kernels.language import AVAILABLE
from soloist.kernels.reference import activate, choose_grouped_linear, expand, grouped_linear, weighted_sum
from soloist.moe.reader import Reader, Span
from soloist.specs.layout import share
from soloist.specs.model import ExpertSpec, ModelSpec
from soloist.specs.parameters import Param


def span_of(spec: ModelSpec, tp: int, tp_index: int) -> Span:
    """A rank's share of the experts' width."""
    if tp > spec.expert.width:
        raise ConfigurationError.of("layout.tp", tp, f"experts have a width of {spec.expert.width}; use a lower tp")
    return share(spec.expert.width, tp, tp_index)


class Experts:
    """Stacked weights, and the feed-forward over an ExpertBatch.

    gate_up: `[S, 2F, D]`, gate above up; `[S, F, D]` for experts of two matrices. down: `[S, D, F]`. The biases have a
    vector for each slot. With tensor parallelism the results of the group's ranks are to be summed, so only the first
    of them has a down bias.
    """

    def __init__(
        self,
        spec: ExpertSpec,
        top_k: int,
        gate_up: Tensor,
        down: Tensor,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> None:
        self.spec, self.most = spec, min(top_k, len(gate_up))
        self.gate_up, self.down = gate_up, down
        self.gate_up_bias, self.down_bias = gate_up_bias, down_bias
        self.grouped_linear = choose_grouped_linear(gate_up, down)
        self.fused = True  # where the kernels serve these experts

    @classmethod
    def load(
        cls, spec: ModelSpec, source: Reader, layer: int, expert_ids: Sequence[int], tp_index: int = 0, tp: int = 1
    ) -> Self:
        """`expert_ids` are the logical experts in the slots of this rank's group; `layer` counts all layers."""
        span = span_of(spec, tp, tp_index)
        experts = cls.empty(spec, source, len(expert_ids), span, has_down_bias=tp_index == 0)
        mode = torch.is_inference_mode_enabled()  # each thread has its own

        def load(slot: int) -> None:
            with torch.inference_mode(mode):
                experts.load_slot(slot, source, layer, expert_ids[slot], span)

        with ThreadPoolExecutor(source.threads) as pool:
            for loaded in [pool.submit(load, slot) for slot in range(len(expert_ids))]:
                loaded.result()
        return experts

    @classmethod
    def empty(cls, spec: ModelSpec, source: Reader, slots: int, span: Span, has_down_bias: bool) -> Self:
        """Slots that hold nothing yet, in the dtype and on the device of the source."""

        def make(*shape: int) -> Tensor:
            return torch.empty(slots, *shape, dtype=source.dtype, device=source.device)

        width, expert = span[1] - span[0], spec.expert
        inner = width * (expert.matrices - 1)
        gate_up, down = make(inner, spec.d_model), make(spec.d_model, width)
        gate_up_bias = make(inner) if expert.bias else None
        down_bias = make(spec.d_model) if expert.bias and has_down_bias else None
        return cls(expert, spec.router.top_k, gate_up, down, gate_up_bias, down_bias)

    def load_slot(self, slot: int, source: Reader, layer: int, expert: int, span: Span) -> None:
        """Read one expert into a slot; `span` is this rank's part of its width."""
        names = ("up",) if self.spec.kind == "mlp" else ("gate", "up")
        for name, part_FD in zip(names, self.gate_up[slot].chunk(len(names)), strict=True):
            part_FD.copy_(source.read(Param(name, layer, expert), rows=span))
        self.down[slot].copy_(source.read(Param("down", layer, expert), columns=span))
        if self.gate_up_bias is not None:
            for name, part_F in zip(names, self.gate_up_bias[slot].chunk(len(names)), strict=True):
                part_F.copy_(source.read(Param(f"{name}_bias", layer, expert), rows=span))
        if self.down_bias is not None:
            self.down_bias[slot].copy_(source.read(Param("down_bias", layer, expert)))

    def forward(self, batch: ExpertBatch) -> Tensor:
        """y_RD: for each row the weighted sum of what its local experts make of it, rounded once from fp32."""
        if not len(self.gate_up):
            return torch.zeros_like(batch.rows_RD)
        rows = len(batch.rows_RD)
        # Behind the last offset the index may name rows that only an earlier, larger batch had.
        row_X = batch.row_X if batch.dense else batch.row_X.clamp_max(rows - 1)
        x_XD = batch.rows_RD if batch.dense and len(self.gate_up) == 1 else expand(batch.rows_RD, row_X)
        hidden_XF = self.grouped_linear(x_XD, self.gate_up, batch.offsets_S, self.gate_up_bias)
        out_XD = self.grouped_linear(activate(hidden_XF, self.spec), self.down, batch.offsets_S, self.down_bias)
        return weighted_sum(out_XD, batch.row_X, batch.weight_X, batch.offsets_S, rows, self.most, batch.dense)

    # -- fused ------------------------------------------------------------------------------------------------------
    def tiles(self, rows_per_slot: float) -> ExpertTiles | None:
        """How the fused kernels cut a batch; None where `forward` is to be used.

        They serve SwiGLU without biases on a GPU.
        """
        return self._tiles(rows_per_slot) if len(self.down) else None

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold these experts: no form that they take asks the host for the offsets.

        Equal on all ranks, those without slots included.
        """
        return self.grouped_linear is grouped_linear or all(self._tiles(rows) for rows in (1, 64, 1024))

    def _tiles(self, rows_per_slot: float) -> ExpertTiles | None:
        is_swiglu = self.spec.kind == "swiglu" and self.spec.activation == "silu" and not self.spec.bias
        if not (self.fused and is_swiglu and AVAILABLE and self.down.is_cuda):
            return None
        tiles = choose_tiles(rows_per_slot, self.down.shape[2], self.down.dtype)
        return tiles if fits(tiles, *self.down.shape[1:]) else None

    def takes_rows(self, tiles: ExpertTiles) -> bool:
        """Whether `expanded` works from the rows as they came, and nobody needs to expand them."""
        return tiles.gather

    def expanded(self, batch: ExpertBatch, tiles: ExpertTiles, x_XD: Tensor | None = None) -> Tensor:
        """y_XD: what each expanded row's expert makes of it. `x_XD`: the expanded rows, where they are made already."""
        return swiglu_experts(batch.rows_RD, batch.row_X, batch.offsets_S, self.gate_up, self.down, tiles, x_XD)
