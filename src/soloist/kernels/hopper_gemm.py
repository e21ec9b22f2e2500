"""The grouped GEMM of grouped_gemm.py for Hopper, in Gluon: one warp loads, two warpgroups compute.

Shape legend: X expanded rows, S slots, D input width, N output width; M rows of a warpgroup.

    loading warp     for each tile, for each step of D:  wait until the stage is free ─► TMA of rows and weights
    each warpgroup   for each tile, for each step of D:  wait until the stage is full ─► product ─► stage is free

The warpgroups share the weights of a stage and wait for nothing else of each other, so one of them stores its results,
or scales a product, while the tensor cores work for another; and one that has no rows left computes nothing.
"""

from __future__ import annotations

from torch import Tensor

from soloist.kernels.device import processors
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
from soloist.kernels.language import next_power
from soloist.kernels.quantise import FP8

M = gl.constexpr(64)  # rows of a warpgroup; a tile has those of two


@gluon.jit
def _seek(tile, slot, start, end, upto, offsets_S, COLUMNS: gl.constexpr):
    """Go on to the slot of an output tile: its rows, and the first tile behind it."""
    while tile >= upto:
        slot += 1
        start = end
        end = gl.load(offsets_S + slot)
        upto += (end - start + 2 * M - 1) // (2 * M) * COLUMNS
    return slot, start, end, upto


@gluon.jit
def _corner(tile, start, end, upto, COLUMNS: gl.constexpr):
    """First row and column tile: by columns, then rows, so that a slot's row tiles share a weight tile in the L2."""
    tiles = (end - start + 2 * M - 1) // (2 * M)
    within = tile - (upto - tiles * COLUMNS)
    return start + within % tiles * 2 * M, within // tiles


@gluon.jit
def _load(
    x, weight, offsets_S, total, stages,
    D: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GATED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: every step's block of rows and of weights, as soon as a stage is free."""
    x_smem, w_smem, full, empty = stages
    COLUMNS: gl.constexpr = N // BN
    WIDE: gl.constexpr = 2 * BN if GATED else BN
    BYTES: gl.constexpr = x.block_type.nbytes + (WIDE // BN) * weight.block_type.nbytes
    slot, start, end, upto, step = -1, 0, 0, 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        slot, start, end, upto = _seek(tile, slot, start, end, upto, offsets_S, COLUMNS)
        first, n = _corner(tile, start, end, upto, COLUMNS)
        for k in range(D // BK):
            stage = step % STAGES
            arrival = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(arrival, BYTES)
            async_load(x, [first, k * BK], arrival, x_smem.index(stage))
            for part in gl.static_range(WIDE // BN):
                into = w_smem.index(stage).slice(part * BN, BN, 0)
                row = (slot * (WIDE // BN) + part) * N + n * BN
                async_load(weight, [row, k * BK], arrival, into)
            step += 1


@gluon.jit
def _product(step, x_smem, w_smem, full, acc, use_acc, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Begin the product of a step."""
    stage = step % STAGES
    mbarrier.wait(full.index(stage), step // STAGES & 1)
    x, w = x_smem.index(stage).slice(GROUP * M, M, 0), w_smem.index(stage).permute((1, 0))
    return warpgroup_mma(x, w, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _sum(
    step, zero, x_smem, w_smem, full, empty, STEPS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """`[M, 2, WIDE / 2]`: the tensor cores add up by themselves; a stage is free when the next product has begun."""
    acc = warpgroup_mma_wait(1, [_product(step, x_smem, w_smem, full, zero, False, GROUP, STAGES)])
    for _ in range(STEPS - 1):
        acc = _product(step + 1, x_smem, w_smem, full, acc, True, GROUP, STAGES)
        acc = warpgroup_mma_wait(1, [acc])
        mbarrier.arrive(empty.index(step % STAGES))
        step += 1
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(empty.index(step % STAGES))
    return acc.reshape([M, 2, zero.shape[1] // 2])


@gluon.jit
def _sum_blocks(
    slot, first, end, n, step, scale_XB, scale_SN, zero, x_smem, w_smem, full, empty,
    N: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GATED: gl.constexpr, STEPS: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The same for fp8 with a scale for BK columns of a row, and for BK × BK of the weight: two steps at a time, of
    which the first one's product is scaled and added, in fp32, while the second one is under way.

    `[M, 2, WIDE / 2]`, since each half of the columns lies in one block of the weight.
    """
    gl.static_assert(STEPS % 2 == 0)
    acc = zero.reshape([M, 2, zero.shape[1] // 2])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, acc.type.layout))
    HALF: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, acc.type.layout))
    # Rows behind the slot's end take the scales of its last one; what becomes of them is not stored.
    rows = scale_XB + gl.minimum(first + gl.arange(0, M, ROW), end - 1).to(gl.int64) * STEPS
    half = gl.arange(0, 2, HALF)
    if GATED:
        blocks = scale_SN + (slot * 2 * N + half * N + n * BN) // BK * STEPS
    else:
        blocks = scale_SN + (slot * N + n * BN + half * (BN // 2)) // BK * STEPS
    for k in range(0, STEPS, 2):
        one = _product(step, x_smem, w_smem, full, zero, False, GROUP, STAGES)
        two = _product(step + 1, x_smem, w_smem, full, zero, False, GROUP, STAGES)
        scale_one = _outer(gl.load(rows + k), gl.load(blocks + k))
        scale_two = _outer(gl.load(rows + k + 1), gl.load(blocks + k + 1))
        one = warpgroup_mma_wait(1, [one])
        mbarrier.arrive(empty.index(step % STAGES))
        acc += one.reshape(acc.shape) * scale_one
        two = warpgroup_mma_wait(0, [two])
        mbarrier.arrive(empty.index((step + 1) % STAGES))
        acc += two.reshape(acc.shape) * scale_two
        step += 2
    return acc


@gluon.jit
def _outer(scale_M, scale_2):
    return scale_M.expand_dims(1).expand_dims(2) * scale_2.expand_dims(0).expand_dims(2)


@gluon.jit
def _compute(
    results, offsets_S, total, stages, GROUP: gl.constexpr,
    D: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, GATED: gl.constexpr, BLOCKED: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A computing warpgroup: sums, activation, and the results of rows that exist."""
    out_XN, scale_XB, scale_SN = results
    x_smem, w_smem, full, empty = stages
    WIDE: gl.constexpr = 2 * BN if GATED else BN
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDE, 256 // x_smem.dtype.primitive_bitwidth])
    COLUMNS: gl.constexpr = N // BN
    STEPS: gl.constexpr = D // BK
    zero = gl.zeros([M, WIDE], gl.float32, MMA)
    slot, start, end, upto, step = -1, 0, 0, 0, 0
    for tile in range(gl.program_id(0), total, gl.num_programs(0)):
        slot, start, end, upto = _seek(tile, slot, start, end, upto, offsets_S, COLUMNS)
        first, n = _corner(tile, start, end, upto, COLUMNS)
        first += GROUP * M
        if first < end:
            if BLOCKED:
                acc = _sum_blocks(
                    slot, first, end, n, step, scale_XB, scale_SN, zero, x_smem, w_smem, full, empty,
                    N, BN, BK, GATED, STEPS, GROUP, STAGES,
                )  # fmt: skip
            else:
                acc = _sum(step, zero, x_smem, w_smem, full, empty, STEPS, GROUP, STAGES)
            if GATED:
                gate, up = acc.permute((0, 2, 1)).split()
                _store(out_XN, gate / (1 + gl.exp(-gate)) * up, first, end, n * BN, N, BN)
            else:
                low, high = acc.permute((0, 2, 1)).split()
                _store(out_XN, low, first, end, n * BN, N, BN // 2)
                _store(out_XN, high, first, end, n * BN + BN // 2, N, BN // 2)
        else:
            for k in range(step, step + STEPS):
                mbarrier.wait(full.index(k % STAGES), k // STAGES & 1)
                mbarrier.arrive(empty.index(k % STAGES))
        step += STEPS


@gluon.jit
def _store(out_XN, result, first, end, column, N: gl.constexpr, WIDTH: gl.constexpr):
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    value = gl.convert_layout(result.to(out_XN.dtype.element_ty), L)
    row = first + gl.arange(0, M, gl.SliceLayout(1, L))
    column_N = column + gl.arange(0, WIDTH, gl.SliceLayout(0, L))
    out = out_XN + row.to(gl.int64).expand_dims(1) * N + column_N.expand_dims(0)
    gl.store(out, value, mask=(row < end).expand_dims(1))


@gluon.jit
def hopper_kernel(
    x, weight, out_XN, scale_XB, scale_SN, offsets_S,
    SLOTS: gl.constexpr, SP: gl.constexpr, D: gl.constexpr, N: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    GATED: gl.constexpr, BLOCKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """out_XN = x_XD · weight_SND by slot; see grouped_gemm_kernel. x: blocks of [128, BK], weight: of [BN, BK]."""
    WIDE: gl.constexpr = 2 * BN if GATED else BN
    x_smem = gl.allocate_shared_memory(x.dtype, [STAGES, 2 * M, BK], x.layout)
    w_smem = gl.allocate_shared_memory(x.dtype, [STAGES, WIDE, BK], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    # Every warp adds up all of the slots. A sum across warps would go through shared memory, where Triton 3.6 lets one
    # warp lay down the arguments of the parts while another still reads the sum.
    index_S = gl.arange(0, SP, gl.BlockedLayout([SP // 32], [32], [4], [0]))
    inside = index_S < SLOTS
    ends_S = gl.load(offsets_S + index_S, mask=inside, other=0)
    starts_S = gl.load(offsets_S + index_S - 1, mask=inside & (index_S > 0), other=0)
    total = gl.sum((ends_S - starts_S + 2 * M - 1) // (2 * M), 0) * (N // BN)
    results, stages = (out_XN, scale_XB, scale_SN), (x_smem, w_smem, full, empty)
    gl.warp_specialize(
        [
            (_compute, (results, offsets_S, total, stages, 0, D, N, BN, BK, GATED, BLOCKED, STAGES)),
            (_compute, (results, offsets_S, total, stages, 1, D, N, BN, BK, GATED, BLOCKED, STAGES)),
            (_load, (x, weight, offsets_S, total, stages, D, N, BN, BK, GATED, STAGES)),
        ],
        [4, 1],  # warps of the second and third part; the first part has those of the launch
        [232, 24],  # and their registers
    )


def grouped_gemm_hopper(
    x_XD: Tensor, weight_SND: Tensor, offsets_S: Tensor, out_XN: Tensor, gated: bool = False,
    scale_XB: Tensor | None = None, scale_SN: Tensor | None = None, wide: int = 256, stages: int = 3,
) -> None:  # fmt: skip
    """Into out_XN. bf16 or fp16, or fp8 with block scales; arguments as in grouped_gemm.

    wide: columns of a product, half of them gate and half up where `gated`; 128 for fp8.
    """
    slots, height, d = weight_SND.shape
    n = height // 2 if gated else height
    bn, bk = wide // 2 if gated else wide, 128 // x_XD.itemsize
    assert (d % bk, n % bn) == (0, 0), f"tiles of {bn} x {bk} do not divide {n} x {d}"
    layout = gl.NVMMASharedLayout(128, 8 * x_XD.itemsize, 2)
    hopper_kernel[(processors(x_XD.device),)](
        TensorDescriptor.from_tensor(x_XD, [128, bk], layout),
        TensorDescriptor.from_tensor(weight_SND.view(slots * height, d), [bn, bk], layout),
        out_XN, scale_XB, scale_SN, offsets_S,
        SLOTS=slots, SP=max(128, next_power(slots)), D=d, N=n, BN=bn, BK=bk, GATED=gated,
        BLOCKED=x_XD.dtype == FP8, STAGES=stages, num_warps=4,
    )  # fmt: skip
