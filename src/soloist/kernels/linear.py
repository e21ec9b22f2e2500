"""Products and contexts filled up on the CPU, so that a row's result does not depend on how many rows stand beside it.

Shape legend: T rows, D and N widths of a weight.

BLAS chooses its loops by the shapes. For a handful of rows it adds up in another order than for many, and one that
hands rows to threads leaves some of them a handful. Where two experts score alike to the last bit, another order is
another answer. With the multiples below, every row is added up alike however it is batched (MKL in fp32, 1 to 8
threads: tests/kernels/test_linear.py). GPUs have kernels of their own.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

ROWS = 4
KEYS = 192  # MKL adds up so many terms of a row at a time, fewer where they are between this and its double
FEW_KEYS = 16  # multiples of these are enough below


def linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear`, of rows that are filled up on the CPU."""
    if not (missing := missing_rows(x_TD)):
        return F.linear(x_TD, weight_ND, bias_N)
    return F.linear(F.pad(x_TD, (0, 0, 0, missing)), weight_ND, bias_N)[: len(x_TD)]


def missing_rows(x_TD: Tensor) -> int:
    """Rows to add for a product that is like others; 0 on a GPU."""
    return -x_TD.shape[-2] % ROWS if x_TD.is_cpu else 0


def filled_keys(length: int) -> int:
    """The keys of a context, with those that fill it up."""
    multiple = FEW_KEYS if length <= KEYS else KEYS
    return -(-length // multiple) * multiple
