"""Kernels of one GPU: matrix multiplications, experts, attention. Roofline with the knee rounded off:

    T = launch + (flops^p + bytes^p)^(1/p) + passes

where `flops` and `bytes` are times at the reachable rates, and `passes` the element-wise kernels around experts once
their rows no longer fit into the L2 cache. The knee p is finite because a kernel near the ridge reaches neither limit.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from soloist.errors import ConfigurationError
from soloist.planner.fitting import Constants, Prior
from soloist.planner.routing import activated, imbalance
from soloist.planner.tables import AttentionRow, ExpertRow
from soloist.specs.cluster import GpuSpec

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5625}  # fp4 with its scales
SPELLINGS = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float8": "fp8", "fp8_e4m3": "fp8",
    "nvfp4": "fp4", "mxfp4": "fp4",
}  # fmt: skip
PADDED_TOKENS = 512  # tokens of a rank up to which engines pad to experts instead of gathering
SMALL_PASSES = 9  # twice a sum and its norm: read two, write two; and the router reads
EVEN = ("uniform", "balanced")  # routing of a table
PRODUCTS = ("soloist", "deepgemm", "infersim")  # libraries and sources of which tables have the experts' products alone
TILE = 64  # rows of a GEMM tile: fewer cost as much

GEMM: dict[str, Prior] = {
    "experts_us": Prior(18, 0.4), "gemm_us": Prior(5, 0.4),
    "memory": Prior(0.82, 0.1, 0.95), "fp8": Prior(0.64, 0.15, 0.9), "bf16": Prior(0.8, 0.1, 0.9),
    "passes": Prior(0.6, 0.3, 1.0), "knee": Prior(2.2, 0.15),
}  # fmt: skip
DENSE = ("gemm_us", "memory", "fp8", "bf16", "knee")  # those of a single matrix multiplication
SMALL: dict[str, Prior] = {"kernels_us": Prior(15, 0.7), "memory": Prior(0.6, 0.2, 0.95)}
LAUNCH: dict[str, Prior] = {"launch_us": Prior(60, 0.4)}  # 25 to 60 for one kernel; Triton's look-up of it is longer
STREAM: dict[str, Prior] = {"copy_us": Prior(3, 0.7), "memory": Prior(0.85, 0.1, 0.95)}
ATTENTION: dict[str, dict[str, Prior]] = {
    "decode": {
        "mla_us": Prior(25, 0.5), "gqa_us": Prior(8, 0.3),
        "decode_memory": Prior(0.8, 0.15, 0.95), "decode_flops": Prior(0.65, 0.15, 0.9),
    },
    "prefill": {"prefill_us": Prior(20, 0.5), "prefill_flops": Prior(0.6, 0.1, 0.85)},
}  # fmt: skip


class DecodeAttention(NamedTuple):
    """One layer of one rank. `read`: bytes of KV a token of context; `flops`: of one head and token of context."""

    kind: str  # gqa, mla
    sequences: float
    context: float
    heads: int
    read: float
    flops: float


class ExpertWork(msgspec.Struct, frozen=True, kw_only=True):
    """The experts of one rank in one layer: `pairs` rows in all on `active` experts, each `width` wide.

    `gathered`: rows arrive as tokens of other ranks and have to be scattered to experts and gathered again. The padded
    buffers of low-latency exchanges hold them by expert already, and without exchange the GEMM reads through an index.
    `fused`: the activation belongs to the first GEMM, and what stands around the two is counted with the exchange, as
    our own kernels have it.
    """

    pairs: float
    active: float
    hidden: int
    width: float
    matrices: int = 3
    dtype: str = "bf16"
    gathered: bool = False
    fused: bool = False
    slowdown: float = 1.0  # of the arithmetic, against the calibrated kernels


def dtype_named(text: str) -> str:
    """A data type by any usual name. Raises ConfigurationError for an unknown one."""
    name = SPELLINGS.get(text.lower(), text.lower())
    if name not in BYTES:
        raise ConfigurationError.of("dtype", text, f"unknown; known are {', '.join(BYTES)}")
    return name


def matmul_seconds(m: float, n: float, k: float, dtype: str, gpu: GpuSpec, constants: Constants) -> float:
    """`[m, k] × [k, n]`, weights read from memory once."""
    w = BYTES[dtype]
    rows = max(m, min(TILE, 16))
    moved = w * (k * n + m * k) + 2 * m * n
    return 1e-6 * constants["gemm_us"] + _roof(2 * rows * n * k, moved, dtype, gpu, constants)


def experts_seconds(work: ExpertWork, gpu: GpuSpec, constants: Constants) -> float:
    """Gate and up, activation, down of all experts that have rows."""
    if work.pairs <= 0:
        return 0.0
    w, h, f = BYTES[work.dtype], work.hidden, work.width
    per_expert = work.matrices * h * f
    flops = 2 * per_expert * max(work.pairs, work.active * TILE / 4) * work.slowdown
    hidden = 1 if work.fused else work.matrices - 1
    rows = hidden * f * 2 + f * w + h * w + h * 2  # written and read by the two GEMMs
    moved = w * per_expert * work.active + work.pairs * rows
    return (
        1e-6 * constants["experts_us"] + _roof(flops, moved, work.dtype, gpu, constants)
        + _passes(work, gpu, constants)
    )  # fmt: skip


def grouped_seconds(pairs: float, groups: int, n: int, k: int, dtype: str, gpu: GpuSpec, constants: Constants) -> float:
    """One grouped matrix multiplication, as `torch.nn.functional.grouped_mm` does it."""
    w = BYTES[dtype]
    moved = w * (groups * n * k + pairs * k) + 2 * pairs * n
    return 1e-6 * constants["gemm_us"] + _roof(2 * pairs * n * k, moved, dtype, gpu, constants)


def decode_attention_seconds(work: DecodeAttention, gpu: GpuSpec, constants: Constants) -> float:
    """One token of each sequence against its context."""
    keys = work.sequences * work.context
    moved = keys * work.read / _memory(gpu, constants["decode_memory"])
    flops = keys * work.heads * work.flops / _compute(gpu, "bf16", constants["decode_flops"])
    return 1e-6 * constants[f"{work.kind}_us"] + _blend(moved, flops, 3.0)


def prefill_attention_seconds(
    tokens: float, context: float, heads: int, width: float, gpu: GpuSpec, constants: Constants
) -> float:
    """Causal attention of `tokens` that see `context` tokens on average; `width`: query-key plus value width."""
    flops = 2.0 * tokens * context * heads * width
    return 1e-6 * constants["prefill_us"] + flops / _compute(gpu, "bf16", constants["prefill_flops"])


def stream_seconds(moved: float, gpu: GpuSpec, constants: Constants) -> float:
    """Element-wise work: `moved` bytes read and written."""
    return moved / _memory(gpu, constants["memory"])


def small_seconds(
    tokens: float, hidden: float, columns: float, experts: float, gpu: GpuSpec, constants: Constants
) -> float:
    """A layer's small kernels: four launches, and what they read and write of the residual stream and the heads."""
    moved = 2.0 * tokens * (SMALL_PASSES * hidden + 2 * columns + 2 * experts)
    return 1e-6 * constants["kernels_us"] + moved / _memory(gpu, constants["memory"])


def predict_experts(row: ExpertRow, gpu: GpuSpec, constants: Constants) -> float:
    """Seconds for a row of the `moe_gemm` table. Rows measured with ep = 1 time one grouped matrix multiplication."""
    pairs = row.group_tokens * row.top_k / row.ep
    dtype = dtype_named(row.dtype)
    if row.ep == 1:
        return grouped_seconds(pairs, row.experts, row.ffn, row.hidden, dtype, gpu, constants)
    alpha = _exponent(row.routing)
    fullest = pairs * imbalance(alpha, row.experts, row.ep, row.group_tokens, top_k=row.top_k)
    work = ExpertWork(
        pairs=fullest, active=active_experts(row), hidden=row.hidden, width=row.ffn, dtype=dtype,
        gathered=row.group_tokens / row.ep > PADDED_TOKENS, fused=has_products_alone(row),
    )  # fmt: skip
    return experts_seconds(work, gpu, constants)


def active_experts(row: ExpertRow) -> float:
    """Experts of the row's rank that had rows."""
    return row.active or activated(row.experts / row.ep, row.experts, row.top_k, row.group_tokens)


def has_products_alone(row: ExpertRow) -> bool:
    """Whether the row times the two products and nothing around them, by its library, or its source if it has none."""
    return (row.library or row.source).lower().startswith(PRODUCTS)


def _exponent(routing: str) -> float:
    """Of a power law; 0 for routing that is even. Raises ConfigurationError for an unknown distribution."""
    if exponent := re.fullmatch(r"power_law_(\d+(?:\.\d+)?)", routing):
        return float(exponent[1])
    if routing not in EVEN:
        raise ConfigurationError.of("routing", routing, f"unknown; known are {', '.join(EVEN)} and power_law_1.2")
    return 0.0


def decode_work(row: AttentionRow) -> DecodeAttention:
    """What a decode row of the `attention` table does. MLA is absorbed: keys of rank + rope, values of rank."""
    width = 2.0 * row.width - 64 if row.kind == "mla" else float(row.width)
    read = BYTES[dtype_named(row.dtype)] * row.width * row.kv_heads
    return DecodeAttention(row.kind, row.batch, row.context, row.heads, read, 2.0 * width)


def predict_attention(row: AttentionRow, gpu: GpuSpec, constants: Constants) -> float:
    """Seconds for a row of the `attention` table: the cache's own rows for decode, expanded heads for prefill."""
    if row.phase == "decode":
        return decode_attention_seconds(decode_work(row), gpu, constants)
    seen = row.context - row.new / 2
    return prefill_attention_seconds(row.batch * row.new, seen, row.heads, row.width, gpu, constants)


def _roof(flops: float, moved: float, dtype: str, gpu: GpuSpec, constants: Constants) -> float:
    kind = "fp8" if dtype in ("fp8", "fp4") else "bf16"
    compute = flops / _compute(gpu, dtype, constants[kind])
    return _blend(compute, moved / _memory(gpu, constants["memory"]), constants["knee"])


def _blend(a: float, b: float, p: float) -> float:
    return (a**p + b**p) ** (1 / p)


def _passes(work: ExpertWork, gpu: GpuSpec, constants: Constants) -> float:
    """Activation with quantisation and weighted sum, scatter and gather: what of it spills out of the L2 cache."""
    if work.fused:
        return 0.0
    w = BYTES[work.dtype]
    moved = work.width * (2 * (work.matrices - 1) + w) + 2 * work.hidden
    if work.gathered:
        moved += 2 * work.hidden * w + 2 * work.hidden
    spilled = max(0.0, work.pairs * moved - gpu.l2_MB * 1e6)
    return spilled / _memory(gpu, constants["passes"])


def _compute(gpu: GpuSpec, dtype: str, efficiency: float) -> float:
    return gpu.flops(dtype) * (gpu.mfu or efficiency)


def _memory(gpu: GpuSpec, efficiency: float) -> float:
    return gpu.bandwidth * (gpu.memory_utilization or efficiency)
