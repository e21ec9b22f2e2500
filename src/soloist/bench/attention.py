"""Paged attention beside its ceiling: bytes of the context over HBM's rate, or products over the tensor cores'.

    python -m soloist.bench.attention attention.jsonl
    python -m soloist.bench.attention mla.jsonl "decode MLA"      # those loads alone

Shape legend: T tokens, N sequences, H query heads, C KV heads, Q and V widths of keys and values, M blocks of a table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.bench.report import Ceilings, Point, commit, print_table, write_lines
from soloist.kernels.paged_attention import PagedBatch, paged_attention
from soloist.kernels.paged_attention_triton import Tiling, TritonPagedAttention, Widths, tiling
from soloist.probes.gpus import captured
from soloist.timing import measure

Choice = Callable[[Widths, int, bool], Tiling]


@dataclass(frozen=True)
class Inputs:
    """Arguments of paged attention."""

    q_THQ: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: PagedBatch
    kv_head_H: Tensor


@dataclass(frozen=True)
class AttentionLoad:
    """Equal sequences: the last `tokens` of `context` positions are the step's. `latent`: MLA, one row a token."""

    name: str
    sequences: int
    tokens: int
    context: int
    heads: int
    kv_heads: int
    key: int
    value: int
    latent: bool = False
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16

    @property
    def scale(self) -> float:
        return self.key**-0.5

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Random ones; the blocks of a sequence lie anywhere in the cache, rows that no table names hold NaN."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=self.dtype)

        blocks = -(-self.context // self.block_size)
        tables_NM = torch.randperm(self.sequences * blocks, generator=generator, device=device).view(-1, blocks)
        keys = draw(self.sequences * blocks * self.block_size, self.kv_heads, self.key)
        values = keys[..., : self.value] if self.latent else draw(*keys.shape[:2], self.value)
        unused = tables_NM[:, -1:] * self.block_size + torch.arange(self.block_size, device=device)
        unused = unused[:, (self.context - 1) % self.block_size + 1 :].flatten()
        keys[unused], values[unused] = torch.nan, torch.nan
        starts = [i * self.tokens for i in range(self.sequences + 1)]
        batch = PagedBatch.of(starts, [self.context] * self.sequences, tables_NM, self.block_size)
        kv_head_H = torch.arange(self.heads, device=device) // (self.heads // self.kv_heads)
        return Inputs(draw(starts[-1], self.heads, self.key), keys, values, batch, kv_head_H)

    def ceiling(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds, and what they are spent on: each row of the cache read once, or the products of causal attention."""
        width = self.key if self.latent else self.key + self.value
        read = self.sequences * self.context * self.kv_heads * width * self.dtype.itemsize
        seen = self.tokens * self.context - self.tokens * (self.tokens - 1) // 2
        flops = 2 * self.sequences * self.heads * seen * (self.key + self.value)
        memory, compute = read / ceilings.memory, flops / ceilings.flops
        if memory > compute:
            return memory, f"{read / 1e6:.0f} MB of keys and values"
        return compute, f"{flops / 1e12:.3f} TFLOP"


LOADS = [
    AttentionLoad("decode GQA", 64, 1, 4096, 32, 8, 128, 128),
    AttentionLoad("decode GQA", 64, 1, 4096, 32, 4, 128, 128),
    AttentionLoad("decode GQA", 256, 1, 192, 32, 8, 128, 128),
    AttentionLoad("decode GQA", 1, 1, 32768, 32, 8, 128, 128),
    AttentionLoad("decode MLA", 64, 1, 4096, 128, 1, 576, 512, latent=True),
    AttentionLoad("decode MLA", 64, 1, 4096, 64, 1, 576, 512, latent=True),
    AttentionLoad("decode MLA", 64, 1, 4096, 16, 1, 576, 512, latent=True),
    AttentionLoad("prefill GQA", 4, 8000, 8000, 32, 8, 128, 128),
    AttentionLoad("prefill GQA", 16, 2000, 2000, 32, 4, 128, 128),
    AttentionLoad("prefill GQA, cached", 4, 2048, 8192, 32, 8, 128, 128),
    AttentionLoad("prefill MLA", 1, 2048, 2048, 128, 1, 576, 512, latent=True),
]


def check(load: AttentionLoad, device: torch.device, attend: Callable[[Inputs], Tensor]) -> float:
    """Relative error against the definition in fp32, of a few of the sequences. Asserts that it is rounding."""
    few = replace(load, sequences=min(load.sequences, 3), context=min(load.context, 1037), tokens=min(load.tokens, 301))
    made = few.inputs(device, seed=1)
    q_THQ, k_cache, v_cache = (x.float() for x in (made.q_THQ, made.k_cache, made.v_cache))
    want = paged_attention(q_THQ, k_cache, v_cache, made.batch, made.kv_head_H, load.scale)
    error = float((attend(made).float() - want).norm() / want.norm())
    assert error < 0.01, f"{load.name} differs by {error:.4f}"
    return error


def variants(load: AttentionLoad) -> Iterator[tuple[str, AttentionLoad, Choice]]:
    """The kernel as layers run it, and other ways to cut it."""
    yield "paged", load, tiling
    if load.latent and load.tokens > 1:
        yield "paged, columns not divided", load, changed(apart=False)
    if load.latent or load.tokens > 1:
        yield "paged, in blocks of 64", replace(load, block_size=64), tiling
    if load.latent and load.tokens == 1:
        yield "the same, by the portable kernel", replace(load, block_size=64), changed(hopper=False)


def changed(**changes: bool) -> Choice:
    """The usual choice with some fields of its `Tiling` replaced."""
    return lambda *of: replace(tiling(*of), **changes)


def triton_attention(load: AttentionLoad, choose: Choice, device: torch.device) -> Callable[[Inputs], Tensor]:
    """A layer of this shape."""
    kv_head_H = torch.arange(load.heads, device=device) // (load.heads // load.kv_heads)
    layer = TritonPagedAttention(kv_head_H, load.scale, choose=choose)
    return lambda made: layer(made.q_THQ, made.k_cache, made.v_cache, made.batch)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of replays of a CUDA graph."""
    return median(measure(captured(work), repeats=15, device=device))


def sdpa(load: AttentionLoad, device: torch.device) -> Callable[[], Tensor]:
    """What PyTorch's own attention does with the same plain prefill, dense and with nothing paged."""

    def draw(heads: int, width: int) -> Tensor:
        return torch.randn(load.sequences, heads, load.tokens, width, device=device, dtype=load.dtype)

    q, k, v = draw(load.heads, load.key), draw(load.kv_heads, load.key), draw(load.kv_heads, load.value)
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def points(device: torch.device, names: Collection[str] = ()) -> Iterator[Point]:
    """Every load, or those of some names, checked, then timed."""
    machine, at = torch.cuda.get_device_name(device), commit()
    for load in LOADS:
        if names and load.name not in names:
            continue
        shape: dict[str, object] = {"N": load.sequences, "tokens": load.tokens, "context": load.context}
        shape |= {"H": load.heads, "C": load.kv_heads, "width": f"{load.key}/{load.value}"}
        point = partial(Point, load.name, shape=shape, machine=machine, commit=at)
        ceiling_s, bound_by = load.ceiling(Ceilings.of(machine))
        for name, form, choose in variants(load):
            attend = triton_attention(form, choose, device)
            check(form, device, attend)
            taken = seconds(partial(attend, form.inputs(device)), device)
            yield point(name, seconds=taken, ceiling_s=ceiling_s, bound_by=bound_by)
            torch.cuda.empty_cache()
        if load.tokens == load.context and not load.latent:
            taken = seconds(sdpa(load, device), device)
            yield point("SDPA, dense", seconds=taken, ceiling_s=ceiling_s, bound_by=bound_by)


def main(path: Path, names: Collection[str]) -> None:
    """A table; points are written to `path` as they are measured."""
    found = []
    with path.open("w") as file:
        for point in points(torch.device("cuda", torch.cuda.current_device()), names):
            found.append(point)
            write_lines([point], file)
            file.flush()
    print_table(found, explain=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
