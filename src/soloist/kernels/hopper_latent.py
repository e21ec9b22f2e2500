"""Decode attention over a latent cache (MLA in its absorbed form) for Hopper, in Gluon.

Shape legend: T tokens, N sequences, H query heads, M blocks of the longest table; R rows of queries, one a head, B keys
of a tile, W columns of a half of their values. A key has 2 W + B = 576 columns, of which the first 2 W are its value.

    weighing group     for each tile:  logits ─► by what the sums shrink ─► weights, into shared memory
    two mixing groups  for each tile:  shrink the sums ─► add weights · values, half of the columns each ─► next keys

64 rows of 512 sums fill the registers of two warpgroups. In FlashMLA (DeepSeek, 2025), which found this, the two also
weigh, each another tile; here a third one does, so that one product waits for memory or softmax while the others work.

No warp is left for loading: Triton rounds up to whole warpgroups, and with a fourth one ptxas gives each thread 128
registers, fewer than a product of 256 columns takes. So who has used up a piece of keys fetches the one that goes where
it lay: the mixing groups their halves, the weighing one what is behind the values.
"""

from __future__ import annotations

from torch import Tensor

from soloist.kernels.follow import release_next
from soloist.kernels.gluon import (
    TensorDescriptor,
    async_load,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

R = gl.constexpr(64)
B = gl.constexpr(64)
W = gl.constexpr(256)
LOWEST = gl.constexpr(-1e30)  # below every logit, and finite: a difference of two of them is 0


@gluon.jit
def _row(table_M, tile, last, PAGE: gl.constexpr):
    """Cache row of the first key of a tile; behind the last one that of the last, which is safe to look up."""
    key = gl.maximum(gl.minimum(tile, last - 1), 0) * B
    return gl.load(table_M + key // PAGE) * PAGE + key % PAGE


@gluon.jit
def _fetch(source, row, column, arrival, into):
    mbarrier.expect(arrival, source.block_type.nbytes)
    async_load(source, [row, column], arrival, into)


@gluon.jit
def _begin(q, q_rest, q_row, context, queries, keys, PAGE: gl.constexpr):
    """Fetch the queries and two tiles."""
    q_smem, qx_smem, asked = queries
    k, k_rest, k_smem, kx_smem, full, rest_full = keys
    table_M, first, last, _ = context
    mbarrier.expect(asked, 2 * q.block_type.nbytes + q_rest.block_type.nbytes)
    for half in gl.static_range(2):
        async_load(q, [q_row, half * W], asked, q_smem.index(half))
    async_load(q_rest, [q_row, 2 * W], asked, qx_smem)
    for step in gl.static_range(2):
        if first + step < last:
            row = _row(table_M, first + step, last, PAGE)
            for half in gl.static_range(2):
                _fetch(k, row, half * W, full.index(2 * step + half), k_smem.index(2 * step + half))
            _fetch(k_rest, row, 2 * W, rest_full.index(step), kx_smem.index(step))


@gluon.jit
def _logits(step, queries, keys):
    """[R, B]"""
    q_smem, qx_smem, _ = queries
    _, _, k_smem, kx_smem, full, rest_full = keys
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    stage, turn = step % 2, step // 2 & 1
    acc_RB = gl.zeros([R, B], gl.float32, MMA)
    for half in gl.static_range(2):
        mbarrier.wait(full.index(2 * stage + half), turn)
        k_WB = k_smem.index(2 * stage + half).permute((1, 0))
        acc_RB = warpgroup_mma(q_smem.index(half), k_WB, acc_RB, use_acc=half > 0, is_async=True)
    mbarrier.wait(rest_full.index(stage), turn)
    acc_RB = warpgroup_mma(qx_smem, kx_smem.index(stage).permute((1, 0)), acc_RB, use_acc=True, is_async=True)
    return warpgroup_mma_wait(0, [acc_RB])


@gluon.jit
def _blank(seen, stage, k_smem):
    """Values of a tile behind the `seen` first become zeros: they have no weight, but may be NaN."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    for half in gl.static_range(2):
        for part in gl.static_range(4):  # few at a time, in few registers
            values = k_smem.index(2 * stage + half).slice(part * (B // 4), B // 4, 0)
            row = part * (B // 4) + gl.arange(0, B // 4, gl.SliceLayout(1, L))
            values.store(gl.where((row < seen).expand_dims(1), values.load(L), 0.0))


@gluon.jit
def _weigh(
    q, q_rest, q_row, stats, scale, used, context, queries, keys, weights,
    SPLIT: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """The weighing warpgroup: the running softmax (Milakov and Gimelshein, arXiv 1805.02867), but for its sums.

    With the weights of a tile go the factors by which sums shrink, and at last those that end the softmax.
    """
    table_M, first, last, end = context
    _, k_rest, k_smem, kx_smem, _, rest_full = keys
    p_smem, factors, ranked, weighed, mixed = weights
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    key = gl.arange(0, B, gl.SliceLayout(0, MMA)).expand_dims(0)
    top_R, sum_R = gl.full([R], LOWEST, gl.float32, ROW), gl.zeros([R], gl.float32, ROW)
    _begin(q, q_rest, q_row, context, queries, keys, PAGE)
    row = _row(table_M, first + 2, last, PAGE)  # looked up a tile ahead: a copy does not wait for its address
    mbarrier.wait(queries[2], 0)
    step = 0
    for tile in range(first, last):
        stage, seen = step % 2, end - tile * B
        logit_RB = _logits(step, queries, keys)
        if seen < B:
            logit_RB = gl.where(key < seen, logit_RB, float("-inf"))
            _blank(seen, stage, k_smem)
        higher_R = gl.maximum(top_R, gl.max(logit_RB, 1) * scale)
        shrink_R = gl.exp2(top_R - higher_R)
        factors.index(stage).store(shrink_R)
        mbarrier.arrive(ranked.index(stage))
        weight_RB = gl.exp2(logit_RB * scale - higher_R.expand_dims(1))
        mbarrier.wait(mixed, step & 1 ^ 1)
        p_smem.store(weight_RB.to(p_smem.dtype))
        fence_async_shared()
        mbarrier.arrive(weighed)
        # What nobody waits for comes last.
        top_R, sum_R = higher_R, sum_R * shrink_R + gl.sum(weight_RB, 1)
        if tile + 2 < last:
            _fetch(k_rest, row, 2 * W, rest_full.index(stage), kx_smem.index(stage))
        row = _row(table_M, tile + 3, last, PAGE)
        step += 1
    last_R = gl.full([R], 1.0, gl.float32, ROW)
    if SPLIT:
        row_R = gl.arange(0, R, ROW)
        gl.store(stats + row_R * 2, top_R, mask=row_R < used)
        gl.store(stats + row_R * 2 + 1, sum_R, mask=row_R < used)
    else:
        last_R = last_R / gl.where(sum_R > 0, sum_R, 1.0)
    factors.index(step % 2).store(last_R)
    mbarrier.arrive(ranked.index(step % 2))


@gluon.jit
def _mix(sums, used, context, keys, weights, HALF: gl.constexpr, PAGE: gl.constexpr):
    """A mixing warpgroup: W columns of the weighted sums."""
    table_M, first, last, _ = context
    k, _, k_smem, _, full, _ = keys
    p_smem, factors, ranked, weighed, mixed = weights
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    acc_RW = gl.zeros([R, W], gl.float32, MMA)
    row = _row(table_M, first + 2, last, PAGE)
    step = 0
    for tile in range(first, last):
        stage, turn = step % 2, step // 2 & 1
        slot = 2 * stage + HALF
        mbarrier.wait(ranked.index(stage), turn)
        acc_RW = acc_RW * factors.index(stage).load(ROW).expand_dims(1)
        mbarrier.wait(full.index(slot), turn)  # long past: by it a copy is seen, not by what others saw
        mbarrier.wait(weighed, step & 1)
        acc_RW = warpgroup_mma(p_smem, k_smem.index(slot), acc_RW, use_acc=True, is_async=True)
        acc_RW = warpgroup_mma_wait(0, [acc_RW])
        if tile + 2 < last:
            _fetch(k, row, HALF * W, full.index(slot), k_smem.index(slot))
        mbarrier.arrive(mixed)
        row = _row(table_M, tile + 3, last, PAGE)
        step += 1
    mbarrier.wait(ranked.index(step % 2), step // 2 & 1)
    acc_RW = acc_RW * factors.index(step % 2).load(ROW).expand_dims(1)
    row_R1 = gl.arange(0, R, ROW).expand_dims(1)
    column_1W = HALF * W + gl.arange(0, W, gl.SliceLayout(0, MMA)).expand_dims(0)
    gl.store(sums + row_R1 * (2 * W) + column_1W, acc_RW.to(sums.dtype.element_ty), mask=row_R1 < used)


@gluon.jit
def _barriers(number: gl.constexpr, count: gl.constexpr):
    """For so many arrivals each."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(number):
        mbarrier.init(barriers.index(index), count=count)
    return barriers


@gluon.jit(do_not_specialize=["blocks", "splits", "rows", "each"])
def latent_kernel(
    q, q_rest, k, k_rest, sums, stats, starts_N, lengths_N, tables_NM, scale, blocks, splits, rows, heads, each,
    SPLIT: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """`each` heads of a query, a split of its context. Grid (H / each, N, splits). Leaves out sequences of several.

    q, k: blocks of [64, W] of queries [T · H, 576] and of the cache [rows, 576]; q_rest, k_rest: of [64, 64]. SPLIT:
    `sums`, `stats` and `rows` as in tile_kernel; otherwise `sums` is out_THV. The logits' scale is in units of log2.
    """
    release_next()
    head, sequence, split = gl.program_id(0) * each, gl.program_id(1), gl.program_id(2)
    token = gl.load(starts_N + sequence)
    single = gl.load(starts_N + sequence + 1) - token == 1
    end, used = gl.where(single, gl.load(lengths_N + sequence), 0), gl.where(single, gl.minimum(each, heads - head), 0)
    tiles = (end + B - 1) // B
    first = split * ((tiles + splits - 1) // splits)
    last = gl.minimum(first + (tiles + splits - 1) // splits, tiles)
    context = tables_NM + gl.cast(sequence, gl.int64) * blocks, first, last, end
    at = gl.cast(split * rows + sequence if SPLIT else token, gl.int64) * heads + head

    q_smem = gl.allocate_shared_memory(q.dtype, [2, R, W], q.layout)
    qx_smem = gl.allocate_shared_memory(q.dtype, [R, B], q.layout)
    k_smem = gl.allocate_shared_memory(k.dtype, [4, B, W], k.layout)
    kx_smem = gl.allocate_shared_memory(k.dtype, [2, B, B], k.layout)
    p_smem = gl.allocate_shared_memory(k.dtype, [R, B], k.layout)
    factors = gl.allocate_shared_memory(gl.float32, [2, R], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = q_smem, qx_smem, _barriers(1, 1).index(0)
    keys = k, k_rest, k_smem, kx_smem, _barriers(4, 1), _barriers(2, 1)
    weights = p_smem, factors, _barriers(2, 1), _barriers(1, 1).index(0), _barriers(1, 2).index(0)
    fence_async_shared()
    sums, stats, q_row = sums + at * (2 * W), stats + at * 2, token * heads + head
    gl.warp_specialize(
        [
            (_weigh, (q, q_rest, q_row, stats, scale, used, context, queries, keys, weights, SPLIT, PAGE)),
            (_mix, (sums, used, context, keys, weights, 0, PAGE)),
            (_mix, (sums, used, context, keys, weights, 1, PAGE)),
        ],
        [4, 4],  # warps of the parts behind the first, which has those of the launch
        [168, 168],  # and their registers
    )


def decode_latent(
    q_THQ: Tensor, k_cache: Tensor, sums: Tensor, stats: Tensor, starts_N: Tensor, lengths_N: Tensor, tables_NM: Tensor,
    scale: float, tiles: int, splits: int, page: int,
) -> None:  # fmt: skip
    """Attention of all sequences of one token, by one or several splits of their contexts.

    q_THQ [T, H, 576] and k_cache [rows, 1, 576], contiguous, in a type of 16 bits; a value is the first 512 columns of
    its key. starts_N [N + 1], lengths_N [N] and tables_NM [N, M] (int32) are those of a PagedBatch, whose blocks have
    `page` tokens, a multiple of 64. `scale`: of the logits, in units of log2. `tiles`: programs that share the heads
    of a query, 64 each at most.

    One split: `sums` is out_THV [T, H, 512], in q's type, and `stats` is not used. Several: sums [splits, N, H, 512]
    and stats [splits, N, H, 2], in fp32, as merge_kernel takes them.
    """
    (_, heads, _), (sequences, blocks) = q_THQ.shape, tables_NM.shape
    layout = gl.NVMMASharedLayout(128, 8 * q_THQ.itemsize, 2)
    descriptors = [
        TensorDescriptor.from_tensor(matrix, [64, columns], layout)
        for matrix in (q_THQ.flatten(0, 1), k_cache.flatten(1))
        for columns in (W.value, B.value)
    ]
    latent_kernel[(tiles, sequences, splits)](
        *descriptors, sums, stats, starts_N, lengths_N, tables_NM, scale, blocks, splits, sequences, heads,
        -(-heads // tiles), SPLIT=splits > 1, PAGE=page, num_warps=4,
    )  # fmt: skip
