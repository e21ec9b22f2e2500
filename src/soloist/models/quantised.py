"""Released weights in eight and four bits, turned into numbers.

fp8: float8_e4m3fn with one factor for each block of 128 × 128 (DeepSeek-V3), or for each row (compressed-tensors).
MXFP4: e2m1 values, two in a byte, the low nibble first, with one e8m0 exponent for each 32 values of a row (OCP
Microscaling Formats 1.0).
Shape legend: R rows, C columns, G groups of 32 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_BLOCK = 128
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E8M0_BIAS, _E8M0_NAN = 127, 255


def dequantise_fp8(weight_RC: Tensor, scale: Tensor, first_row: int = 0, first_column: int = 0) -> Tensor:
    """fp32 values of a rectangle of a matrix, given the factors of all blocks that it touches, or `[rows, 1]`.

    `first_row` and `first_column` say where the rectangle starts within its first block.
    """
    if scale.shape == (len(weight_RC), 1):
        return weight_RC.float() * scale.float()
    rows_R = _blocks(weight_RC.shape[0], first_row, weight_RC)
    columns_C = _blocks(weight_RC.shape[1], first_column, weight_RC)
    return weight_RC.float() * scale.float()[rows_R][:, columns_C]


def dequantise_mxfp4(blocks_RGB: Tensor, scale_RG: Tensor) -> Tensor:
    """fp32 values `[R, 32·G]` from uint8 blocks `[R, G, 16]` and exponents `[R, G]`; the exponent 255 means NaN."""
    values_RGC = _byte_values(blocks_RGB.device)[blocks_RGB.int()].flatten(-2)
    exponents_RG1 = scale_RG.int().unsqueeze(-1) - _E8M0_BIAS
    values_RGC = torch.ldexp(values_RGC, exponents_RG1)
    values_RGC.masked_fill_((scale_RG == _E8M0_NAN).unsqueeze(-1), torch.nan)
    return values_RGC.flatten(-2)


def _blocks(length: int, first: int, like: Tensor) -> Tensor:
    """The block of each row or column, counted from the first that is touched."""
    return torch.arange(first, first + length, device=like.device) // FP8_BLOCK


def _byte_values(device: torch.device) -> Tensor:
    """The two values `[256, 2]` of each byte."""
    nibble = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([nibble[byte & 15], nibble[byte >> 4]], dim=1)
