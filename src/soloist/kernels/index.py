"""Receiving half of the one-sided dispatch: the index over the rows that arrived, and their expansion.

Shape legend: R rows, K top-k, X expanded rows, S slots, D width. `KP` and `BLOCK` are powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from soloist.kernels.flags import PHASE_CHOICES, await_all
from soloist.kernels.follow import await_previous, follow, release_next
from soloist.kernels.language import next_power, tl, triton


@triton.jit(do_not_specialize=("code", "timeout_ns", "rows"))
def index_kernel(
    slots_RK, weights_RK, flags, calls, failed, report, code, timeout_ns,
    row_X, weight_X, place_RK, offsets_S, rows,
    K: tl.constexpr, KP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a slot, which needs nothing from the others: it counts all choices of lower slots by itself.

    Writes the slot's part of `row_X` and `weight_X`, the end of that part, and to `place_RK` where the row's j-th
    choice in order of slot lies among the expanded rows. RANKS: those to wait for, 0 where nothing travels.
    """
    await_previous()
    slot = tl.program_id(0)
    if RANKS > 0:
        await_all(flags, calls, failed, report, code, timeout_ns, PHASE_CHOICES, RANKS)
    release_next()
    k = tl.arange(0, KP)
    lower = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        seen = (row < rows)[:, None] & (k < K)[None, :]
        slots = tl.load(slots_RK + row[:, None] * K + k[None, :], mask=seen, other=-1)
        lower += tl.sum(((slots >= 0) & (slots < slot)).to(tl.int32), 1)
    place = tl.sum(lower, 0)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        seen = (row < rows)[:, None] & (k < K)[None, :]
        slots = tl.load(slots_RK + row[:, None] * K + k[None, :], mask=seen, other=-1)
        weights = tl.load(weights_RK + row[:, None] * K + k[None, :], mask=seen, other=0.0)
        chosen = tl.max((slots == slot).to(tl.int32), 1)
        at = place + tl.cumsum(chosen, 0) - chosen
        nth = tl.sum(((slots >= 0) & (slots < slot)).to(tl.int32), 1)
        tl.store(row_X + at, row.to(tl.int64), mask=chosen > 0)
        tl.store(weight_X + at, tl.sum(tl.where(slots == slot, weights, 0.0), 1), mask=chosen > 0)
        tl.store(place_RK + row * K + nth, at, mask=chosen > 0)
        place += tl.sum(chosen, 0)
    tl.store(offsets_S + slot, place)


@triton.jit
def _chosen(slots_RK, first, rows, K: tl.constexpr, ROWS: tl.constexpr, SP: tl.constexpr):
    """`[ROWS, SP]`: 1 where a row chose a slot."""
    row, slot = first + tl.arange(0, ROWS), tl.arange(0, SP)
    chosen = tl.zeros((ROWS, SP), tl.int32)
    for k in tl.static_range(K):
        own = tl.load(slots_RK + row * K + k, mask=row < rows, other=-1)
        chosen += (own[:, None] == slot[None, :]).to(tl.int32)
    return chosen


@triton.jit(do_not_specialize=("code", "timeout_ns", "rows"))
def part_counts_kernel(
    slots_RK, flags, calls, failed, report, code, timeout_ns, counts_PS, rows,
    K: tl.constexpr, ROWS: tl.constexpr, SP: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One program for each part of ROWS rows: how many of them chose each slot."""
    await_previous()
    if RANKS > 0:
        await_all(flags, calls, failed, report, code, timeout_ns, PHASE_CHOICES, RANKS)
    release_next()
    part = tl.program_id(0)
    tl.store(counts_PS + part * SP + tl.arange(0, SP), tl.sum(_chosen(slots_RK, part * ROWS, rows, K, ROWS, SP), 0))


@triton.jit(do_not_specialize=("rows", "slots"))
def part_index_kernel(
    slots_RK, weights_RK, counts_PS, row_X, weight_X, place_RK, offsets_S, rows, slots,
    K: tl.constexpr, ROWS: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    """What index_kernel writes, by one program for each part of the rows, which adds up the counts of the others."""
    follow()
    part, slot = tl.program_id(0), tl.arange(0, SP)
    total, before = tl.zeros((SP,), tl.int32), tl.zeros((SP,), tl.int32)
    for first in range(0, tl.num_programs(0), ROWS):
        other = first + tl.arange(0, ROWS)
        there = (other < tl.num_programs(0))[:, None] & (slot < SP)[None, :]
        counts = tl.load(counts_PS + other[:, None] * SP + slot[None, :], mask=there, other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((other < part)[:, None], counts, 0), 0)
    ends = tl.cumsum(total, 0)
    if part == 0:
        tl.store(offsets_S + slot, ends, mask=slot < slots)
    row = part * ROWS + tl.arange(0, ROWS)
    chosen = _chosen(slots_RK, part * ROWS, rows, K, ROWS, SP)
    weights = tl.zeros((ROWS, SP), tl.float32)
    for k in tl.static_range(K):
        own = tl.load(slots_RK + row * K + k, mask=row < rows, other=-1)
        weight = tl.load(weights_RK + row * K + k, mask=row < rows, other=0.0)
        weights += tl.where(own[:, None] == slot[None, :], weight[:, None], 0.0)
    at = (ends - total + before)[None, :] + tl.cumsum(chosen, 0) - chosen
    nth = tl.cumsum(chosen, 1) - chosen
    tl.store(row_X + at, row.to(tl.int64)[:, None] + tl.zeros((ROWS, SP), tl.int64), mask=chosen > 0)
    tl.store(weight_X + at, weights, mask=chosen > 0)
    tl.store(place_RK + row[:, None] * K + nth, at, mask=chosen > 0)


Waits = tuple[Tensor, Tensor, Tensor, Tensor, int, int]  # flags, calls, failed, report, code, timeout_ns
NO_WAITS = None, None, None, None, 0, 0
# Up to so many rows, or from so many slots on, every slot's program goes through all choices by itself: measured on
# H200 (docs/exchange.md).
FEW_ROWS, MANY_SLOTS = 4096, 65


def make_index(
    slots_RK: Tensor, weights_RK: Tensor, rows: int, top_k: int, slots: int, out: tuple[Tensor, Tensor, Tensor, Tensor],
    waits: Waits | None = None, ranks: int = 0, options: Mapping[str, bool] | None = None,
) -> None:  # fmt: skip
    """The index of the first `rows` rows, each with `top_k` local slots (−1: none), when all `ranks` have sent them.

    `out`: row_X, weight_X, place_RK and offsets_S. One launch for few rows; for many two, in which the rows are shared
    out and each choice is looked at twice in all. `options`: of the launches; see `early`.
    """
    waiting, options = waits or NO_WAITS, options or {}
    if rows <= FEW_ROWS or slots >= MANY_SLOTS:
        block = min(2048 if rows > 4096 else 1024, max(16, next_power(rows)))
        index_kernel[(max(slots, 1),)](
            slots_RK, weights_RK, *waiting, *out, rows,
            K=top_k, KP=next_power(top_k), RANKS=ranks, BLOCK=block, num_warps=max(4, block // 128), **options,
        )  # fmt: skip
        return
    padded = max(16, next_power(slots))
    size = max(32, 8192 // padded)  # of a part
    parts, warps = -(-rows // size), size * padded // 1024
    counts_PS = torch.empty(parts, padded, dtype=torch.int32, device=slots_RK.device)
    shape = {"K": top_k, "ROWS": size, "SP": padded, "num_warps": warps, **options}
    part_counts_kernel[(parts,)](slots_RK, *waiting, counts_PS, rows, **shape, RANKS=ranks)
    part_index_kernel[(parts,)](slots_RK, weights_RK, counts_PS, *out, rows, max(slots, 1), **shape)


@triton.jit
def expand_kernel(
    rows_RD, scale_RB, row_X, offsets_S, x_XD, scale_XB, SLOTS: tl.constexpr, SP: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SCALES: tl.constexpr, SCALES_P: tl.constexpr,
):  # fmt: skip
    """x_XD: each row once for every local slot that it chose; and its SCALES scales, if any.

    The slots are gone through side by side. As each has its rows in order, the copies of a row are made at about the
    same time, while it is in the L2.
    """
    index_S = tl.arange(0, SP)
    ends_S = tl.load(offsets_S + index_S, mask=index_S < SLOTS, other=0)
    starts_S = tl.load(offsets_S + index_S - 1, mask=(index_S > 0) & (index_S < SLOTS), other=0)
    longest = tl.max(ends_S - starts_S, 0)
    width = tl.full((), D, tl.int64)
    for unit in range(tl.program_id(0), longest * (SLOTS * CHUNKS), tl.num_programs(0)):
        nth, chunk = unit // CHUNKS, unit % CHUNKS
        slot = nth % SLOTS
        x = tl.load(offsets_S + slot - 1, mask=slot > 0, other=0) + nth // SLOTS
        if x < tl.load(offsets_S + slot):
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            row = tl.load(row_X + x)
            value = tl.load(rows_RD + row * D + column, mask=column < D)
            tl.store(x_XD + x * width + column, value, mask=column < D)
            if SCALES > 0:
                block = tl.arange(0, SCALES_P)
                once = (block < SCALES) & (chunk == 0)
                scale = tl.load(scale_RB + row * SCALES + block, mask=once)
                tl.store(scale_XB + x * SCALES + block, scale, mask=once)


@triton.jit(do_not_specialize=("base", "first", "count", "span", "stride", "skip"))
def spread_kernel(
    rows_RD, scale_R, slots_RK, place_RK, x_XD, base, first, count, span, stride, skip,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """x_XD from `count` rows, each read once, and times its scale where SCALED: `span` of each source, from row `first`
    of its `stride` rows on, the source of order `skip` left out. Row r of the batch is row `r - base` of `rows_RD` and
    `scale_R`.
    """
    k = tl.arange(0, KP)
    width = tl.full((), D, tl.int64)
    for unit in range(tl.program_id(0), count * CHUNKS, tl.num_programs(0)):
        nth, chunk = unit // CHUNKS, unit % CHUNKS
        source = nth // span
        row = (source + (source >= skip).to(tl.int32)) * stride + first + nth % span
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        slot_K = tl.load(slots_RK + row * K + k, mask=k < K, other=-1)
        chosen = tl.sum((slot_K >= 0).to(tl.int32), 0)
        if chosen > 0:
            value = tl.load(rows_RD + (row - base) * width + column, mask=column < D, other=0.0)
            if SCALED:
                value = value.to(tl.float32) * tl.load(scale_R + row - base)
            for j in tl.static_range(MOST):
                place = tl.load(place_RK + row * K + j) * width
                inside = column < tl.where(j < chosen, D, 0)
                tl.store(x_XD + place + column, value.to(x_XD.dtype.element_ty), mask=inside)
