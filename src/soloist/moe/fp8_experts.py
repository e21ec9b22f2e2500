"""Experts whose weights stay in fp8, as the checkpoint has them; activations are quantised on the way.

Shape legend: S slots, D model width, F this rank's share of the experts' width, R rows, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self, cast

import torch
from torch import Tensor

from soloist.dispatch.base import ExpertBatch
from soloist.kernels.experts import ExpertTiles, Fp8Experts, choose_fp8_tiles, fits
from soloist.kernels.grouped_gemm import BLOCK
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.kernels.quantise import FP8
from soloist.kernels.reference import weighted_sum
from soloist.moe.experts import Experts, span_of
from soloist.moe.reader import Fp8Form, Fp8Reader, Reader, Span
from soloist.specs.model import ExpertSpec, ModelSpec
from soloist.specs.parameters import Param

ROWS = (1, 1024)  # of a slot: few and many have kernels of their own


class ExpertsInFp8(Experts):
    """`Experts` by the fp8 kernels. gate_up and down are e4m3; their scales are those of `kernels.experts.Fp8Experts`.

    Loaded by `load` where `serves` says so.
    """

    def __init__(
        self, spec: ExpertSpec, top_k: int, gate_up: Tensor, down: Tensor, gate_up_scale: Tensor, down_scale: Tensor
    ) -> None:
        super().__init__(spec, top_k, gate_up, down)
        self.gate_up_scale, self.down_scale = gate_up_scale, down_scale
        self.in_blocks = gate_up_scale.dim() == 3
        self.kernels = Fp8Experts(gate_up, gate_up_scale, down, down_scale)

    @classmethod
    def serves(cls, spec: ModelSpec, source: Reader, layer: int, tp_index: int = 0, tp: int = 1) -> bool:
        """Whether the layer's experts are SwiGLU in fp8, on a GPU, and of a size that the kernels' tiles divide."""
        is_swiglu = spec.expert.kind == "swiglu" and spec.expert.activation == "silu" and not spec.expert.bias
        form = _form(source, layer) if is_swiglu else None
        if (
            form is None
            or form != _form(source, spec.moe_layers[0])
            or not AVAILABLE
            or (source.device.type == "cpu" and not INTERPRETED)
        ):
            return False
        start, stop = span_of(spec, tp, tp_index)
        is_whole = start % BLOCK == stop % BLOCK == 0
        every = [choose_fp8_tiles(rows, form == "block") for rows in ROWS]
        return is_whole and all(fits(tiles, spec.d_model, stop - start) for tiles in every)

    @classmethod
    def empty(cls, spec: ModelSpec, source: Reader, slots: int, span: Span, has_down_bias: bool) -> Self:
        """See `Experts.empty`; has_down_bias plays no part."""
        d, width = spec.d_model, span[1] - span[0]
        in_blocks = _form(source, spec.moe_layers[0]) == "block"

        def make(*shape: int, dtype: torch.dtype = FP8) -> Tensor:
            return torch.empty(slots, *shape, dtype=dtype, device=source.device)

        def scales(rows: int, columns: int) -> Tensor:
            return make(*((rows // BLOCK, columns // BLOCK) if in_blocks else (rows,)), dtype=torch.float32)

        return cls(
            spec.expert, spec.router.top_k, make(2 * width, d), make(d, width), scales(2 * width, d), scales(d, width)
        )

    def load_slot(self, slot: int, source: Reader, layer: int, expert: int, span: Span) -> None:
        reader = cast(Fp8Reader, source)
        halves = zip(("gate", "up"), self.gate_up[slot].chunk(2), self.gate_up_scale[slot].chunk(2), strict=True)
        for name, weight_FD, into in halves:
            _fill(weight_FD, into, reader.read_fp8(Param(name, layer, expert), rows=span))
        _fill(self.down[slot], self.down_scale[slot], reader.read_fp8(Param("down", layer, expert), columns=span))

    def forward(self, batch: ExpertBatch) -> Tensor:
        """See `Experts.forward`."""
        slots, rows = len(self.down), len(batch.rows_RD)
        if not slots:
            return torch.zeros_like(batch.rows_RD)
        out_XD = self.expanded(batch, choose_fp8_tiles(len(batch.row_X) / slots, self.in_blocks))
        return weighted_sum(out_XD, batch.row_X, batch.weight_X, batch.offsets_S, rows, self.most, batch.dense)

    @property
    def capturable(self) -> bool:
        return True

    def _tiles(self, rows_per_slot: float) -> ExpertTiles | None:
        return choose_fp8_tiles(rows_per_slot, self.in_blocks) if self.fused else None

    def takes_rows(self, tiles: ExpertTiles) -> bool:
        """Always: rows are quantised before they are expanded, if they are at all."""
        return True

    def expanded(self, batch: ExpertBatch, tiles: ExpertTiles, x_XD: Tensor | None = None) -> Tensor:
        assert x_XD is None
        return self.kernels.forward(batch.rows_RD, batch.row_X, batch.offsets_S, tiles)


def load_experts(
    spec: ModelSpec, source: Reader, layer: int, expert_ids: Sequence[int], tp_index: int, tp: int, keep_fp8: bool
) -> Experts:
    """As the checkpoint has them where that is wanted and kernels serve them; otherwise as numbers in its dtype."""
    kind = ExpertsInFp8 if keep_fp8 and ExpertsInFp8.serves(spec, source, layer, tp_index, tp) else Experts
    return kind.load(spec, source, layer, expert_ids, tp_index, tp)


def _form(source: Reader, layer: int) -> Fp8Form | None:
    """Of the layer's experts, if all three matrices have the same."""
    if not isinstance(source, Fp8Reader):
        return None
    form = source.fp8_form(Param("down", layer, 0))
    return form if all(source.fp8_form(Param(name, layer, 0)) == form for name in ("gate", "up")) else None


def _fill(weight: Tensor, scale: Tensor, read: tuple[Tensor, Tensor]) -> None:
    weight.copy_(read[0])
    scale.copy_(read[1])
