"""Clock, fences and waits: all that one GPU does to know what another one has done.

A flag is an int64 in the memory of the rank that waits. It only grows: one call of the exchange adds `CALL` to each
flag of a phase, however many programs of the sender share that, and the waiting rank compares it with the number of
calls with that phase so far, which lies on its device as well. So nothing is reset, and a CUDA graph can be replayed.

Publishing is a release at system scope after a barrier of the program, waiting an acquire: what the sender's programs
wrote before is seen by the programs that waited.

No wait is endless. A flag that does not come in time leaves a code in the sender's entry of `report`, which is host
memory; all later waits give up at once. The caller goes on with what is there, so the context survives.

In Triton's interpreter the ranks run in turn: what is not there when a rank looks will never come.
"""

from __future__ import annotations

from soloist.kernels.language import AVAILABLE, INTERPRETED, tl, triton

CALL = tl.constexpr(1 << 20)
FLAG_BYTES = 128  # one flag a cache line
STRIDE = tl.constexpr(FLAG_BYTES // 8)  # the same in flags
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
        """Returns when `flag` has reached `target`, or late, with `code` in `report`."""
        seen = _look(flag)
        if seen < target:
            limit = globaltimer() + tl.where(tl.load(failed) != 0, 0, timeout_ns)
            while (seen < target) & (globaltimer() < limit):
                seen = _look(flag)
            if seen < target:
                tl.store(report, code)
                tl.store(failed, 1)

else:

    @triton.jit
    def await_flag(flag, target, failed, report, code, timeout_ns):
        if tl.load(flag) < target:
            tl.store(report, code)
            tl.store(failed, 1)


@triton.jit
def remote(bases, peer, at, dtype: tl.constexpr):
    """The address of byte `at` of peer's window."""
    return tl.multiple_of((tl.load(bases + peer) + at).to(tl.pointer_type(dtype)), 16)


@triton.jit
def count(calls, PHASE: tl.constexpr):
    """One more call with this phase: the count stands first in line `PHASE` of `calls`."""
    own = calls + PHASE * STRIDE
    tl.store(own, tl.load(own) + 1)


@triton.jit
def publish(bases, flags_at, me, RANKS: tl.constexpr):
    """Tell every rank that all programs of this launch wrote what they had to write. Each program calls it last."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    share = tl.where(program == 0, CALL - (programs - 1), 1).to(tl.int64)
    tl.debug_barrier()
    for step in range(RANKS):
        flag = remote(bases, (me + 1 + step) % RANKS, flags_at, tl.int64) + me * STRIDE
        tl.atomic_add(flag, share, sem="release", scope="sys")


@triton.jit
def await_all(flags, calls, failed, report, code, timeout_ns, RANKS: tl.constexpr):
    """Returns when every rank has published this call's phase."""
    target = tl.load(calls) * CALL
    for source in range(RANKS):
        await_flag(flags + source * STRIDE, target, failed, report + source, code, timeout_ns)
    tl.debug_barrier()


@triton.jit
def signal_kernel(bases, flags_at, me, RANKS: tl.constexpr):
    """Publish what earlier work of the stream wrote. One program."""
    publish(bases, flags_at, me, RANKS)


@triton.jit
def await_kernel(flags, calls, failed, report, code, timeout_ns, RANKS: tl.constexpr):
    """Hold the stream until every rank has published. One program."""
    await_all(flags, calls, failed, report, code, timeout_ns, RANKS)
