"""What calibrates the cost of kernels: matrix multiplications, experts, attention and streams, as the engine runs them.

Shape legend: R rows, D model width, F expert width, X expanded rows, S slots, T tokens, H query heads, C KV heads,
Q and V widths of keys and values, N sequences, M blocks of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from soloist.dispatch.base import ExpertBatch
from soloist.kernels.attention import attention_of
from soloist.kernels.experts import choose_tiles, fits, swiglu_experts
from soloist.kernels.paged_attention import PagedBatch
from soloist.moe.experts import Experts
from soloist.probes import device as probe
from soloist.probes.records import NAMES, Record
from soloist.specs.model import ExpertSpec

SPREAD = 2  # ranks over which the probed experts are thought to be spread: this one holds its share of them
BLOCK = {"cuda": 64, "cpu": 16}  # tokens of a KV block, as the engine has them
BOUND = 4096  # tokens of context that a captured decoding step is cut for, where none has more (engine/graphs.py)
DRAWS, MANY = 16, 1024  # of routings; so many tokens are typical anyway
FEW, DIFFERENT = 32, 8  # up to so many tokens, so many different choices in turn, lest the cache holds the experts


@dataclass(frozen=True)
class ExpertShape:
    """Experts of one rank; `top_k` of `SPREAD` times as many are chosen by each token."""

    d_model: int
    width: int
    local: int
    top_k: int


@dataclass(frozen=True)
class Heads:
    """Attention of one layer on one rank. Of MLA: one latent row of `key` a token, whose first part is the value."""

    kind: str
    heads: int
    kv_heads: int
    key: int
    value: int


# -- matrix multiplications and streams -------------------------------------------------------------------------------
MATRICES = {
    "cuda": [
        (4096, 4096),
        (2048, 4096),
        (4096, 2048),
        (6144, 4096),
        (12288, 4096),
        (32768, 4096),
        (1024, 2048),
        (2048, 2048),
        (3072, 2048),
        (5120, 2048),
        (65536, 2048),
    ],
    "cpu": [(256, 256), (1024, 256), (256, 1024), (1024, 1024)],
}
ROWS = {"cuda": [1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192], "cpu": [1, 4, 16, 64, 256]}
STREAMS = {"cuda": [1 << 16, 1 << 20, 1 << 23, 1 << 26, 1 << 29], "cpu": [1 << 16, 1 << 20, 1 << 24]}


def matmuls(device: torch.device, dtype: torch.dtype, gpu: str) -> Iterator[Record]:
    """Dense matrix multiplications."""
    for (n, k), m in product(MATRICES[device.type], ROWS[device.type]):
        shape = {"gpu": gpu, "dtype": NAMES[dtype], "m": m, "n": n, "k": k}
        yield Record("matmul", shape, probe.matmul_seconds(m, n, k, dtype, device))


def streams(device: torch.device, gpu: str) -> Iterator[Record]:
    """Element-wise kernels."""
    for size in STREAMS[device.type]:
        yield Record("stream", {"gpu": gpu, "bytes": size}, probe.streaming_seconds(size, device))


# -- experts ----------------------------------------------------------------------------------------------------------
EXPERTS = {
    "cuda": [ExpertShape(4096, 14336, 8, 2), ExpertShape(4096, 14336, 16, 4), ExpertShape(4096, 7168, 16, 4),
             ExpertShape(2048, 1024, 64, 8), ExpertShape(2048, 512, 128, 16), ExpertShape(4096, 2048, 32, 4)],
    "cpu": [ExpertShape(256, 512, 8, 2), ExpertShape(256, 128, 16, 4)],
}  # fmt: skip
TOKENS = {"cuda": [1, 2, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384], "cpu": [1, 8, 64, 256]}


def experts(device: torch.device, dtype: torch.dtype, gpu: str) -> Iterator[Record]:
    """Gate and up, activation and down of a rank's experts under uniform routing."""
    for shape in EXPERTS[device.type]:
        gate_up = torch.empty(shape.local, 2 * shape.width, shape.d_model, device=device, dtype=dtype).normal_(0, 0.02)
        down = torch.empty(shape.local, shape.d_model, shape.width, device=device, dtype=dtype).normal_(0, 0.02)
        for tokens in TOKENS[device.type]:
            seeds = range(DIFFERENT if tokens <= FEW else 1)
            batches = [_routed(tokens, shape, device, dtype, seed) for seed in seeds]
            columns = {
                "gpu": gpu, "dtype": NAMES[dtype], "hidden": shape.d_model, "ffn": shape.width,
                "experts": SPREAD * shape.local, "top_k": shape.top_k, "ep": SPREAD, "group_tokens": tokens,
                "routing": "uniform", "library": "soloist", "active": _active(batches),
            }  # fmt: skip
            works = [_feed_forward(shape, batch, gate_up, down) for batch in batches]
            taken = probe.seconds(lambda works=works: [work() for work in works], device)
            yield Record("moe_gemm", columns, taken / len(works))
        del gate_up, down


def _routed(tokens: int, shape: ExpertShape, device: torch.device, dtype: torch.dtype, seed: int) -> ExpertBatch:
    """Rows of all ranks that chose an expert of this one."""
    generator = torch.Generator(device).manual_seed(tokens + 1009 * seed)
    ids_TK = _typical(tokens, shape, generator)
    chosen = (ids_TK < shape.local).flatten().nonzero()[:, 0]
    slot_X, order = ids_TK.flatten()[chosen].sort(stable=True)
    row_X = chosen[order] // shape.top_k
    offsets_S = torch.bincount(slot_X, minlength=shape.local).cumsum(0).int()
    rows_RD = torch.randn(tokens, shape.d_model, device=device).to(dtype)
    weight_X = torch.full((len(row_X),), 1.0 / shape.top_k, device=device)
    return ExpertBatch(rows_RD, row_X.to(device), weight_X, offsets_S.to(device), None, dense=False)


def _active(batches: Sequence[ExpertBatch]) -> float:
    """Experts that had rows, on average of the batches."""
    counts = [batch.offsets_S.diff(prepend=batch.offsets_S.new_zeros(1)).count_nonzero() for batch in batches]
    return sum(map(int, counts)) / len(batches)


def _typical(tokens: int, shape: ExpertShape, generator: torch.Generator) -> Tensor:
    """Of some draws the one whose rows and active experts on this rank are nearest to what is expected of them."""
    experts = SPREAD * shape.local
    rows, active = tokens * shape.top_k / SPREAD, shape.local * (1 - (1 - shape.top_k / experts) ** tokens)

    def odd(ids_TK: Tensor) -> float:
        here = ids_TK[ids_TK < shape.local]
        return abs(len(here) / rows - 1) + abs(len(here.unique()) / active - 1)

    number = DRAWS if tokens < MANY else 1
    draws = [_drawn(tokens, experts, shape.top_k, generator) for _ in range(number)]
    return min(draws, key=odd)


def _drawn(tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """ids_TK of a uniform routing."""
    return torch.rand(tokens, experts, generator=generator, device=generator.device).topk(top_k).indices


def _feed_forward(shape: ExpertShape, batch: ExpertBatch, gate_up: Tensor, down: Tensor) -> Callable[[], object]:
    """As the engine does it: the fused kernels on a GPU, from rows that the dispatch has expanded where it does so."""
    tiles = choose_tiles(len(batch.rows_RD) * shape.top_k / (SPREAD * shape.local), shape.width)
    if not batch.rows_RD.is_cuda or not fits(tiles, shape.d_model, shape.width):
        layer = Experts(ExpertSpec(width=shape.width), shape.top_k, gate_up, down)
        return lambda: layer.forward(batch)
    x_XD = None if tiles.gather else batch.rows_RD[batch.row_X]
    arguments = (batch.rows_RD, batch.row_X, batch.offsets_S, gate_up, down, tiles, x_XD)
    return lambda: swiglu_experts(*arguments)


# -- attention --------------------------------------------------------------------------------------------------------
HEADS = {
    "cuda": [Heads("gqa", 32, 32, 128, 128), Heads("gqa", 32, 4, 128, 128), Heads("gqa", 16, 4, 128, 128),
             Heads("mla", 16, 1, 576, 512)],
    "cpu": [Heads("gqa", 4, 2, 32, 32)],
}  # fmt: skip
DECODES = {  # sequences, context
    "cuda": [(1, 512), (1, 8192), (8, 2048), (32, 256), (32, 4096), (64, 1024), (128, 128), (128, 512), (256, 256)],
    "cpu": [(1, 64), (4, 128), (8, 256)],
}
PREFILLS = {  # sequences, new tokens, context
    "cuda": [(1, 512, 512), (4, 512, 512), (16, 256, 256), (1, 2048, 2048), (4, 2048, 2048), (1, 8192, 8192),
             (1, 2048, 4096), (1, 2048, 8192), (2, 1024, 4096)],
    "cpu": [(1, 64, 64), (2, 128, 128), (1, 64, 256)],
}  # fmt: skip


def attentions(device: torch.device, dtype: torch.dtype, gpu: str) -> Iterator[Record]:
    """Attention over the paged cache: one token a sequence, and prompts or the last parts of them."""
    for heads in HEADS[device.type]:
        points = [("decode", n, 1, context) for n, context in DECODES[device.type]]
        points += [("prefill", *point) for point in PREFILLS[device.type] if heads.kind == "gqa"]
        for phase, sequences, tokens, context in points:
            taken = _attention_seconds(heads, sequences, tokens, context, device, dtype)
            columns = {
                "gpu": gpu, "phase": phase, "kind": heads.kind, "heads": heads.heads, "kv_heads": heads.kv_heads,
                "width": heads.key if heads.kind == "mla" else heads.key + heads.value, "batch": sequences,
                "tokens": tokens, "context": context, "dtype": NAMES[dtype],
            }  # fmt: skip
            yield Record("attention", columns, taken)


def _attention_seconds(
    heads: Heads, sequences: int, tokens: int, context: int, device: torch.device, dtype: torch.dtype
) -> float:
    """The layer's attention on equal sequences, their blocks anywhere in a cache that nobody has just read."""
    size = BLOCK[device.type]
    blocks = -(-context // size)
    tables_NM = torch.randperm(sequences * blocks).view(sequences, blocks).int().to(device)
    if tokens == 1:
        tables_NM = F.pad(tables_NM, (0, max(0, BOUND // size - blocks)))
    latent = heads.kind == "mla"
    width = heads.key if latent else heads.key + heads.value
    copies = probe.cold_copies(sequences * blocks * size * heads.kv_heads * width * dtype.itemsize, device)
    rows = (copies, sequences * blocks * size, heads.kv_heads)
    keys = torch.randn(*rows, heads.key, device=device, dtype=dtype)
    values = keys[..., : heads.value] if latent else torch.randn(*rows, heads.value, device=device, dtype=dtype)
    q_THQ = torch.randn(sequences * tokens, heads.heads, heads.key, device=device, dtype=dtype)
    batch = PagedBatch.of([i * tokens for i in range(sequences + 1)], [context] * sequences, tables_NM, size)
    kv_head_H = torch.arange(heads.heads, device=device) // (heads.heads // heads.kv_heads)
    attend = attention_of(kv_head_H, heads.key**-0.5, None, None, dtype, heads.key, heads.value)

    def all_copies() -> None:
        for key_cache, value_cache in zip(keys, values, strict=True):
            attend(q_THQ, key_cache, value_cache, batch)

    return probe.seconds(all_copies, device) / copies
