"""Collectives of decode over NVLink, each one launch: a sum over ranks with residual and norm, and a gather of columns.

Shape legend: T tokens, D model width, C rows of logits, V columns of all ranks, v those of this one.

Every program has channels of its own to the same program of every peer: two halves of `room` bytes for each source,
used in turn, a flag for each source, and a count of its calls. It writes what it has to say to its peers, raises their
flags, waits for theirs and works on what came. A half is written again two calls later; by then the peer has raised the
flag of the call between, and so has read it. All programs of a launch must be able to run at once.

In Triton's interpreter the ranks run in turn, so sending and receiving can be launched apart: SEND, RECEIVE.
"""

from __future__ import annotations

from soloist.kernels.flags import LINE, await_flag, remote
from soloist.kernels.follow import await_previous, release_next
from soloist.kernels.language import tl, triton

# Arguments for whose values no kernel is compiled: they differ between calls and ranks.
SUM_NUMBERS = ("code", "timeout_ns", "tokens", "me")
GATHER_NUMBERS = ("code", "timeout_ns", "rows", "columns", "me")


@triton.jit
def _channel(at, room, source, call, RANKS: tl.constexpr):
    """Byte at which `source` writes for this program, in this call's half."""
    program = tl.program_id(0)
    return at + ((program * 2 + call % 2) * RANKS + source).to(tl.int64) * room


@triton.jit
def _tell(bases, flags_at, me, RANKS: tl.constexpr):
    """Raise this program's flag at every peer, behind all that its threads wrote."""
    tl.debug_barrier()
    for step in tl.static_range(RANKS - 1):
        flags = remote(bases, (me + 1 + step) % RANKS, flags_at, tl.int64)
        tl.atomic_add(flags + (tl.program_id(0) * RANKS + me) * LINE, 1, sem="release", scope="sys")


@triton.jit
def _hear(flags, call, failed, report, code, timeout_ns, me, RANKS: tl.constexpr):
    """Returns when every peer's same program has told of this call."""
    for step in tl.static_range(RANKS - 1):
        source = (me + 1 + step) % RANKS
        flag = flags + (tl.program_id(0) * RANKS + source) * LINE
        await_flag(flag, call, failed, report + source, code, timeout_ns)
    tl.debug_barrier()


@triton.jit(do_not_specialize=SUM_NUMBERS)
def all_reduce_kernel(
    part_TD, residual_TD, weight_D, sum_TD, normed_TD, bases, calls, flags, failed, report, code, timeout_ns,
    tokens, me, eps, room, data_at, flags_at,
    D: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr, RANKS: tl.constexpr,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, SEND: tl.constexpr, RECEIVE: tl.constexpr,
):  # fmt: skip
    """sum_TD: the sum over ranks in fp32, in order of rank, rounded once; RESIDUAL: plus residual_TD, rounded again.

    NORM: normed_TD = sum / rms(sum) · weight. Programs share the rows. BYTES: of an element.
    """
    await_previous()
    program, programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls + program * LINE)
    column = tl.arange(0, BLOCK)
    dtype = part_TD.dtype.element_ty
    if SEND:
        call += 1
        to = _channel(data_at, room, me, call, RANKS)
        for t in range(program, tokens, programs):
            part = tl.load(part_TD + t * D + column, mask=column < D, other=0.0)
            for step in tl.static_range(RANKS - 1):
                row = remote(bases, (me + 1 + step) % RANKS, to + (t // programs) * (D * BYTES), dtype)
                tl.store(row + column, part, mask=column < D)
        _tell(bases, flags_at, me, RANKS)
        tl.store(calls + program * LINE, call)
    if RECEIVE:
        _hear(flags, call, failed, report, code, timeout_ns, me, RANKS)
        release_next()
        for t in range(program, tokens, programs):
            total = tl.zeros((BLOCK,), tl.float32)
            for source in tl.static_range(RANKS):
                at = _channel(data_at, room, source, call, RANKS) + (t // programs) * (D * BYTES)
                row = remote(bases, me, at, dtype)
                own = source == me
                part = tl.load(row + column, mask=column < tl.where(own, 0, D), other=0.0)
                mine = tl.load(part_TD + t * D + column, mask=column < tl.where(own, D, 0), other=0.0)
                total += part.to(tl.float32) + mine.to(tl.float32)
            x = total.to(dtype)
            if RESIDUAL:
                kept = tl.load(residual_TD + t * D + column, mask=column < D, other=0.0)
                x = (x.to(tl.float32) + kept.to(tl.float32)).to(dtype)
            tl.store(sum_TD + t * D + column, x, mask=column < D)
            if NORM:
                x32 = x.to(tl.float32)
                scale = tl.rsqrt(tl.sum(x32 * x32, 0) / D + eps)
                weight = tl.load(weight_D + column, mask=column < D, other=0.0)
                tl.store(normed_TD + t * D + column, (x32 * scale).to(dtype) * weight, mask=column < D)


@triton.jit(do_not_specialize=GATHER_NUMBERS)
def gather_kernel(
    part_Cv, out_CV, firsts, bases, calls, flags, failed, report, code, timeout_ns,
    rows, columns, me, room, data_at, flags_at,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr, RANKS: tl.constexpr,
    SEND: tl.constexpr, RECEIVE: tl.constexpr,
):  # fmt: skip
    """out_CV: the ranks' columns side by side. firsts [ranks + 1]: where each rank's begin.

    Programs share the rows' CHUNKS of BLOCK columns, as many as the widest rank has. `columns` are all of V.
    """
    await_previous()
    program, programs = tl.program_id(0), tl.num_programs(0)
    call = tl.load(calls + program * LINE)
    column = tl.arange(0, BLOCK)
    dtype = part_Cv.dtype.element_ty  # on a line of its own: Triton takes no type out of a tuple
    first = tl.load(firsts + me)
    width = tl.load(firsts + me + 1) - first
    if SEND:
        call += 1
        to = _channel(data_at, room, me, call, RANKS)
        for unit in range(program, rows * CHUNKS, programs):
            row, at = unit // CHUNKS, unit % CHUNKS * BLOCK
            part = tl.load(part_Cv + row * width + at + column, mask=at + column < width, other=0.0)
            for step in tl.static_range(RANKS - 1):
                there = remote(bases, (me + 1 + step) % RANKS, to + (unit // programs) * (BLOCK * BYTES), dtype)
                tl.store(there + column, part, mask=at + column < width)
            out = out_CV + row * columns + first + at + column
            tl.store(out, part, mask=at + column < width)
        _tell(bases, flags_at, me, RANKS)
        tl.store(calls + program * LINE, call)
    if RECEIVE:
        _hear(flags, call, failed, report, code, timeout_ns, me, RANKS)
        release_next()
        for unit in range(program, rows * CHUNKS, programs):
            row, at = unit // CHUNKS, unit % CHUNKS * BLOCK
            for step in tl.static_range(RANKS - 1):
                source = (me + 1 + step) % RANKS
                theirs = tl.load(firsts + source)
                inside = at + column < tl.load(firsts + source + 1) - theirs
                there = _channel(data_at, room, source, call, RANKS) + (unit // programs) * (BLOCK * BYTES)
                part = tl.load(remote(bases, me, there, dtype) + column, mask=inside, other=0.0)
                tl.store(out_CV + row * columns + theirs + at + column, part, mask=inside)
