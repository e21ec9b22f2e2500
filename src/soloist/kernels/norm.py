"""Residual and RMS norm in one launch; and a head's norm, rotation and way into the cache in another.

Shape legend: T tokens, D model width, H query heads and C KV heads of this rank, Q width of a head, N = (H + 2C) · Q,
W rotated elements of a head. `DP` and `QP` are powers of two that cover D and Q.

`rms_norm` and `add_norm` (models/layers.py) and `GroupedQueryAttention._plain_heads` (models/attention.py) are the
definitions; the rotation is rounded once here, after each product there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from soloist.kernels.follow import await_previous, early, release_next
from soloist.kernels.language import next_power, tl, triton

HEADS = 8  # that a program of `heads_kernel` takes


def fused_norm(x_TD: Tensor, added_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its RMS norm times `weight_D`, both in x's dtype. Rows may lie apart, elements may not.

    Without `added_TD` the first result is x itself.
    """
    tokens, d = x_TD.shape
    normed_TD = torch.empty(tokens, d, dtype=x_TD.dtype, device=x_TD.device)
    sum_TD = x_TD if added_TD is None else torch.empty_like(normed_TD)
    block = next_power(d)
    if tokens:
        norm_kernel[(tokens,)](
            x_TD, x_TD if added_TD is None else added_TD, weight_D, sum_TD, normed_TD,
            x_TD.stride(0), 0 if added_TD is None else added_TD.stride(0), eps,
            D=d, DP=block, ADD=added_TD is not None, num_warps=max(1, min(16, block // 512)),
            **early(x_TD.device),
        )  # fmt: skip
    return sum_TD, normed_TD


@triton.jit
def norm_kernel(
    x_TD, added_TD, weight_D, sum_TD, normed_TD, x_stride, added_stride, eps,
    D: tl.constexpr, DP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A program a token. The sum is rounded before it is squared, as everybody who reads it back would have it."""
    release_next()
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, DP)
    inside = column < D
    weight = tl.load(weight_D + column, mask=inside, other=0.0)
    await_previous()
    x = tl.load(x_TD + t * x_stride + column, mask=inside, other=0.0)
    dtype = x.dtype
    if ADD:
        added = tl.load(added_TD + t * added_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + added.to(tl.float32)).to(dtype)
        tl.store(sum_TD + t * D + column, x, mask=inside)
    x32 = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x32 * x32, 0) / D + eps)
    tl.store(normed_TD + t * D + column, ((x32 * scale).to(dtype) * weight).to(dtype), mask=inside)


def fused_heads(
    qkv_TN: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    slots_T: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """q_THQ, normed and rotated; this step's keys (likewise) and values go to rows `slots_T` of the cache.

    qkv_TN: query heads, key heads, value heads side by side. norms: weights [Q] of the RMS norm over each query and
    key head. cos, sin: [T, 1, W/2]. keys, values: [slots, C, Q].
    """
    tokens, (kv_heads, width) = len(qkv_TN), keys.shape[1:]
    heads = qkv_TN.shape[1] // width - 2 * kv_heads
    q_THQ = torch.empty(tokens, heads, width, dtype=qkv_TN.dtype, device=qkv_TN.device)
    q_norm_Q, k_norm_Q = norms or (qkv_TN, qkv_TN)
    if tokens and heads + kv_heads:
        heads_kernel[(tokens, -(-(heads + 2 * kv_heads) // HEADS))](
            qkv_TN, q_norm_Q, k_norm_Q, cos, sin, slots_T, q_THQ, keys, values,
            qkv_TN.stride(0), keys.stride(0), values.stride(0), eps,
            H=heads, C=kv_heads, Q=width, QP=next_power(width), W=2 * cos.shape[-1], HEADS=HEADS,
            NORM=norms is not None, INTERLEAVED=interleaved, num_warps=4, **early(qkv_TN.device),
        )  # fmt: skip
    return q_THQ


@triton.jit
def heads_kernel(
    qkv_TN, q_norm_Q, k_norm_Q, cos_TW, sin_TW, slots_T, q_THQ, keys, values,
    stride, key_stride, value_stride, eps,
    H: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, QP: tl.constexpr, W: tl.constexpr, HEADS: tl.constexpr,
    NORM: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, parts of the heads). The other element of a rotated pair is read a second time."""
    release_next()
    t = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, QP)[None, :]
    is_query, is_key = head < H, (head >= H) & (head < H + C)
    inside = (head < H + 2 * C) & (column < Q)
    dtype = qkv_TN.dtype.element_ty
    row = qkv_TN + t * stride + head * Q
    if INTERLEAVED:
        other, angle, is_first = column ^ 1, column // 2, column % 2 == 0
    else:
        is_first = column < W // 2
        other = tl.where(is_first, column + W // 2, column - W // 2)
        angle = tl.where(is_first, column, column - W // 2)
    turns = (is_query | is_key) & (column < W)
    if NORM:
        here, there = column < Q, column < W
        of_x = tl.where(
            is_query, tl.load(q_norm_Q + column, mask=here, other=0.0), tl.load(k_norm_Q + column, mask=here, other=0.0)
        )
        of_y = tl.where(
            is_query, tl.load(q_norm_Q + other, mask=there, other=0.0), tl.load(k_norm_Q + other, mask=there, other=0.0)
        )
    await_previous()
    x = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(row + other, mask=inside & turns, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / Q + eps)[:, None]
        x = tl.where(is_query | is_key, ((x * scale).to(dtype) * of_x).to(tl.float32), x)
        y = ((y * scale).to(dtype) * of_y).to(tl.float32)
    cos = tl.load(cos_TW + t * (W // 2) + angle, mask=column < W, other=1.0).to(tl.float32)
    sin = tl.load(sin_TW + t * (W // 2) + angle, mask=column < W, other=0.0).to(tl.float32)
    turned = x * cos + tl.where(is_first, -y, y) * sin
    out = tl.where(turns, turned, x).to(dtype)
    slot = tl.load(slots_T + t).to(tl.int64)
    tl.store(q_THQ + (t * H + head) * Q + column, out, mask=inside & is_query)
    tl.store(keys + slot * key_stride + (head - H) * Q + column, out, mask=inside & is_key)
    tl.store(values + slot * value_stride + (head - H - C) * Q + column, out, mask=inside & (head >= H + C))
