"""Which paged attention a layer runs: Triton's where it serves the cache, else the definition.

PyTorch's varlen attention (2.11) has no place here: in plain prefill on H100 it reaches 350 TFLOP/s at 8000 tokens, the
Triton kernel 435. Its dense attention reaches 636, for equal lengths only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from soloist.kernels.language import AVAILABLE
from soloist.kernels.paged_attention import PagedBatch, paged_attention
from soloist.kernels.paged_attention_triton import TritonPagedAttention, supports

Attention = Callable[[Tensor, Tensor, Tensor, PagedBatch], Tensor]
"""out_THV of q_THQ, k_cache, v_cache and the batch."""


def attention_of(
    kv_head_H: Tensor,
    scale: float,
    window: int | None,
    sinks_H: Tensor | None,
    dtype: torch.dtype,
    key: int,
    value: int,
) -> Attention:
    """`paged_attention` of a layer on the device of `kv_head_H`, for a cache of this type and these widths."""
    if AVAILABLE and kv_head_H.is_cuda and supports(dtype, key, value):
        return TritonPagedAttention(kv_head_H, scale, window, sinks_H)

    def plain(q_THQ: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch) -> Tensor:
        return paged_attention(q_THQ, k_cache, v_cache, batch, kv_head_H, scale, window, sinks_H)

    return plain
