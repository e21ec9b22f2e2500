"""Experts with SwiGLU over a batch of rows: two grouped GEMMs, and what stands before them.

Shape legend: R rows, D model width, X expanded rows, S slots, F expert width.

    rows_RD ─(expand)─► gate and up, silu(gate) · up ─► hidden_XF ─► down ─► y_XD

Prefill expands the rows first, since TMA reads blocks of neighbouring rows; decode, which is bound by reading weights,
lets the GEMM read each row through the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.kernels.grouped_gemm import BLOCK, Tile, grouped_gemm
from soloist.kernels.index import expand_kernel
from soloist.kernels.language import next_power
from soloist.kernels.quantise import FP8, quantise


@dataclass(frozen=True)
class ExpertTiles:
    """How the two GEMMs of a batch are cut. gather: the first one reads rows through the index, not expanded ones."""

    gate_up: Tile
    down: Tile
    gather: bool


# Most slots empty (measured on H200, docs/exchange.md): narrow tiles keep all SMs busy, deep stages keep them reading.
LONE_ROWS = ExpertTiles(Tile(16, 64, 128, 4, 4), Tile(16, 64, 256, 4, 4), gather=True)
LONE_ROWS_NARROW = ExpertTiles(LONE_ROWS.gate_up, Tile(16, 64, 128, 4, 4, 2), gather=True)
# A few rows in most slots: the same product, and results in wider pieces (docs/exchange.md).
LOW_ROWS = ExpertTiles(LONE_ROWS.gate_up, Tile(16, 128, 128, 4, 4), gather=True)
# Measured on H200 (docs/exchange.md), under uniform and skewed routing.
FEW_ROWS = ExpertTiles(Tile(64, 64, 128, 4, 4), Tile(64, 128, 128, 4, 4), gather=True)
MANY_ROWS = ExpertTiles(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), gather=False)
# Where the inner dimension of down is short, storing results beside the next product pays.
MANY_ROWS_NARROW = ExpertTiles(MANY_ROWS.gate_up, Tile(128, 256, 64, 8, 3, hopper=True), gather=False)
NARROW = 1024
PROGRAMS = 4224  # of what copies or sums rows: 32 for each SM of an H100
FP32_ROWS = ExpertTiles(Tile(32, 32, 32, 4, 3, 2), Tile(32, 64, 32, 4, 3, 2), gather=True)  # not measured: for tests
# fp8 weights: few rows (not measured), and many, with a scale a row or one for a block.
FP8_FEW_ROWS = ExpertTiles(Tile(64, 64, BLOCK, 4, 4), Tile(64, 128, BLOCK, 4, 4), gather=True)
FP8_ROWS = ExpertTiles(Tile(128, 128, 128, 8, 4), Tile(128, 256, 128, 8, 4), gather=False)
FP8_BLOCKS = ExpertTiles(
    Tile(128, 64, BLOCK, stages=4, hopper=True), Tile(128, 128, BLOCK, stages=4, hopper=True), gather=False
)


def choose_tiles(rows_per_slot: float, width: int, dtype: torch.dtype = torch.bfloat16) -> ExpertTiles:
    """By the expected number of expanded rows of a slot, the width of the experts, and their dtype of 16 or 32 bits."""
    if dtype == torch.float32:
        return FP32_ROWS
    if rows_per_slot <= 1:
        return LONE_ROWS_NARROW if width % LONE_ROWS.down.bk else LONE_ROWS
    if rows_per_slot <= 8:
        return LOW_ROWS
    if rows_per_slot <= 96:
        return FEW_ROWS
    return MANY_ROWS_NARROW if width <= NARROW else MANY_ROWS


def choose_fp8_tiles(rows_per_slot: float, in_blocks: bool) -> ExpertTiles:
    """The same for weights in fp8 with a scale a row, or one for a block."""
    if rows_per_slot <= 96:
        return FP8_FEW_ROWS
    return FP8_BLOCKS if in_blocks else FP8_ROWS


def fits(tiles: ExpertTiles, d_model: int, width: int) -> bool:
    """Whether the tiles divide these experts."""
    up, down = tiles.gate_up, tiles.down
    return not (d_model % up.bk or width % up.bn or width % down.bk or d_model % down.bn)


def expand_rows(
    rows_RD: Tensor, row_X: Tensor, offsets_S: Tensor, scale_RB: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x_XD and scale_XB: each row, and its scales where there are some, once for every slot that it chose."""
    d, x = rows_RD.shape[1], len(row_X)
    x_XD = torch.empty(x, d, dtype=rows_RD.dtype, device=rows_RD.device)
    scales = 0 if scale_RB is None else scale_RB.shape[1]
    scale_XB = None if scale_RB is None else scale_RB.new_empty(x, scales)
    block = min(2048, next_power(d))
    chunks = -(-d // block)
    expand_kernel[(max(1, min(PROGRAMS, x * chunks)),)](
        rows_RD, scale_RB, row_X, offsets_S, x_XD, scale_XB, SLOTS=len(offsets_S), SP=next_power(len(offsets_S)), D=d,
        BLOCK=block, CHUNKS=chunks, SCALES=scales, SCALES_P=next_power(scales), num_warps=max(1, block // 256),
    )  # fmt: skip
    return x_XD, scale_XB


def swiglu_experts(
    rows_RD: Tensor, row_X: Tensor, offsets_S: Tensor, gate_up_SND: Tensor, down_SDF: Tensor, tiles: ExpertTiles,
    x_XD: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y_XD, before gate weights. gate_up: `[S, 2F, D]`, gate above up; down: `[S, D, F]`; all of one dtype.

    `x_XD`: the expanded rows, where somebody has made them already.
    """
    if x_XD is None and not tiles.gather:
        x_XD, _ = expand_rows(rows_RD, row_X, offsets_S)
    x, index = (rows_RD, row_X) if x_XD is None else (x_XD, None)
    hidden_XF = grouped_gemm(x, gate_up_SND, offsets_S, tiles.gate_up, index, gated=True)
    return grouped_gemm(hidden_XF, down_SDF, offsets_S, tiles.down)


@dataclass(frozen=True)
class Fp8Experts:
    """Weights in fp8 with scales: a scale a row (`[S, N]`), or one for 128 × 128 elements (`[S, N/128, D/128]`)."""

    gate_up_SND: Tensor
    gate_up_scale: Tensor
    down_SDF: Tensor
    down_scale: Tensor

    @classmethod
    def quantised(cls, gate_up_SND: Tensor, down_SDF: Tensor, width: int | None = None) -> Fp8Experts:
        """From weights in bf16 or fp16: a scale a row, or one for blocks of `width` × `width`."""
        return cls(*_quantised(gate_up_SND, width), *_quantised(down_SDF, width))

    @property
    def width(self) -> int | None:
        """Columns that one scale of an activation covers."""
        return BLOCK if self.gate_up_scale.dim() == 3 else None

    def forward(self, rows_RD: Tensor, row_X: Tensor, offsets_S: Tensor, tiles: ExpertTiles) -> Tensor:
        """y_XD in rows_RD's dtype. Rows and hidden activations are quantised on the way."""
        q, scale = quantise(rows_RD, self.width)
        if not tiles.gather:
            q, scale = expand_rows(q, row_X, offsets_S, scale)
        hidden_XF = grouped_gemm(
            q, self.gate_up_SND, offsets_S, tiles.gate_up, row_X if tiles.gather else None, gated=True, scale_R=scale,
            scale_SN=self.gate_up_scale, dtype=rows_RD.dtype,
        )  # fmt: skip
        q_XF, scale_XB = quantise(hidden_XF, self.width, offsets_S)
        return grouped_gemm(
            q_XF, self.down_SDF, offsets_S, tiles.down, scale_R=scale_XB, scale_SN=self.down_scale, dtype=rows_RD.dtype
        )


def _quantised(weight_SND: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """q_SND and its scales, slot by slot, since a copy in fp32 is large."""
    q_SND = torch.empty_like(weight_SND, dtype=FP8)
    scales = []
    for q_ND, weight_ND in zip(q_SND, weight_SND, strict=True):
        n, d = weight_ND.shape
        high, wide = (1, d) if width is None else (width, width)
        blocks = weight_ND.float().view(n // high, high, d // wide, wide)
        scale = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-12) / 448
        q_ND.copy_((blocks / scale).view(n, d))
        scales.append(scale[:, 0, :, 0].squeeze(1) if width is None else scale[:, 0, :, 0])
    return q_SND, torch.stack(scales)
