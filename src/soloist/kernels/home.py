"""The way back: the weighted sum of what a row's experts made of it, the row home, the sum over groups.

Shape legend: R rows, K top-k, X expanded rows, D model width, T tokens of this rank, G groups. `KP` and `BLOCK` are
powers of two.

    y_XD ──weigh_kernel──► y_RD   (pull: here, in the window; push: in the window of the row's rank)
                            │ flags
                            ▼
                     home_kernel ──► out_TD, fp32 over the groups in order
"""

from __future__ import annotations

from soloist.kernels.flags import PHASE_HOME, await_all, publish, remote
from soloist.kernels.follow import await_previous, follow, release_next
from soloist.kernels.language import tl, triton


@triton.jit
def _weighted(y_XD, place_K, weight_X, count, column, D: tl.constexpr, MOST: tl.constexpr, LEN: tl.constexpr):
    """fp32, in order of slot. Unrolled, so that all terms are on their way at once.

    Places behind the row's last one are left from earlier calls: they name an expanded row, whose term is not read.
    """
    total = tl.zeros((LEN,), tl.float32)
    for j in tl.static_range(MOST):
        place = tl.load(place_K + j).to(tl.int64)
        weight = tl.where(j < count, tl.load(weight_X + place), 0.0)
        term = tl.load(y_XD + place * D + column, mask=column < tl.where(j < count, D, 0), other=0.0)
        total += weight * term.to(tl.float32)
    return total


@triton.jit(do_not_specialize=("rows", "capacity", "me", "groups", "tp"))
def weigh_kernel(
    y_D, slots_RK, place_RK, weight_X, bases, calls, out_RD,
    rows, capacity, me, groups, tp, home_at, flags_at,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, MOST: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr, WEIGH: tl.constexpr, PUSH: tl.constexpr, SIGNAL: tl.constexpr,
):  # fmt: skip
    """Programs share the chunks of R rows.

    WEIGH: `y_D` is `y_XD` and a row is the sum of its entries; otherwise it is `y_RD`. PUSH: to the window of the rank
    that the row came from, rows without a local slot left out; otherwise to `out_RD`, zeros for those. SIGNAL: publish.
    """
    follow()
    k = tl.arange(0, KP)
    width = tl.full((), D, tl.int64)
    for unit in range(tl.program_id(0), rows * CHUNKS, tl.num_programs(0)):
        nth, chunk = unit // CHUNKS, unit % CHUNKS
        # Those of all ranks by turns, so that the links are in use from beginning to end.
        row = nth % RANKS * capacity + nth // RANKS if PUSH else nth
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = column < D
        slot_K = tl.load(slots_RK + row * K + k, mask=k < K, other=-1)
        count = tl.sum((slot_K >= 0).to(tl.int32), 0)
        if (count > 0) | (not PUSH):
            if WEIGH:
                y = _weighted(y_D, place_RK + row * K, weight_X, count, column, D, MOST, BLOCK)
                y = y.to(y_D.dtype.element_ty)
            else:
                y = tl.load(y_D + row * width + column, mask=inside)
            if PUSH:
                order, t = row // capacity, row % capacity
                source = (order % groups) * tp + order // groups
                at = (me * capacity + t) * width
                tl.store(remote(bases, source, home_at, y.dtype) + at + column, y, mask=inside)
            else:
                tl.store(out_RD + row * width + column, y, mask=inside)
    if SIGNAL:
        publish(bases, calls, flags_at, me, PHASE_HOME, RANKS)


@triton.jit(do_not_specialize=("code", "timeout_ns", "tokens", "capacity", "first_row", "me"))
def home_kernel(
    out_TD, group_TK, bases, flags, calls, failed, report, code, timeout_ns,
    tokens, capacity, first_row, me, from_at,
    D: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, GROUPS: tl.constexpr, TP: tl.constexpr, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNKS: tl.constexpr, PULL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out_TD: for each token the sum over its groups, each rounded once.

    With TP a group's part is the sum of its ranks' partial sums, in order of rank, rounded once. PULL: rows are read
    from the windows of the ranks that made them, row `first_row + t`; otherwise from this rank's, where rank r put them
    in row `r · capacity + t`.
    """
    await_previous()
    await_all(flags, calls, failed, report, code, timeout_ns, PHASE_HOME, RANKS)
    release_next()
    k = tl.arange(0, KP)
    width = tl.full((), D, tl.int64)
    for unit in tl.range(tl.program_id(0), tokens * CHUNKS, tl.num_programs(0), num_stages=STAGES):
        t, chunk = unit // CHUNKS, unit % CHUNKS
        column = chunk * BLOCK + tl.arange(0, BLOCK)
        group_K = tl.load(group_TK + t * K + k, mask=k < K, other=-1).to(tl.int32)
        total = tl.zeros((BLOCK,), tl.float32)
        for group in tl.static_range(GROUPS):
            wanted = column < D * tl.max((group_K == group).to(tl.int32), 0)
            part = tl.zeros((BLOCK,), tl.float32)
            for member in tl.static_range(TP):
                peer = group * TP + member
                holder = peer if PULL else me
                row = (first_row if PULL else peer * capacity) + t
                source = remote(bases, holder, from_at, out_TD.dtype.element_ty) + row * width
                part += tl.load(source + column, mask=wanted, other=0.0).to(tl.float32)
            total += part.to(out_TD.dtype.element_ty).to(tl.float32)
        tl.store(out_TD + t * width + column, total, mask=column < D)
