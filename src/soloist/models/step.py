"""A step as tensors: what every layer of the decoder needs to know about the tokens before it.

Shape legend: T tokens of the step, N sequences (chunks), M blocks of the longest table, W rotated elements of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soloist.kernels.paged_attention import PagedBatch
from soloist.models.rope import Rope
from soloist.scheduling.request import StepBatch


@dataclass(frozen=True)
class StepInput:
    """One attention group's tokens in a step."""

    ids_T: Tensor  # int64
    cache_slots_T: Tensor  # int64: row of the flat KV cache that each token is written to
    paged: PagedBatch
    cos: Tensor  # [T, 1, W/2]
    sin: Tensor
    logits_rows: Tensor  # int64: tokens whose logits are wanted
    replicated: bool  # the form of the step (models/layers.py, TokenSplit)
    name: str  # "step 17", for errors
    peak: int  # the most tokens of any attention group in the step
    live_T: Tensor | None = None  # bool: False where a row is padding; None: no row is
    static: bool = False  # shapes only are known to the host: one token a sequence, the rows padded to a fixed number

    @property
    def tokens(self) -> int:
        return len(self.ids_T)

    @classmethod
    def of(
        cls, batch: StepBatch, block_size: int, rope: Rope, replicated: bool, device: torch.device, dtype: torch.dtype
    ) -> StepInput:
        """The batch's chunks, one after the other. `dtype` is that of the activations."""
        chunks = batch.chunks
        positions_T = _concatenate([np.arange(c.start, c.stop) for c in chunks])
        blocks = [np.asarray(c.blocks, dtype=np.int64) for c in chunks]
        slots_T = _concatenate(
            [
                table[np.arange(c.start, c.stop) // block_size] * block_size + np.arange(c.start, c.stop) % block_size
                for c, table in zip(chunks, blocks, strict=True)
            ]
        )
        tables_NM = np.zeros((len(chunks), max((len(table) for table in blocks), default=0)), dtype=np.int32)
        for row, table in zip(tables_NM, blocks, strict=True):
            row[: len(table)] = table
        starts = [0, *np.cumsum([len(c.tokens) for c in chunks]).tolist()]
        wanted = [
            np.arange(start, stop) if chunk.scores_prompt else np.arange(stop - 1, stop)
            for chunk, start, stop in zip(chunks, starts[:-1], starts[1:], strict=True)
            if chunk.samples or chunk.scores_prompt
        ]
        ids_T = _concatenate([np.asarray(c.tokens, dtype=np.int64) for c in chunks])
        paged = PagedBatch.of(starts, [c.stop for c in chunks], _to(tables_NM, device), block_size)
        cos, sin = rope.angles(_to(positions_T, device), dtype)
        rows = _to(_concatenate(wanted), device)
        return cls(
            _to(ids_T, device), _to(slots_T, device), paged, cos, sin, rows, replicated, f"step {batch.step}",
            max(batch.peak, batch.tokens),
        )  # fmt: skip


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
