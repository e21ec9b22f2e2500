"""Sending half of the one-sided dispatch: each token straight into its row of every group that it goes to.

Shape legend: T tokens of this rank, D model width, K top-k. `KP` and `BLOCK` are powers of two that cover K and one
chunk of D.

The receiving rank has a row for every token that any rank may send: rank r's token t lies in row
`order(r) · capacity + t`. So no rank has to know another one's counts, rows are ordered by source, then token, and a
token that does not come leaves its row unused: no slot is noted for it, and nothing reads it.
"""

from __future__ import annotations

from soloist.kernels.flags import PHASE_CHOICES, PHASE_HOME, PHASE_ROWS, count, publish, remote
from soloist.kernels.language import tl, triton

FP8_MAX = tl.constexpr(448.0)  # largest float8_e4m3fn


@triton.jit
def _push_choice(group_K, slot_K, weight_K, bases, peer, row, slots_at, weights_at, K, KP: tl.constexpr, TP):
    """Which slots of peer's group the row goes to: −1 for a choice of another group."""
    k = tl.arange(0, KP)
    here_K = group_K == peer // TP
    tl.store(remote(bases, peer, slots_at, tl.int32) + row * K + k, tl.where(here_K, slot_K, -1), mask=k < K)
    tl.store(remote(bases, peer, weights_at, tl.float32) + row * K + k, weight_K, mask=k < K)


@triton.jit
def push_kernel(
    x_TD, group_TK, slot_TK, weight_TK, bases, calls,
    tokens, capacity, first_row, me, tp, rows_at, scales_at, slots_at, weights_at, flags_at,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, QUANTISE: tl.constexpr, SIGNAL: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs share the chunks of `capacity` rows; tokens beyond `tokens` are noted as going nowhere.

    CHOICES: send slots and gate weights, and count the call; without rows, as one whose rows follow. ROWS: "all" sends rows to every group chosen, "own" to
    this rank alone, "none" to nobody. QUANTISE: rows in fp8 with one fp32 scale each (CHUNKS = 1). SIGNAL: publish.
    STAGES: rows that a program loads ahead.
    """
    program = tl.program_id(0)
    if CHOICES and program == 0:
        count(calls, PHASE_CHOICES)
        count(calls, PHASE_HOME)
        if ROWS == "none":
            count(calls, PHASE_ROWS)
    k = tl.arange(0, KP)
    width = tl.full((), D, tl.int64)
    for unit in tl.range(program, capacity * CHUNKS, tl.num_programs(0), num_stages=STAGES):
        t, chunk = unit // CHUNKS, unit % CHUNKS
        known_K = k < tl.where(t < tokens, K, 0)
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = column < tl.where(t < tokens, D, 0)
        row = first_row + t
        group_K = tl.load(group_TK + t * K + k, mask=known_K, other=-1).to(tl.int32)
        if ROWS != "none":
            x = tl.load(x_TD + t * width + column, mask=inside, other=0.0)
            if QUANTISE:
                scale = tl.maximum(tl.max(tl.abs(x.to(tl.float32)), 0) / FP8_MAX, 1e-12)
                x = (x.to(tl.float32) / scale).to(tl.float8e4nv)
        if CHOICES:
            slot_K = tl.load(slot_TK + t * K + k, mask=known_K, other=-1).to(tl.int32)
            weight_K = tl.load(weight_TK + t * K + k, mask=known_K, other=0.0)
        for step in tl.static_range(RANKS):
            peer = (me + 1 + step) % RANKS
            if CHOICES and chunk == 0:
                _push_choice(group_K, slot_K, weight_K, bases, peer, row, slots_at, weights_at, K, KP, tp)
            if ROWS != "none":
                wanted = tl.max((group_K == peer // tp).to(tl.int32), 0) > 0
                if ROWS == "own":
                    wanted = wanted & (peer == me)
                if wanted:
                    target = remote(bases, peer, rows_at, x.dtype) + row * width
                    tl.store(target + column, x, mask=inside)
                    if QUANTISE:
                        tl.store(remote(bases, peer, scales_at, tl.float32) + row, scale)
    if SIGNAL:
        publish(bases, flags_at, me, RANKS)
