"""Clock, fences and waits: all that one GPU does to know what another one has done.

A flag is an int64 in the memory of the rank that waits: how many calls of the exchange, or pieces of calls, its sender
has brought through a phase. It only grows, and the waiting rank compares it with its own count of calls, which lies on
its device as well. So nothing is reset between calls, and a CUDA graph can be replayed.

Publishing: each program of a launch, after a barrier of its threads, counts itself in with release and acquire at the
scope of the GPU; the last one raises the peers' flags with release at system scope. Waiting is an acquire at system
scope. So what any of the sender's programs wrote before is seen by all programs that waited.

No wait is endless. A flag that does not come in time leaves a code in the sender's entry of `report`, which is host
memory; all later waits give up at once, and accuse nobody: those peers may have waited for the same one. The caller
goes on with what is there, so the context survives.

In Triton's interpreter the ranks run in turn: what is not there when a rank looks will never come.
"""

from __future__ import annotations

from soloist.kernels.language import AVAILABLE, INTERPRETED, tl, triton

LINE_BYTES = 128  # one flag a cache line
LINE = tl.constexpr(LINE_BYTES // 8)  # the same in flags
PHASES = ("choices", "rows", "home")  # of a call; the latency form has no phase "rows" of its own
PHASE_CHOICES, PHASE_ROWS, PHASE_HOME = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

if AVAILABLE and not INTERPRETED:
    from triton.language.extra.cuda import globaltimer

    @triton.jit
    def _look(flag):
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [flag], dtype=tl.int64, is_pure=False, pack=1
        )

    @triton.jit
    def await_flag(flag, target, failed, report, code, timeout_ns):
        """Returns when `flag` has reached `target`, or late, with `code` in `report` if nothing was late before."""
        seen = _look(flag)
        if seen < target:
            gave_up = tl.load(failed) != 0
            limit = globaltimer() + tl.where(gave_up, 0, timeout_ns)
            while (seen < target) & (globaltimer() < limit):
                seen = _look(flag)
            if (seen < target) & (gave_up == 0):
                tl.store(report, code)
                tl.store(failed, 1)

else:

    @triton.jit
    def await_flag(flag, target, failed, report, code, timeout_ns):
        if (tl.load(flag) < target) & (tl.load(failed) == 0):
            tl.store(report, code)
            tl.store(failed, 1)


@triton.jit
def remote(bases, peer, at, dtype: tl.constexpr):
    """The address of byte `at` of peer's window."""
    return tl.multiple_of((tl.load(bases + peer) + at).to(tl.pointer_type(dtype)), 16)


@triton.jit
def count(calls, PHASE: tl.constexpr, PIECES: tl.constexpr):
    """One more call with this phase, published in PIECES. `calls` has a line for each phase: the count, then the
    programs counted in."""
    tl.store(calls + PHASE * LINE, tl.load(calls + PHASE * LINE) + PIECES)


@triton.jit
def publish(bases, calls, flags_at, me, PHASE: tl.constexpr, RANKS: tl.constexpr):
    """Tell every rank that all programs of this launch wrote what they had to write. Each program calls it last."""
    arrived = calls + PHASE * LINE + 1
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        for step in tl.static_range(RANKS):
            flags = remote(bases, (me + 1 + step) % RANKS, flags_at, tl.int64)
            tl.atomic_add(flags + (PHASE * RANKS + me) * LINE, 1, sem="release", scope="sys")


@triton.jit
def await_all(flags, calls, failed, report, code, timeout_ns, PHASE: tl.constexpr, RANKS: tl.constexpr, behind=0):
    """Returns when every rank has published this call's phase, but for the last `behind` pieces of it."""
    target = tl.load(calls + PHASE * LINE) - behind
    for source in range(RANKS):
        await_flag(flags + (PHASE * RANKS + source) * LINE, target, failed, report + source, code, timeout_ns)
    tl.debug_barrier()


@triton.jit(do_not_specialize=("me",))
def signal_kernel(bases, calls, flags_at, me, PHASE: tl.constexpr, RANKS: tl.constexpr):
    """Publish what earlier work of the stream wrote. One program."""
    publish(bases, calls, flags_at, me, PHASE, RANKS)


@triton.jit(do_not_specialize=("code", "timeout_ns", "behind"))
def await_kernel(flags, calls, failed, report, code, timeout_ns, PHASE: tl.constexpr, RANKS: tl.constexpr, behind=0):
    """Hold the stream until every rank has published. One program."""
    await_all(flags, calls, failed, report, code, timeout_ns, PHASE, RANKS, behind)
