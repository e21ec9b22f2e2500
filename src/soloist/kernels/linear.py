"""Products and contexts filled up on the CPU, so that a row's result does not depend on how many rows stand beside it.

Shape legend: T rows, D and N widths of a weight, S weights, X rows of all weights.

BLAS chooses its loops by the shapes. For a handful of rows it adds up in another order than for many, and one that
hands rows to threads leaves some of them a handful. Where two experts score alike to the last bit, another order is
another answer. With the multiples below, every row is added up alike however it is batched: with MKL in fp32, 1 to 8
threads, on CPUs with AVX2 (tests/kernels/test_linear.py), but not where MKL_CBWR chooses MKL's loops. GPUs have kernels
of their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 4
KEYS = 192  # MKL adds up so many terms of a row at a time, fewer where they are between this and its double
FEW_KEYS = 16  # multiples of these are enough below


def product(x_TD: Tensor, weight_ND: Tensor, out_TN: Tensor | None) -> Tensor:
    """`linear` without a bias, into `out_TN` where there is one."""
    if out_TN is None:
        return linear(x_TD, weight_ND)
    return torch.mm(x_TD, weight_ND.T, out=out_TN) if x_TD.is_cuda else out_TN.copy_(linear(x_TD, weight_ND))


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`, of rows that are filled up on the CPU."""
    if not (missing := missing_rows(x_TD)):
        return F.linear(x_TD, weight_ND, bias_N)
    return F.linear(F.pad(x_TD, (0, 0, 0, missing)), weight_ND, bias_N)[: len(x_TD)]


def grouped_mm(x_XD: Tensor, weight_SND: Tensor, offsets_S: Tensor) -> Tensor:
    """out_XN: rows `offsets_S[s - 1] … offsets_S[s]` by weight s, of groups that are filled up on the CPU.

    What stands behind the last offset may be anything.
    """
    if not x_XD.is_cpu:
        return F.grouped_mm(x_XD, weight_SND.transpose(1, 2), offs=offsets_S)
    if len(weight_SND) == 1:
        return linear(x_XD, weight_SND[0])
    sizes_S = offsets_S.diff(prepend=offsets_S.new_zeros(1))
    ends_S = (-(-sizes_S // ROWS) * ROWS).cumsum(0, dtype=torch.int32)
    added_S = ends_S - offsets_S  # rows added in front of the end of each group, its own behind its rows
    before_S = added_S.roll(1)
    before_S[0] = 0
    used = int(offsets_S[-1])
    place_X = torch.arange(used) + before_S.repeat_interleave(sizes_S, output_size=used)
    filled = x_XD.new_zeros(int(ends_S[-1]), x_XD.shape[1]).index_copy_(0, place_X, x_XD[:used])
    out = F.grouped_mm(filled, weight_SND.transpose(1, 2), offs=ends_S).index_select(0, place_X)
    return F.pad(out, (0, 0, 0, len(x_XD) - used)) if used < len(x_XD) else out


def missing_rows(x_TD: Tensor) -> int:
    """Rows to add for a product that is like others; 0 on a GPU."""
    return -x_TD.shape[-2] % ROWS if x_TD.is_cpu else 0


def filled_keys(length: int) -> int:
    """The keys of a context, with those that fill it up."""
    multiple = FEW_KEYS if length <= KEYS else KEYS
    return -(-length // multiple) * multiple
