"""A step as tensors: what every layer of the decoder needs to know about the tokens before it.

Shape legend: T tokens of the step, N sequences (chunks), M blocks of the longest table, W rotated elements of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from soloist.kernels.paged_attention import PagedBatch
from soloist.models.rope import Rope
from soloist.planner.halves import first_half
from soloist.scheduling.request import Chunk, StepBatch


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
    halved: bool  # also of its form: it goes as two halves, one of which computes while the other one travels
    name: str  # "step 17", for errors
    peak: int  # the most tokens of any attention group in the step
    live_T: Tensor | None = None  # bool: False where a row is padding; None: no row is
    static: bool = False  # shapes only are known to the host, the rows padded to a fixed number

    @property
    def tokens(self) -> int:
        return len(self.ids_T)

    @classmethod
    def of(
        cls,
        batch: StepBatch,
        block_size: int,
        rope: Rope,
        device: torch.device,
        dtype: torch.dtype,
        replicated: bool = False,
        halved: bool = False,
    ) -> StepInput:
        """The batch's chunks, one after the other. `dtype` is that of the activations."""
        chunks = batch.chunks
        positions_T = _concatenate([np.arange(c.start, c.stop) for c in chunks])
        tables_NM = tables(chunks)
        sequence_T = np.repeat(np.arange(len(chunks)), [len(c.tokens) for c in chunks])
        slots_T = tables_NM[sequence_T, positions_T // block_size] * block_size + positions_T % block_size
        starts = [0, *np.cumsum([len(c.tokens) for c in chunks]).tolist()]
        wanted = [
            np.arange(start, stop) if chunk.scores_prompt else np.arange(stop - 1, stop)
            for chunk, start, stop in zip(chunks, starts[:-1], starts[1:], strict=True)
            if chunk.samples or chunk.scores_prompt
        ]
        ids_T = _concatenate([np.asarray(c.tokens, dtype=np.int64) for c in chunks])
        lengths = [c.stop for c in chunks]
        numbers = [ids_T, slots_T, positions_T, _concatenate(wanted), tables_NM, np.array(starts), np.array(lengths)]
        ids_T, slots_T, positions_T, rows_C, tables_NM, starts_N, lengths_N = to_device(numbers, device)
        paged = PagedBatch(starts, lengths, tables_NM, block_size, starts_N, lengths_N)
        cos, sin = rope.angles(positions_T.long(), dtype)
        return cls(
            ids_T.long(), slots_T.long(), paged, cos, sin, rows_C.long(), replicated, halved, f"step {batch.step}",
            max(batch.peak, batch.tokens),
        )  # fmt: skip

    def micro_batches(self) -> list[StepInput]:
        """What goes through the layers by itself: the step, or its halves. Halves have no rows for logits."""
        if not self.halved:
            return [self]
        cut, peak = first_half(self.tokens), first_half(self.peak)
        return [self._rows(0, cut, peak), self._rows(cut, self.tokens, peak)]

    def _rows(self, first: int, stop: int, peak: int) -> StepInput:
        """Some of the tokens. A sequence may be cut: what its first tokens write is there when the others attend."""
        rows, live_T = slice(first, stop), self.live_T
        paged = self.paged.rows(first, stop, bounds=self.static and self.ids_T.is_cuda)
        return replace(
            self, ids_T=self.ids_T[rows], cache_slots_T=self.cache_slots_T[rows], paged=paged, cos=self.cos[rows],
            sin=self.sin[rows], logits_rows=self.logits_rows[:0], halved=False, peak=peak,
            live_T=None if live_T is None else live_T[rows],
        )  # fmt: skip


def tables(chunks: Sequence[Chunk]) -> np.ndarray:
    """int32 [N, M]: the block tables of some chunks, padded with 0."""
    tables_NM = np.zeros((len(chunks), max((len(c.blocks) for c in chunks), default=0)), dtype=np.int32)
    for row, chunk in zip(tables_NM, chunks, strict=True):
        row[: len(chunk.blocks)] = chunk.blocks
    return tables_NM


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Integers of any shapes as int32 tensors on the device, in one copy that the host does not wait for."""
    packed = torch.empty(sum(array.size for array in arrays), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate([array.ravel() for array in arrays], out=packed.numpy(), casting="unsafe")
    pieces = packed.to(device, non_blocking=True).split([array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
