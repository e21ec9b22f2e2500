"""Attention over a paged KV cache in Triton: how a step is cut into launches. Kernels: paged_attention_kernels.py.

Shape legend: T tokens of the step, N sequences, H query heads, C KV heads, G query heads of a tile, S splits, Q and V
widths of keys and values, M blocks of the longest table.

Grids follow from shapes that the host knows, lengths and tables are read on the device: nothing waits for the GPU, and
a step of single tokens can be captured in a CUDA graph and replayed with other lengths and tables of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from soloist.kernels.device import generation, processors
from soloist.kernels.follow import early
from soloist.kernels.language import TensorDescriptor, next_power
from soloist.kernels.paged_attention import PagedBatch
from soloist.kernels.paged_attention_kernels import merge_kernel, tile_kernel

WIDEST = 512  # values; keys may be a quarter wider
PARTIAL_BYTES = 128 << 20  # of all splits together
FEWEST_KEYS, MOST_KEYS = 256, 4096  # of a split
SHARED_MEMORY = 224 << 10  # bytes of an SM of Hopper that tiles may take
MERGED = 1024  # numbers of all splits together that a warp of the merge takes


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut.

    `per_sm`: programs that keep an SM busy. `apart`: the warps of a product divide its columns. `bulk`: the copy engine
    reads tiles that lie in one block. `hopper`: by hopper_latent.py where it serves the call.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    per_sm: int = 2
    apart: bool = False
    bulk: bool = False
    hopper: bool = False


@dataclass(frozen=True)
class Widths:
    """Columns as powers of two: a key is `first` and `rest` (0: none) of them, a value `values`."""

    key: int
    value: int
    first: int
    rest: int
    values: int
    shared: bool  # a value is the first columns of its key

    @classmethod
    def of(cls, key: int, value: int, shared: bool) -> Widths:
        """A key of 576 columns as 512 and 64, not as 1024."""
        whole = _power_of_two(key)
        first, rest = whole // 2, _power_of_two(max(1, key - whole // 2))
        if whole == key or first + rest >= whole:
            first, rest = whole, 0
        shared &= value <= first
        return cls(key, value, first, rest, first if shared else _power_of_two(value), shared)


def _power_of_two(number: int) -> int:
    return max(16, next_power(number))  # the least that a tensor core multiplies


def tiling(widths: Widths, group: int, decode: bool) -> Tiling:
    """For `group` query heads a KV head. Measured on H100: 128/128 in groups of 4 and 8, 576/512; others by analogy."""
    if widths.values > 256:  # 64 rows of sums fill the registers of 8 warps
        many = Tiling(64, 64, 8, 2, per_sm=1, apart=True, bulk=True, hopper=decode)
        return Tiling(16, 32, 4, 3, hopper=True) if decode and group <= 16 else many
    if not decode:
        return Tiling(128, 64, 4, 2, bulk=True) if widths.values <= 128 else Tiling(64, 64, 4, 2)
    return Tiling(min(64, _power_of_two(group)), 32, 2 if group <= 32 else 4, 4)


def supports(dtype: torch.dtype, key: int, value: int) -> bool:
    """Whether the kernels serve a cache of this type and these widths on a GPU."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and value <= WIDEST and key <= WIDEST * 5 // 4


def fitted(cut: Tiling, widths: Widths, itemsize: int) -> Tiling:
    """With as few keys in a tile as shared memory allows."""
    key, value = widths.first + widths.rest, 0 if widths.shared else widths.values
    while itemsize * (cut.rows * key + cut.stages * cut.keys * (key + value)) > SHARED_MEMORY:
        cut = replace(cut, keys=cut.keys // 2)
    return cut


class HeadTiles:
    """Which query heads a tile holds: those of one KV head, in several tiles where they are more than its rows."""

    def __init__(self, kv_heads: list[int], rows: int, device: torch.device) -> None:
        groups = [[h for h, c in enumerate(kv_heads) if c == kv] for kv in range(max(kv_heads) + 1)]
        largest = max(len(group) for group in groups)
        self.each = -(-largest // rows)  # tiles of a KV head
        self.heads = -(-largest // self.each)  # of a tile
        padded = [group + [-1] * (self.each * self.heads - len(group)) for group in groups]
        self.index_CG = torch.tensor(padded, dtype=torch.int32, device=device).view(-1, self.heads)

    def __len__(self) -> int:
        return len(self.index_CG)


class TritonPagedAttention:
    """`paged_attention` of one layer, for bf16 and fp16 on a GPU, and fp32 and fp16 in Triton's interpreter."""

    def __init__(
        self,
        kv_head_H: Tensor,
        scale: float,
        window: int | None = None,
        sinks_H: Tensor | None = None,
        choose: Callable[[Widths, int, bool], Tiling] = tiling,
    ) -> None:
        self.kv_heads, self.device = kv_head_H.tolist(), kv_head_H.device
        self.window, self.choose = window, choose
        self.scale = scale * math.log2(math.e)
        self.sinks_H = None if sinks_H is None else sinks_H.float()
        self.group = max(map(self.kv_heads.count, self.kv_heads), default=0)
        self.tiles: dict[int, HeadTiles] = {}

    def __call__(self, q_THQ: Tensor, k_cache: Tensor, v_cache: Tensor, batch: PagedBatch) -> Tensor:
        """out_THV; the arguments are those of `paged_attention`."""
        out_THV = q_THQ.new_empty(*q_THQ.shape[:2], v_cache.shape[-1])
        if out_THV.numel() == 0:
            return out_THV
        call = _Call(self, q_THQ, k_cache, v_cache, batch, out_THV)
        counts = set(batch.counts)
        if max(counts) > 1:  # first: its merge also writes the rows of single tokens
            call.launch(decode=False)
        if 1 in counts:
            call.launch(decode=True)
        return out_THV

    def head_tiles(self, rows: int) -> HeadTiles:
        """Made in the first call, before any capture."""
        if rows not in self.tiles:
            self.tiles[rows] = HeadTiles(self.kv_heads, rows, self.device)
        return self.tiles[rows]


@dataclass(frozen=True)
class _Call:
    """One step of one layer."""

    layer: TritonPagedAttention
    q_THQ: Tensor
    k_cache: Tensor
    v_cache: Tensor
    batch: PagedBatch
    out_THV: Tensor

    def launch(self, decode: bool) -> None:
        """All sequences of one token, or all others."""
        (tokens, heads, _), (sequences, blocks) = self.q_THQ.shape, self.batch.tables_NM.shape
        widths = Widths.of(self.k_cache.shape[-1], self.v_cache.shape[-1], self._is_shared())
        cut = self._cut(widths, decode)
        tiles = self.layer.head_tiles(cut.rows)
        queries = 1 if decode else cut.rows // tiles.heads  # of a tile
        grid = (len(tiles), sequences) if decode else (tokens // queries + sequences, len(tiles))
        rows = sequences if decode else tokens
        choices = _choices(blocks * self.batch.block_size, decode, rows * heads * widths.value)
        splits = splits_of(math.prod(grid), choices, processors(self.out_THV.device), cut.per_sm)
        parts = self._parts(splits, rows, decode)
        if cut.hopper:
            self._decode_latent(len(tiles), *parts)
        else:
            self._tiles(grid, decode, widths, cut, tiles, *parts)
        if splits > 1:
            self._merge(rows, decode, *parts)

    def _cut(self, widths: Widths, decode: bool) -> Tiling:
        cut = self.layer.choose(widths, self.layer.group, decode)
        if decode and cut.hopper and self._suits_hopper(widths):
            return replace(cut, rows=64, per_sm=1)  # what a program takes, and all of an SM
        return fitted(replace(cut, hopper=False), widths, self.q_THQ.itemsize)

    def _suits_hopper(self, widths: Widths) -> bool:
        """Whether hopper_latent.py serves this cache."""
        layer, latent = self.layer, widths.shared and (widths.key, widths.value) == (576, 512)
        plain = len(set(layer.kv_heads)) == 1 and layer.window is None and layer.sinks_H is None
        whole = self.batch.block_size % 64 == 0 and self.q_THQ.is_contiguous() and self.q_THQ.itemsize == 2
        return latent and plain and whole and generation(self.out_THV.device) == 9

    def _parts(self, splits: int, rows: int, decode: bool) -> tuple[int, Tensor, Tensor]:
        """Splits, and what they leave: their sums, and their greatest logits and sums of weights. One has out_THV."""
        if splits == 1:
            return splits, self.out_THV, self.out_THV
        _, heads, width = self.out_THV.shape
        sums = torch.empty(splits, rows, heads, width, dtype=torch.float32, device=self.out_THV.device)
        # Zeros where prefill leaves rows out, those of single tokens: they are merged too, and written by decode.
        make = torch.empty if decode else torch.zeros
        return splits, sums, make(splits, rows, heads, 2, dtype=torch.float32, device=self.out_THV.device)

    def _tiles(
        self, grid: tuple[int, int], decode: bool, widths: Widths, cut: Tiling, tiles: HeadTiles, splits: int,
        sums: Tensor, stats: Tensor,
    ) -> None:  # fmt: skip
        layer, batch, (tokens, heads, _) = self.layer, self.batch, self.q_THQ.shape
        sequences, blocks = batch.tables_NM.shape
        rows, queries = (sequences, 1) if decode else (tokens, cut.rows // tiles.heads)
        bulk = self._descriptors(widths, cut)
        tile_kernel[(*grid, splits)](
            self.q_THQ, self.k_cache, self.v_cache, *bulk, self.out_THV, sums, stats, batch.starts_N, batch.lengths_N,
            batch.tables_NM, tiles.index_CG, layer.sinks_H, layer.scale, sequences, blocks, splits, rows, heads,
            *self.q_THQ.stride()[:2], *self.k_cache.stride()[:2], *self.v_cache.stride()[:2],
            DECODE=decode, SPLIT=splits > 1, SINKS=layer.sinks_H is not None, WINDOW=layer.window or 0,
            SHARED=widths.shared, BULK=bulk[0] is not None, APART=cut.apart, PAGE=batch.block_size,
            HEAD_TILES=tiles.each, G=tiles.heads, BQ=queries, R=cut.rows, B=cut.keys, Q=widths.key, QA=widths.first,
            QX=widths.rest, V=widths.value, VP=widths.values,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip

    def _decode_latent(self, tiles: int, splits: int, sums: Tensor, stats: Tensor) -> None:
        from soloist.kernels.hopper_latent import decode_latent  # Gluon is there where Triton is

        batch = self.batch
        decode_latent(
            self.q_THQ, self.k_cache, sums, stats, batch.starts_N, batch.lengths_N, batch.tables_NM, self.layer.scale,
            tiles, splits, batch.block_size,
        )  # fmt: skip

    def _merge(self, rows: int, decode: bool, splits: int, sums: Tensor, stats: Tensor) -> None:
        layer, (_, heads, width), padded = self.layer, self.out_THV.shape, _merged(splits)
        columns = min(_power_of_two(width), max(64, MERGED // padded))
        merge_kernel[(rows, heads, -(-width // columns))](
            sums, stats, self.batch.starts_N, layer.sinks_H, self.out_THV, splits, heads,
            DECODE=decode, SINKS=layer.sinks_H is not None, SP=padded, V=width, VB=columns,
            num_warps=1 if splits <= 16 else 4, **early(self.out_THV.device),
        )  # fmt: skip

    def _descriptors(self, widths: Widths, cut: Tiling) -> tuple[Any, Any, Any]:
        """Of keys, of what they have behind a power of two, and of values; nothing where tiles must be gathered."""
        exact = widths.first + widths.rest == widths.key and (widths.shared or widths.values == widths.value)
        if not (cut.bulk and exact and self.batch.block_size % cut.keys == 0 and self.layer.window is None):
            return None, None, None
        keys, values = (cache.flatten(1) for cache in (self.k_cache, self.v_cache))
        return (
            TensorDescriptor.from_tensor(keys, [cut.keys, widths.first]),
            TensorDescriptor.from_tensor(keys, [cut.keys, widths.rest]) if widths.rest else None,
            None if widths.shared else TensorDescriptor.from_tensor(values, [cut.keys, widths.values]),
        )

    def _is_shared(self) -> bool:
        """Whether values are the first columns of the keys, as in the latent cache of MLA."""
        k, v = self.k_cache, self.v_cache
        return k.data_ptr() == v.data_ptr() and k.stride() == v.stride() and v.shape[-1] <= k.shape[-1]


def _choices(context: int, decode: bool, partial: int) -> range:
    """Numbers of splits for the longest context, where a split's partial sums are `partial` numbers.

    In decode a program gets MOST_KEYS keys at most, so that one long sequence among short ones is not waited for.
    """
    most = max(1, min(context // FEWEST_KEYS, PARTIAL_BYTES // (4 * partial)))
    return range(min(most, -(-context // MOST_KEYS)) if decode else 1, most + 1)


def splits_of(programs: int, choices: range, processors: int, per_sm: int) -> int:
    """The fewest of some numbers of splits that give every processor `per_sm` programs or more, and all about as many.

    The most of them where none gives that many.
    """
    rounds = {n: -(-programs * n // processors) for n in choices}
    even = {n: programs * n / (processors * rounds[n]) for n in choices if rounds[n] >= per_sm}
    return next((n for n, share in even.items() if share > 0.9 * max(even.values())), choices[-1])


def _merged(splits: int) -> int:
    """The splits that a merge is compiled for: 2, 4, 16, 64 …"""
    return 2 if splits == 2 else 1 << 2 * -(-(splits - 1).bit_length() // 2)
