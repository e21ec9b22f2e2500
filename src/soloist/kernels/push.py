"""Sending half of the one-sided dispatch: each token straight into its row of every group that it goes to.

Shape legend: T tokens of this rank, D model width, K top-k. `KP` and `BLOCK` are powers of two that cover K and one
chunk of D.

The receiving rank has a row for every token that any rank may send: rank r's token t lies in row
`order(r) · capacity + t`. So no rank has to know another one's counts, rows are ordered by source, then token, and a
token that does not come leaves its row unused: no slot is noted for it, and nothing reads it.
"""

from __future__ import annotations

from soloist.kernels.flags import PHASE_CHOICES, PHASE_HOME, PHASE_ROWS, count, publish, remote
from soloist.kernels.follow import follow
from soloist.kernels.language import tl, triton
from soloist.kernels.quantise import to_fp8

NUMBERS = ("tokens", "capacity", "first_row", "me", "tp")  # not compiled for: see kernels/language.py
SPAN = tl.constexpr(256)  # choices that a program sends at a time


@triton.jit
def _push_choices(
    group_TK, slot_TK, weight_TK, bases, known, room, first, me, tp, slots_at, weights_at, RANKS: tl.constexpr
):  # fmt: skip
    """Entries `first …` of the choices to every rank: −1 where the choice is another group's, or there is no token."""
    entry = first + tl.arange(0, SPAN)
    group = tl.load(group_TK + entry, mask=entry < known, other=-1).to(tl.int32)
    slot = tl.load(slot_TK + entry, mask=entry < known, other=-1).to(tl.int32)
    weight = tl.load(weight_TK + entry, mask=entry < known, other=0.0)
    for step in tl.static_range(RANKS):
        peer = (me + 1 + step) % RANKS
        slots, weights = remote(bases, peer, slots_at, tl.int32), remote(bases, peer, weights_at, tl.float32)
        tl.store(slots + entry, tl.where(group == peer // tp, slot, -1), mask=entry < room)
        tl.store(weights + entry, weight, mask=entry < room)


@triton.jit(do_not_specialize=NUMBERS)
def push_kernel(
    x_TD, group_TK, slot_TK, weight_TK, bases, calls,
    tokens, capacity, first_row, me, tp, rows_at, scales_at, slots_at, weights_at, flags_at,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, QUANTISE: tl.constexpr, SIGNAL: tl.constexpr,
    PIECES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs share `capacity` tokens, those beyond `tokens` going nowhere, and the chunks of their rows.

    CHOICES: send slots and gate weights, and count the call; without rows, as one whose rows follow in PIECES. ROWS:
    "all" sends rows to every group chosen, "own" to this rank where chosen, "stage" to this rank always, "none" to
    nobody. QUANTISE: rows in fp8 with one fp32 scale each (CHUNKS = 1). SIGNAL: publish. STAGES: rows that a program
    loads ahead.
    """
    follow()
    program = tl.program_id(0)
    if CHOICES:
        if program == 0:
            count(calls, PHASE_CHOICES, 1)
            count(calls, PHASE_HOME, 1)
            if ROWS == "none":
                count(calls, PHASE_ROWS, PIECES)
        # The row of a token says where its choices lie, maybe behind byte 2^31 of the window.
        ahead = tl.full((), 4 * K, tl.int64) * first_row
        for block in range(program, (capacity * K + SPAN - 1) // SPAN, tl.num_programs(0)):
            _push_choices(
                group_TK, slot_TK, weight_TK, bases, tokens * K, capacity * K, block * SPAN, me, tp,
                slots_at + ahead, weights_at + ahead, RANKS,
            )  # fmt: skip
    if ROWS != "none":
        k = tl.arange(0, KP)
        width = tl.full((), D, tl.int64)
        for unit in tl.range(program, tokens * CHUNKS, tl.num_programs(0), num_stages=STAGES):
            t, chunk = unit // CHUNKS, unit % CHUNKS
            column = chunk * BLOCK + tl.arange(0, BLOCK)
            row = first_row + t
            group_K = tl.load(group_TK + t * K + k, mask=k < K, other=-1).to(tl.int32)
            x = tl.load(x_TD + t * width + column, mask=column < D, other=0.0)
            if QUANTISE:
                x, scale_1 = to_fp8(x, 0)
            for step in tl.static_range(RANKS):
                peer = (me + 1 + step) % RANKS
                # The last step is this rank itself.
                if ROWS == "all" or step == RANKS - 1:
                    wanted = tl.max((group_K == peer // tp).to(tl.int32), 0)
                    if ROWS == "stage" or wanted > 0:
                        tl.store(remote(bases, peer, rows_at, x.dtype) + row * width + column, x, mask=column < D)
                        if QUANTISE:
                            tl.store(remote(bases, peer, scales_at, tl.float32) + row + tl.arange(0, 1), scale_1)
    if SIGNAL:
        publish(bases, calls, flags_at, me, PHASE_CHOICES if CHOICES else PHASE_ROWS, RANKS)
