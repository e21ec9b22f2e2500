"""Expert GEMMs over rows that are grouped by slot, with offsets that lie on the device.

Shape legend: X expanded rows, S slots, D input width, N output width. `SP` is a power of two that covers S.

A persistent grid walks over the output tiles: slot by slot, then by columns, then by rows, so that the row tiles of a
slot share each weight tile while it is in the L2. The loops over tiles and over D are one loop, so that the loads of
the next tile run ahead of the end of this one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soloist.kernels.device import generation, processors
from soloist.kernels.follow import release_next
from soloist.kernels.language import TensorDescriptor, next_power, tl, triton

BLOCK = 128  # side of the blocks of weights that share a scale


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
    hopper: bool = False  # on Hopper by hopper_gemm.py, which takes no index, and of fp8 only blocks


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

    x: `rows_RD` with `row_X`, else `x_XD`; bf16, fp16 or fp32, or fp8 with scales: a scale a row in `scale_R` (of x)
    and `scale_SN`, or `[R, D / 128]` and `[S, N / 128, D / 128]` for blocks (kernels/quantise.py).
    gated: weight is `[S, 2N, D]`, gate above up, and the result is silu(gate) · up. Sums are fp32. D and N must be
    multiples of the tile's bk and bn.
    """
    slots, height, d = weight_SND.shape
    n = height // 2 if gated else height
    assert (d % tile.bk, n % tile.bn) == (0, 0), f"{tile} does not divide {d} and {n}"
    scaled = scale_R is not None
    blocked = scale_SN is not None and scale_SN.dim() == 3
    assert not blocked or tile.bk == BLOCK, "a step of the sum must be a block"
    if out_XN is None:
        out_XN = torch.empty(len(x) if row_X is None else len(row_X), n, dtype=dtype or x.dtype, device=x.device)
    if not len(out_XN):  # nobody sent a row here; the copy engine takes no empty tensor
        return out_XN
    if tile.hopper and _is_hopper(x.device) and row_X is None and (not blocked or d // BLOCK % 2 == 0):
        from soloist.kernels.hopper_gemm import grouped_gemm_hopper  # Gluon is there where Triton is

        wide = 2 * tile.bn if gated else tile.bn
        grouped_gemm_hopper(x, weight_SND, offsets_S, out_XN, gated, scale_R, scale_SN, wide, tile.stages)
        return out_XN
    if gated:
        weight = TensorDescriptor.from_tensor(weight_SND.view(2 * slots, n, d), [2, tile.bn, tile.bk])
    else:
        weight = TensorDescriptor.from_tensor(weight_SND.view(slots * n, d), [tile.bn, tile.bk])
    grouped_gemm_kernel[(_programs(tile, x.device),)](
        TensorDescriptor.from_tensor(x, [tile.bm, tile.bk]) if row_X is None else x,
        row_X, scale_R, weight, scale_SN, out_XN, offsets_S,
        SLOTS=slots, SP=next_power(slots), D=d, N=n, BM=tile.bm, BN=tile.bn, BK=tile.bk,
        GATED=gated, GATHER=row_X is not None, SCALED=scaled and not blocked, BLOCKED=blocked,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out_XN


def _is_hopper(device: torch.device) -> bool:
    return generation(device) == 9


def _programs(tile: Tile, device: torch.device) -> int:
    if tile.programs is not None:
        return tile.programs
    if device.type != "cuda":
        return 1  # in the interpreter
    return tile.per_sm * processors(device)


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
def _weight_row(slot, n, N: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr):
    """Rows of the stacked weights that the columns of a tile come from."""
    column = tl.arange(0, WIDE)
    return slot * (N * WIDE // BN) + column // BN * N + n * BN + column % BN


@triton.jit
def _swiglu(acc, BM: tl.constexpr, BN: tl.constexpr):
    """acc: gate columns, then up columns. Both lie in the same thread's registers."""
    gate, up = acc.reshape(BM, 2, BN).permute(0, 2, 1).split()
    return gate * tl.sigmoid(gate) * up


@triton.jit
def grouped_gemm_kernel(
    x, row_X, scale_R, weight, scale_SN, out_XN, offsets_S,
    SLOTS: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, GATHER: tl.constexpr, SCALED: tl.constexpr, BLOCKED: tl.constexpr,
):  # fmt: skip
    """out_XN = x_XD · weight_SND, by slot. D and N are multiples of BK and BN.

    weight: descriptor of `[S · N, D]`, blocks of `[BN, BK]`. GATED: of `[S · 2, N, D]`, gate before up, blocks of
    `[2, BN, BK]`, and the result is silu(gate) · up: one product of twice the width, since two of half the width leave
    the tensor cores waiting for shared memory. GATHER: `x` points to `rows_RD` and `row_X` says which row; otherwise it
    is a descriptor of `x_XD`, blocks of `[BM, BK]`. SCALED: x and weight are fp8 with a scale a row: `scale_R` and
    `scale_SN`. BLOCKED: they are fp8 with a scale for BK columns of a row of x, and for BK × BK elements of the weight.
    """
    release_next()
    WIDE: tl.constexpr = 2 * BN if GATED else BN
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
    row_M, inside_M = tl.zeros((BM,), tl.int64), tl.zeros((BM,), tl.int1)
    if BLOCKED:
        low, high, scale_low, scale_high = 0, 0, 0.0, 0.0
        from_M, scale_M = tl.zeros((BM,), tl.int64), tl.zeros((BM,), tl.float32)
    # Of a blocked sum each half of the columns lies in one block of the weight.
    acc = tl.zeros((BM, 2, WIDE // 2) if BLOCKED else (BM, WIDE), tl.float32)
    ki = -1
    for _ in range(0, mine * (D // BK)):
        ki = tl.where(ki == D // BK - 1, 0, ki + 1)
        if ki == 0:
            tile += programs
            slot, first, end, n = _locate(tile, ends_S, counts_S, tiles_S, upto_S, index_S, BM)
            if GATHER:
                at_M = first + tl.arange(0, BM)
                inside_M = at_M < end
                row_M = tl.load(row_X + at_M, mask=inside_M, other=0)
            if BLOCKED:
                # Rows behind the slot's end take the scales of its last one; what becomes of them is not stored.
                from_M = row_M if GATHER else tl.minimum(first + tl.arange(0, BM), end - 1).to(tl.int64)
                low = (slot * (N * WIDE // BN) + n * BN) // BK * (D // BK)
                high = (slot * (N * WIDE // BN) + n * BN + (N if GATED else WIDE // 2)) // BK * (D // BK)
                scale_M = tl.load(scale_R + from_M * (D // BK))
                scale_low, scale_high = tl.load(scale_SN + low), tl.load(scale_SN + high)
        if GATHER:
            x_MK = x + (row_M * width)[:, None] + (ki * BK + tl.arange(0, BK))[None, :]
            # Rows that are not there would come out of the L2 all the same, as many bytes as half of the weights.
            a = tl.load(x_MK, mask=inside_M[:, None], other=0.0)
        else:
            a = x.load([first, ki * BK])
        if GATED:
            w = weight.load([slot * 2, n * BN, ki * BK]).reshape(WIDE, BK)
        else:
            w = weight.load([slot * N + n * BN, ki * BK])
        if BLOCKED:
            part = tl.dot(a, w.T).reshape(BM, 2, WIDE // 2)
            # The next step's scales are on their way while the tensor cores work on this one's product.
            following = tl.minimum(ki + 1, D // BK - 1)
            next_M = tl.load(scale_R + from_M * (D // BK) + following)
            next_low, next_high = tl.load(scale_SN + low + following), tl.load(scale_SN + high + following)
            scale_2 = tl.where(tl.arange(0, 2) == 0, scale_low, scale_high)
            acc += part * (scale_M[:, None, None] * scale_2[None, :, None])
            scale_M, scale_low, scale_high = next_M, next_low, next_high
        else:
            acc = tl.dot(a, w.T, acc, input_precision="ieee")  # of fp32, where tf32 would be the default
        if ki == D // BK - 1:
            at_M = first + tl.arange(0, BM)
            column_N = n * BN + tl.arange(0, BN)
            if SCALED:
                acc *= tl.load(scale_R + (row_M if GATHER else at_M), mask=at_M < end, other=0.0)[:, None]
                acc *= tl.load(scale_SN + _weight_row(slot, n, N, BN, WIDE))[None, :]
            result = _swiglu(acc, BM, BN) if GATED else acc.reshape(BM, BN)
            out = out_XN + at_M.to(tl.int64)[:, None] * N + column_N[None, :]
            tl.store(out, result.to(out_XN.dtype.element_ty), mask=(at_M < end)[:, None])
            acc = tl.zeros(acc.shape, tl.float32)
