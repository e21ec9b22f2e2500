"""Kernels of paged attention: a tile of queries over a split of its context, and the merge of the splits.

Shape legend: T tokens of the step, N sequences, H query heads, C KV heads, G query heads of a tile, S splits, Q and V
widths of keys and values, M blocks of the longest table, R rows of a tile, B keys of a tile.

One kernel does both. A tile is a few queries of one sequence times the query heads that share a KV head, so that each
key read serves all of them and the tensor cores have rows to work on. Softmax runs over tiles of keys (Milakov and
Gimelshein, arXiv 1805.02867). Where there are fewer tiles than the GPU needs, each tile's context is split and the
parts are merged in order, so that results do not depend on which program ends first (flash-decoding, Dao et al. 2023).

    decode:  one query a sequence   ─┐               ┌─ (one split) ──► out_THV
                                     ├─ tile_kernel ─┤
    prefill: all other sequences    ─┘               └─ partial sums ─ merge_kernel ──► out_THV

Grids follow from shapes that the host knows; lengths and tables are read on the device: a call can be captured.
"""

from __future__ import annotations

import math

from soloist.kernels.follow import follow, release_next
from soloist.kernels.language import tl, triton

LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: a difference of two of them is 0
LOG2_E = tl.constexpr(math.log2(math.e))
SEARCHED = tl.constexpr(512)  # sequences that a round of the search looks at
SHAPES = ["sequences", "blocks", "splits", "rows"]  # differ from step to step: the kernels are compiled once for all


@triton.jit
def _sequence_of(tile, starts_N, sequences, BQ: tl.constexpr):
    """Sequence of a tile of BQ queries; those of sequence i begin at tile start // BQ + i, with gaps."""
    found = 0
    for index in range(0, sequences, SEARCHED):
        index_N = index + tl.arange(0, SEARCHED)
        first_N = tl.load(starts_N + index_N, mask=index_N < sequences, other=1 << 30) // BQ + index_N
        found += tl.sum((first_N <= tile).to(tl.int32), 0)
    return found - 1


@triton.jit
def _slots(table_M, key_B, end, PAGE: tl.constexpr):
    """Cache rows of some keys; those behind the end repeat the last one, which is always safe to read."""
    inside_B = tl.maximum(tl.minimum(key_B, end - 1), 0)
    return tl.load(table_M + inside_B // PAGE).to(tl.int64) * PAGE + inside_B % PAGE


@triton.jit
def _rows(base, at, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """[rows, PADDED]: columns FIRST… of rows of a tensor of WIDTH columns, zeros behind them."""
    column = FIRST + tl.arange(0, PADDED)
    where = base + (at * stride)[:, None] + column[None, :]
    if FIRST + PADDED <= WIDTH:
        return tl.load(where)
    return tl.load(where, mask=(column < WIDTH)[None, :], other=0.0)


@triton.jit
def _row(table_M, tile, end, PAGE: tl.constexpr, B: tl.constexpr):
    """Cache row of the first key of a tile that lies in one block."""
    key = tl.maximum(tl.minimum(tile * B, end - 1), 0)
    return tl.load(table_M + key // PAGE) * PAGE + key % PAGE


@triton.jit
def _weigh(logit_RB, top_R, scale):
    """Weights and the greatest logit so far."""
    higher_R = tl.maximum(top_R, tl.max(logit_RB, 1) * scale)
    return tl.exp2(logit_RB * scale - higher_R[:, None]), higher_R


@triton.jit
def _over_keys(
    acc_RV, top_R, sum_R, q_RA, q_RX, position_R, k_cache, kx_cache, v_cache, table_M, first, last, end, scale,
    k_slot, k_at, v_slot, v_at,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BULK: tl.constexpr, APART: tl.constexpr, SHARED: tl.constexpr,
    PAGE: tl.constexpr, B: tl.constexpr, Q: tl.constexpr, QA: tl.constexpr, QX: tl.constexpr, V: tl.constexpr,
    VP: tl.constexpr,
):  # fmt: skip
    """Tiles of keys first…last into the running softmax: weighted sum, greatest logit (log2) and sum of weights.

    BULK: the caches are descriptors, a tile lies in one block, and the copy engine brings it; otherwise rows are read
    one by one. SHARED: a value is the first VP columns of its key, and is read with it.

    APART: products that feed one another get all warps along the rows, and work twice where rows are few. Sums outside
    the product, and a branch that is always taken, keep the compiler from seeing that they do: warps then divide the
    columns.
    """
    # Where a tile lies is looked up one round ahead, so that no load waits for its address.
    at = _row(table_M, first, end, PAGE, B) if BULK else _slots(table_M, first * B + tl.arange(0, B), end, PAGE)
    for tile in range(first, last):
        key_B = tile * B + tl.arange(0, B)
        k_BA = k_cache.load([at, k_at]) if BULK else _rows(k_cache + k_at, at, k_slot, 0, Q, QA)
        logit_RB = tl.dot(q_RA, k_BA.T, input_precision="ieee")
        if QX > 0:
            k_BX = kx_cache.load([at, k_at + QA]) if BULK else _rows(k_cache + k_at, at, k_slot, QA, Q, QX)
            if APART:
                logit_RB = logit_RB * scale + tl.dot(q_RX, k_BX.T, input_precision="ieee") * scale
            else:
                logit_RB = tl.dot(q_RX, k_BX.T, logit_RB, input_precision="ieee")
        v_BV = k_BA
        if not SHARED:
            v_BV = v_cache.load([at, v_at]) if BULK else _rows(v_cache + v_at, at, v_slot, 0, V, VP)
        at = _row(table_M, tile + 1, end, PAGE, B) if BULK else _slots(table_M, key_B + B, end, PAGE)
        if MASKED:
            seen_RB = key_B[None, :] <= position_R[:, None]
            if WINDOW > 0:
                seen_RB &= key_B[None, :] > position_R[:, None] - WINDOW
            logit_RB = tl.where(seen_RB, logit_RB, float("-inf"))
        weight_RB, higher_R = logit_RB, top_R
        if APART:
            if tile < last:
                weight_RB, higher_R = _weigh(logit_RB, top_R, 1.0 if QX > 0 else scale)
        else:
            weight_RB, higher_R = _weigh(logit_RB, top_R, scale)
        shrink_R = tl.exp2(top_R - higher_R)
        sum_R = sum_R * shrink_R + tl.sum(weight_RB, 1)
        acc_RV = tl.dot(weight_RB.to(v_BV.dtype), v_BV, acc_RV * shrink_R[:, None], input_precision="ieee")
        top_R = higher_R
    return acc_RV, top_R, sum_R


@triton.jit(do_not_specialize=SHAPES)
def tile_kernel(
    q_THQ, k_cache, v_cache, k_bulk, kx_bulk, v_bulk, out_THV, sums, stats, starts_N, lengths_N, tables_NM, heads_CG,
    sinks_H, scale, sequences, blocks, splits, rows, heads, q_token, q_head, k_slot, k_head, v_slot, v_head,
    DECODE: tl.constexpr, SPLIT: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, SHARED: tl.constexpr,
    BULK: tl.constexpr, APART: tl.constexpr, PAGE: tl.constexpr, HEAD_TILES: tl.constexpr, G: tl.constexpr,
    BQ: tl.constexpr, R: tl.constexpr, B: tl.constexpr, Q: tl.constexpr, QA: tl.constexpr, QX: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr,
):  # fmt: skip
    """One tile of BQ queries, one split of its context.

    DECODE: grid (C · HEAD_TILES, N, splits), sequences of one query. Otherwise grid (T // BQ + N, C · HEAD_TILES,
    splits), all others. The logits' scale is in units of log2. `heads_CG` lists the query heads of each head tile, −1
    where there is none. SPLIT: weighted sums go to `sums` [S, rows, H, V], greatest logit and sum of weights to
    `stats` [S, rows, H, 2], where one of `rows` is a sequence (DECODE) or a token.
    """
    release_next()
    if DECODE:
        head_tile, sequence, query = tl.program_id(0), tl.program_id(1), 0
    else:  # the last queries see most keys: they go first
        head_tile, tile = tl.program_id(1), tl.num_programs(0) - 1 - tl.program_id(0)
        sequence = _sequence_of(tile, starts_N, sequences, BQ)
        query = (tile - tl.load(starts_N + sequence) // BQ - sequence) * BQ
    start = tl.load(starts_N + sequence)
    queries, length = tl.load(starts_N + sequence + 1) - start, tl.load(lengths_N + sequence)
    if (query >= queries) | ((queries == 1) ^ DECODE):
        return
    row_R = tl.arange(0, R)
    query_R = query + row_R // G
    head_R = tl.load(heads_CG + head_tile * G + row_R % G)
    used_R = (row_R < BQ * G) & (query_R < queries) & (head_R >= 0)
    token_R, head_R = tl.where(used_R, start + query_R, start), tl.where(used_R, head_R, 0)
    q_R = token_R.to(tl.int64) * q_token + head_R * q_head
    q_RA = _rows(q_THQ, q_R, 1, 0, Q, QA)
    q_RX = _rows(q_THQ, q_R, 1, QA, Q, QX) if QX > 0 else q_RA

    before = length - queries  # tokens of the context before this step's
    position_R = before + query_R
    end = tl.minimum(before + query + BQ, length)
    first, last = 0, (end + B - 1) // B
    if WINDOW > 0:
        first = tl.maximum(before + query - WINDOW + 1, 0) // B
    split = tl.program_id(2)
    if SPLIT:
        each = (last - first + splits - 1) // splits
        first += split * each
        last = tl.minimum(first + each, last)
    kv_head = head_tile // HEAD_TILES
    k_at, v_at = kv_head * k_head, kv_head * v_head
    table_M = tables_NM + sequence.to(tl.int64) * blocks

    acc_RV = tl.zeros((R, VP), tl.float32)
    top_R, sum_R = tl.full((R,), LOWEST, tl.float32), tl.zeros((R,), tl.float32)
    if SINKS and not SPLIT:  # a logit without a value: where the softmax begins
        top_R, sum_R = tl.load(sinks_H + head_R) * LOG2_E, tl.full((R,), 1.0, tl.float32)
    if WINDOW == 0 and (BULK or not DECODE):  # keys that every query of the tile sees
        edge = tl.maximum(first, tl.minimum(last, (before + query + 1) // B))
        k_whole, kx_whole, v_whole = (k_bulk, kx_bulk, v_bulk) if BULK else (k_cache, k_cache, v_cache)
        acc_RV, top_R, sum_R = _over_keys(
            acc_RV, top_R, sum_R, q_RA, q_RX, position_R, k_whole, kx_whole, v_whole, table_M, first, edge, end, scale,
            k_slot, k_at, v_slot, v_at, WINDOW, False, BULK, APART, SHARED, PAGE, B, Q, QA, QX, V, VP,
        )  # fmt: skip
        first = edge
    acc_RV, top_R, sum_R = _over_keys(
        acc_RV, top_R, sum_R, q_RA, q_RX, position_R, k_cache, k_cache, v_cache, table_M, first, last, end, scale,
        k_slot, k_at, v_slot, v_at, WINDOW, True, False, APART, SHARED, PAGE, B, Q, QA, QX, V, VP,
    )  # fmt: skip

    column_V = tl.arange(0, VP)
    if SPLIT:
        at_R = (split * rows).to(tl.int64) + (sequence if DECODE else token_R)
        at_R = at_R * heads + head_R
        tl.store(stats + at_R * 2, top_R, mask=used_R)
        tl.store(stats + at_R * 2 + 1, sum_R, mask=used_R)
        written_RV = (used_R & (sum_R > 0))[:, None] & (column_V < V)[None, :]
        tl.store(sums + at_R[:, None] * V + column_V[None, :], acc_RV, mask=written_RV)
    else:
        out_RV = (acc_RV / tl.where(sum_R > 0, sum_R, 1.0)[:, None]).to(out_THV.dtype.element_ty)
        at_R = token_R.to(tl.int64) * heads + head_R
        written_RV = used_R[:, None] & (column_V < V)[None, :]
        tl.store(out_THV + at_R[:, None] * V + column_V[None, :], out_RV, mask=written_RV)


@triton.jit(do_not_specialize=SHAPES)
def merge_kernel(
    sums, stats, starts_N, sinks_H, out_THV, splits, heads,
    DECODE: tl.constexpr, SINKS: tl.constexpr, SP: tl.constexpr, V: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    """out_THV from the splits of tile_kernel. Grid (rows, H, columns / VB), SP ≥ splits."""
    follow()
    rows, row, head = tl.num_programs(0), tl.program_id(0), tl.program_id(1)
    token = row
    if DECODE:
        token = tl.load(starts_N + row)
        if tl.load(starts_N + row + 1) - token != 1:
            return
    split_S, column_V = tl.arange(0, SP), tl.program_id(2) * VB + tl.arange(0, VB)
    at_S = (split_S.to(tl.int64) * rows + row) * heads + head
    top_S = tl.load(stats + at_S * 2, mask=split_S < splits, other=LOWEST)
    sum_S = tl.load(stats + at_S * 2 + 1, mask=split_S < splits, other=0.0)
    top = tl.max(top_S, 0)
    if SINKS:
        sink = tl.load(sinks_H + head) * LOG2_E
        top = tl.maximum(top, sink)
    weight_S = tl.exp2(top_S - top)
    total = tl.sum(weight_S * sum_S, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    read_SV = (sum_S > 0)[:, None] & (column_V < V)[None, :]
    sum_SV = tl.load(sums + at_S[:, None] * V + column_V[None, :], mask=read_SV, other=0.0)
    out_V = tl.sum(weight_S[:, None] * sum_SV, 0) / tl.where(total > 0, total, 1.0)
    out = out_THV + (token.to(tl.int64) * heads + head) * V + column_V
    tl.store(out, out_V.to(out_THV.dtype.element_ty), mask=column_V < V)
