"""Counters of a layer in one launch: choices of each expert, and rows that came.

Shape legend: T tokens, K top-k, E experts, R rows. `KP` is a power of two that covers K.
"""

from __future__ import annotations

from torch import Tensor

from soloist.kernels.language import next_power, tl, triton

BLOCK = 128  # tokens and rows of a program


def count_choices(ids_TK: Tensor, live_T: Tensor | None, slots_RK: Tensor, counts: Tensor) -> None:
    """Add to `counts` (int64 [E + 1]) the choices of live tokens by expert, and last the rows with a slot here.

    slots_RK: −1 for a choice that lies elsewhere. All contiguous.
    """
    (tokens, top_k), rows = ids_TK.shape, len(slots_RK)
    if tokens or rows:
        count_kernel[(-(-max(tokens, rows) // BLOCK),)](
            ids_TK, live_T, slots_RK, counts, tokens, rows, len(counts) - 1,
            K=top_k, KP=next_power(top_k), BLOCK=BLOCK, LIVE=live_T is not None, num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=("tokens", "rows"))
def count_kernel(
    ids_TK, live_T, slots_RK, counts, tokens, rows, experts,
    K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KP)[None, :]
    entry = at[:, None] * K + k
    counted = (at < tokens)[:, None] & (k < K)
    if LIVE:
        counted = counted & (tl.load(live_T + at, mask=at < tokens, other=0) != 0)[:, None]
    expert = tl.load(ids_TK + entry, mask=counted, other=0)
    tl.atomic_add(counts + expert, counted.to(tl.int64), mask=counted, sem="relaxed")
    slot = tl.load(slots_RK + entry, mask=(at < rows)[:, None] & (k < K), other=-1)
    came = tl.max((slot >= 0).to(tl.int32), 1)
    tl.atomic_add(counts + experts, tl.sum(came, 0).to(tl.int64), sem="relaxed")
