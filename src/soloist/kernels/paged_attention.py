"""Attention over a paged KV cache, in plain PyTorch: the definition, and what the CPU runs.

Shape legend: T tokens of the step, N sequences, G those of them that one product serves, H query heads, C KV heads,
L tokens of a sequence's context, Q and V widths of keys and values, M blocks of the longest table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soloist.kernels.linear import filled_keys, missing_rows


@dataclass(frozen=True)
class PagedBatch:
    """Which tokens of a step belong to which sequence, and where their context lies."""

    query_starts: list[int]  # N + 1: rows of the step's tokens
    lengths: list[int]  # N: context including this step's tokens
    tables_NM: Tensor  # int32: block ids, rows padded with 0
    block_size: int
    starts_N: Tensor  # int32, N + 1, and
    lengths_N: Tensor  # int32, N: the two lists beside the tables, for kernels

    @classmethod
    def of(cls, query_starts: list[int], lengths: list[int], tables_NM: Tensor, block_size: int) -> PagedBatch:
        """The lists are copied to where the tables are; the host does not wait."""
        numbers = torch.tensor(query_starts + lengths, dtype=torch.int32).to(tables_NM.device, non_blocking=True)
        starts_N, lengths_N = numbers.split([len(query_starts), len(lengths)])
        return cls(query_starts, lengths, tables_NM.int(), block_size, starts_N, lengths_N)

    def rows(self, first: int, stop: int, bounds: bool = False) -> PagedBatch:
        """Some rows of the step's tokens, and the sequences that they belong to, each up to its last of these rows.

        bounds: the two lists do not say what the tensors hold, unless each sequence has one token.
        """
        sequences = len(self.lengths)
        if bounds and sequences < self.query_starts[-1]:
            members, starts, lengths = slice(0, sequences), [0, *[1] * (sequences - 1), stop - first], self.lengths
        else:
            spans = zip(self.query_starts[:-1], self.query_starts[1:], strict=True)
            held = [i for i, (start, end) in enumerate(spans) if max(start, first) < min(end, stop)]
            members = slice(held[0], held[-1] + 1) if held else slice(0, 0)
            starts = [min(max(at, first), stop) - first for at in self.query_starts[members.start : members.stop + 1]]
            ends = self.query_starts[members.start + 1 : members.stop + 1]
            lengths = [length - max(0, end - stop) for length, end in zip(self.lengths[members], ends, strict=True)]
        starts_N = self.starts_N[members.start : members.stop + 1]
        left_N = (starts_N[1:] - stop).clamp(min=0)  # tokens behind these rows
        return PagedBatch(
            starts, lengths, self.tables_NM[members].clone(), self.block_size, starts_N.clamp(first, stop) - first,
            self.lengths_N[members] - left_N,
        )  # fmt: skip

    @property
    def counts(self) -> list[int]:
        """Tokens of the step of each sequence."""
        return [stop - start for start, stop in zip(self.query_starts[:-1], self.query_starts[1:], strict=True)]

    def slots(self, members: Sequence[int], keys: int) -> Tensor:
        """slots_GL: rows of the flat cache that hold the contexts of sequences G, in order of position.

        The row of position 0 stands again where a context has fewer than `keys` tokens.
        """
        device = self.tables_NM.device
        lengths_G = torch.tensor([self.lengths[i] for i in members], device=device)
        position_L = torch.arange(keys, device=device)
        position_GL = position_L.where(position_L < lengths_G[:, None], 0)
        blocks_GL = self.tables_NM[list(members)].gather(1, position_GL // self.block_size)
        return blocks_GL * self.block_size + position_GL % self.block_size

    def alike(self, before: int) -> dict[tuple[int, int], list[int]]:
        """Sequences that one product serves, by their tokens of the step and by how many keys their contexts are
        filled up to, `before` others standing in front of them."""
        found: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for i, (count, length) in enumerate(zip(self.counts, self.lengths, strict=True)):
            found[count, filled_keys(before + length) - before].append(i)
        return found


def paged_attention(
    q_THQ: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: PagedBatch,
    kv_head_H: Tensor,
    scale: float,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention of each sequence's new tokens over its whole context. Returns [T, H, V].

    k_cache: [slots, C, Q], v_cache: [slots, C, V], this step's keys and values already written. `kv_head_H` names the
    KV head of each query head. `window`: tokens that a position sees, itself included. `sinks_H`: a logit a head that
    takes part in the softmax's denominator only.
    """
    out_THV = q_THQ.new_empty(*q_THQ.shape[:2], v_cache.shape[-1])
    if out_THV.numel() == 0:  # a rank without heads
        return out_THV
    device, sinks = q_THQ.device, int(sinks_H is not None)
    for (queries, keys), members in batch.alike(sinks).items():
        rows_GT = torch.tensor([[batch.query_starts[i]] for i in members], device=device)
        rows_GT = rows_GT + torch.arange(queries, device=device)
        at = batch.slots(members, keys)[:, None].long(), kv_head_H[:, None]
        # The sink is the logit of a first key of zeros: it takes weight and gives nothing.
        k_GHLQ, v_GHLV = (F.pad(cache[at], (0, 0, sinks, 0)) if sinks else cache[at] for cache in (k_cache, v_cache))
        q_GHTQ = q_THQ[rows_GT].transpose(1, 2)
        q_GHTQ = F.pad(q_GHTQ, (0, 0, 0, missing_rows(q_GHTQ)))
        first_G = [batch.lengths[i] - queries for i in members]
        mask_GHTL = _mask(first_G, q_GHTQ.shape[2], keys, window, q_THQ)
        if sinks_H is not None:
            sinks_GHT1 = sinks_H[:, None, None].expand(len(members), -1, q_GHTQ.shape[2], 1).to(mask_GHTL.dtype)
            mask_GHTL = torch.cat([sinks_GHT1, mask_GHTL.expand(-1, len(sinks_H), -1, -1)], dim=-1)
        mixed_GHTV = F.scaled_dot_product_attention(q_GHTQ, k_GHLQ, v_GHLV, attn_mask=mask_GHTL, scale=scale)
        out_THV[rows_GT] = mixed_GHTV[:, :, :queries].transpose(1, 2)
    return out_THV


def _mask(first_G: list[int], queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """[G, 1, queries, keys], 0 where a query sees a key, −inf elsewhere; queries are positions from `first_G` on."""
    query_GT1 = (
        torch.tensor(first_G, device=like.device)[:, None, None] + torch.arange(queries, device=like.device)[:, None]
    )
    key_L = torch.arange(keys, device=like.device)
    seen_GTL = key_L <= query_GT1
    if window is not None:
        seen_GTL &= key_L > query_GT1 - window
    return torch.zeros(seen_GTL.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen_GTL, float("-inf"))[
        :, None
    ]
