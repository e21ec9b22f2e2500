"""Receiving half of the one-sided dispatch: the index over the rows that arrived, and their expansion.

Shape legend: R rows, K top-k, X expanded rows, S slots, D width. `KP` and `BLOCK` are powers of two.
"""

from __future__ import annotations

from soloist.kernels.flags import PHASE_CHOICES, await_all
from soloist.kernels.follow import await_previous, release_next
from soloist.kernels.language import next_power, tl, triton


@triton.jit
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


def index_block(rows: int) -> int:
    """BLOCK of `index_kernel`."""
    return min(2048 if rows > 4096 else 1024, max(16, next_power(rows)))


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


@triton.jit
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
