"""Attention over a paged KV cache, in plain PyTorch: the definition, and what the CPU runs.

Shape legend: T tokens of the step, N sequences, H query heads, C KV heads, L tokens of a sequence's context,
Q and V widths of keys and values, M blocks of the longest table.
"""

from __future__ import annotations

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

    @property
    def counts(self) -> list[int]:
        """Tokens of the step of each sequence."""
        return [stop - start for start, stop in zip(self.query_starts[:-1], self.query_starts[1:], strict=True)]

    def slots(self, index: int) -> Tensor:
        """Rows of the flat cache that hold a sequence's context, in order of position."""
        blocks = -(-self.lengths[index] // self.block_size)
        first = self.tables_NM[index, :blocks, None] * self.block_size
        inside = torch.arange(self.block_size, device=first.device)
        return (first + inside).flatten()[: self.lengths[index]]


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
    sinks = int(sinks_H is not None)
    for i, length in enumerate(batch.lengths):
        start, stop = batch.query_starts[i], batch.query_starts[i + 1]
        queries, slots = stop - start, batch.slots(i)
        around, below = (sinks, filled_keys(sinks + length) - sinks - length), missing_rows(q_THQ[start:stop, 0])
        k_HLQ = F.pad(k_cache[slots][:, kv_head_H].transpose(0, 1), (0, 0, *around))
        v_HLV = F.pad(v_cache[slots][:, kv_head_H].transpose(0, 1), (0, 0, *around))
        q_HTQ = F.pad(q_THQ[start:stop].transpose(0, 1), (0, 0, 0, below))
        mask = F.pad(_mask(queries, length, window, q_THQ), (*around, 0, below), value=float("-inf"))
        if sinks_H is not None:
            # The sink is the logit of a first key of zeros: it takes weight and gives nothing.
            mask = mask.repeat(len(sinks_H), 1, 1)
            mask[:, :, 0] = sinks_H[:, None]
        mixed = F.scaled_dot_product_attention(q_HTQ[None], k_HLQ[None], v_HLV[None], attn_mask=mask[None], scale=scale)
        out_THV[start:stop] = mixed[0, :, :queries].transpose(0, 1)
    return out_THV


def _mask(queries: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """[1, queries, length], 0 where a query sees a key, −inf elsewhere; the queries are the last positions."""
    query = torch.arange(length - queries, length, device=like.device)[:, None]
    key = torch.arange(length, device=like.device)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return torch.zeros(1, queries, length, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
