"""Rows to fp8 (e4m3) with one fp32 scale a row or a block of 128 columns.

Shape legend: X rows, D width, B blocks of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soloist.kernels.language import next_power, tl, triton

FP8 = torch.float8_e4m3fn
FP8_MAX = tl.constexpr(448.0)  # largest e4m3
SMALLEST_SCALE = tl.constexpr(1e-12)  # of a row of zeros


@triton.jit
def to_fp8(x, axis: tl.constexpr):
    """x / scale in fp8, and scale = max |x| / 448 along `axis`, kept as a dimension of 1."""
    x = x.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis, keep_dims=True) / FP8_MAX, SMALLEST_SCALE)
    return (x / scale).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=("rows",))
def quantise_kernel(
    x_XD, q_XD, scale_XB, used, rows,
    D: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, WP: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Programs share the rows. WIDTH: columns a scale covers. COUNTED: only the first `used[0]` of `rows` rows."""
    if COUNTED:
        rows = tl.load(used)
    block = tl.arange(0, BP)[:, None]
    column = tl.arange(0, WP)[None, :]
    inside = (block < D // WIDTH) & (column < WIDTH)
    width = tl.full((), D, tl.int64)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        at = row * width + block * WIDTH + column
        q, scale = to_fp8(tl.load(x_XD + at, mask=inside, other=0.0), 1)
        tl.store(q_XD + at, q, mask=inside)
        tl.store(scale_XB + row * (D // WIDTH) + block, scale, mask=block < D // WIDTH)


def quantise(x_XD: Tensor, width: int | None = None, offsets_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q_XD (e4m3) and scale_XB (fp32): x ≈ q · scale, a scale for `width` columns, or for a row where it is None.

    `offsets_S`: only the rows before the last offset are touched.
    """
    d = x_XD.shape[1]
    width = width or d
    q_XD = torch.empty_like(x_XD, dtype=FP8)
    scale_XB = torch.empty(len(x_XD), d // width, dtype=torch.float32, device=x_XD.device)
    used = None if offsets_S is None else offsets_S[-1:]
    blocks, columns = next_power(d // width), next_power(width)
    quantise_kernel[(max(1, min(len(x_XD), 2112)),)](
        x_XD, q_XD, scale_XB, used, len(x_XD), D=d, WIDTH=width, BP=blocks, WP=columns, COUNTED=used is not None,
        num_warps=max(1, min(8, blocks * columns // 1024)),
    )  # fmt: skip
    return q_XD, scale_XB
