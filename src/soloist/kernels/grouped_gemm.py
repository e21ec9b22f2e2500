"""Expert GEMMs over rows that are grouped by slot, with offsets that lie on the device.

Shape legend: X expanded rows, S slots, D input width, N output width. `SP` is a power of two that covers S.

A persistent grid walks over the output tiles: slot by slot, then by columns, then by rows, so that the row tiles of a
slot share each weight tile while it is in the L2. The loops over tiles and over D are one loop, so that the loads of the
next tile run ahead of the end of this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.kernels.language import TensorDescriptor, tl, triton


@dataclass(frozen=True)
class Tile:
    """One program's share of a step, and how many programs an SM holds."""

    bm: int
    bn: int
    bk: int
    warps: int = 8
    stages: int = 4
    per_sm: int = 1
    programs: int | None = None  # instead of all SMs


def grouped_gemm(
    x: Tensor,
    weight_SND: Tensor,
    offsets_S: Tensor,
    tile: Tile,
    row_X: Tensor | None = None,
    gated: bool = False,
    scale_R: Tensor | None = None,
    scale_SN: Tensor | None = None,
    out_XN: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out_XN: each expanded row times the weight of its slot; rows behind the last offset are left as they are.

    x: `rows_RD` with `row_X`, else `x_XD`; bf16, fp16 or fp32, or fp8 with `scale_R` (of a row of x) and `scale_SN`.
    gated: weight is `[S, 2N, D]`, gate above up, and the result is silu(gate) · up. Sums are fp32. D and N must be
    multiples of the tile's bk and bn.
    """
    slots, height, d = weight_SND.shape
    n = height // 2 if gated else height
    assert d % tile.bk == 0 and n % tile.bn == 0, f"{tile} does not divide {d} and {n}"
    if out_XN is None:
        out_XN = torch.empty(len(x) if row_X is None else len(row_X), n, dtype=dtype or x.dtype, device=x.device)
    weight = TensorDescriptor.from_tensor(weight_SND.view(-1, d), [tile.bn, tile.bk])
    grouped_gemm_kernel[(_programs(tile, x.device),)](
        TensorDescriptor.from_tensor(x, [tile.bm, tile.bk]) if row_X is None else x,
        row_X, scale_R, weight, scale_SN, out_XN, offsets_S,
        SLOTS=slots, SP=1 << (slots - 1).bit_length(), D=d, N=n, BM=tile.bm, BN=tile.bn, BK=tile.bk,
        GATED=gated, GATHER=row_X is not None, SCALED=scale_R is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_XN


def _programs(tile: Tile, device: torch.device) -> int:
    if tile.programs is not None:
        return tile.programs
    return tile.per_sm * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _locate(tile, ends_S, counts_S, tiles_S, upto_S, index_S, BM: tl.constexpr):
    """Slot, first row, end of the slot's rows and column tile of an output tile."""
    slot = tl.sum((upto_S <= tile).to(tl.int32), 0)
    here_S = index_S == slot
    tiles = tl.sum(tl.where(here_S, tiles_S, 0), 0)
    end = tl.sum(tl.where(here_S, ends_S, 0), 0)
    count = tl.sum(tl.where(here_S, counts_S, 0), 0)
    before = tl.max(tl.where(index_S < slot, upto_S, 0), 0)
    within = tile - before
    return slot, end - count + within % tiles * BM, end, within // tiles


@triton.jit
def grouped_gemm_kernel(
    x, row_X, scale_R, weight, scale_SN, out_XN, offsets_S,
    SLOTS: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, GATHER: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out_XN = x_XD · weight_SND, by slot. D and N are multiples of BK and BN.

    weight: descriptor of `[S · N, D]`, blocks of `[BN, BK]`. GATED: of `[S · 2N, D]`, gate above up, and the result is
    silu(gate) · up. GATHER: `x` points to `rows_RD` and `row_X` says which row; otherwise it is a descriptor of
    `x_XD`, blocks of `[BM, BK]`. SCALED: x and weight are fp8 with a scale a row: `scale_R` and `scale_SN`.
    """
    programs, tile = tl.num_programs(0), tl.program_id(0)
    index_S = tl.arange(0, SP)
    ends_S = tl.load(offsets_S + index_S, mask=index_S < SLOTS, other=0)
    starts_S = tl.load(offsets_S + index_S - 1, mask=(index_S > 0) & (index_S < SLOTS), other=0)
    counts_S = ends_S - starts_S
    tiles_S = (counts_S + BM - 1) // BM
    upto_S = tl.cumsum(tiles_S, 0) * (N // BN)
    total = tl.sum(tiles_S, 0) * (N // BN)
    mine = tl.maximum(total - tile + programs - 1, 0) // programs
    tile -= programs
    slot, first, end, n = 0, 0, 0, 0
    width = tl.full((), D, tl.int64)
    row_M = tl.zeros((BM,), tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    ki = -1
    for _ in range(0, mine * (D // BK)):
        ki = tl.where(ki == D // BK - 1, 0, ki + 1)
        if ki == 0:
            tile += programs
            slot, first, end, n = _locate(tile, ends_S, counts_S, tiles_S, upto_S, index_S, BM)
            if GATHER:
                at_M = first + tl.arange(0, BM)
                row_M = tl.load(row_X + at_M, mask=at_M < end, other=0)
        if GATHER:
            a = tl.load(x + (row_M * width)[:, None] + (ki * BK + tl.arange(0, BK))[None, :])
        else:
            a = x.load([first, ki * BK])
        if GATED:
            acc = tl.dot(a, weight.load([slot * 2 * N + n * BN, ki * BK]).T, acc)
            up = tl.dot(a, weight.load([slot * 2 * N + N + n * BN, ki * BK]).T, up)
        else:
            acc = tl.dot(a, weight.load([slot * N + n * BN, ki * BK]).T, acc)
        if ki == D // BK - 1:
            at_M = first + tl.arange(0, BM)
            column_N = n * BN + tl.arange(0, BN)
            if SCALED:
                scale_row = tl.load(scale_R + (row_M if GATHER else at_M), mask=at_M < end, other=0.0)[:, None]
            if GATED:
                if SCALED:
                    acc *= scale_row * tl.load(scale_SN + slot * 2 * N + column_N)[None, :]
                    up *= scale_row * tl.load(scale_SN + slot * 2 * N + N + column_N)[None, :]
                result = acc * tl.sigmoid(acc) * up
                up = tl.zeros((BM, BN), tl.float32)
            else:
                if SCALED:
                    acc *= scale_row * tl.load(scale_SN + slot * N + column_N)[None, :]
                result = acc
            out = out_XN + at_M.to(tl.int64)[:, None] * N + column_N[None, :]
            tl.store(out, result.to(out_XN.dtype.element_ty), mask=(at_M < end)[:, None])
            acc = tl.zeros((BM, BN), tl.float32)
