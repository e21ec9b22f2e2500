"""Decoding steps of fixed shape: captured once in a CUDA graph, replayed with other numbers.

A step of up to B sequences, one token each, is one graph for the smallest bucket B that holds it: input, layers with
their exchange, logits, and the choice of the next tokens. Attention is cut for the longest context that a graph may
meet, so where sequences may grow beyond SHORT_CONTEXT, steps in which none has have graphs of their own. All that
differs between two replays lies in one buffer of integers, filled on the host and copied once. Rows that no sequence
uses are padding: their keys and values go to a block that nobody owns. On a CPU nothing is captured: the same function
is called.

Shape legend: B rows, M blocks of the longest table, D model width, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soloist.engine.feedback import Feedback
from soloist.engine.sampler import key_of
from soloist.kernels.choose import choose
from soloist.kernels.choose_triton import choose_fused
from soloist.kernels.language import AVAILABLE
from soloist.kernels.paged_attention import PagedBatch
from soloist.models.rope import Rope
from soloist.models.step import StepInput
from soloist.scheduling.request import StepBatch

_CPU = torch.device("cpu")
SHORT_CONTEXT = 4096  # tokens: what a program of the attention takes without a split
WARM_UP = 2  # calls before a capture: kernels are compiled, buffers made
LONG = ("id", "source", "position", "slot", "place")  # int64 numbers of a row: what indexes tensors
SHORT = ("length", "live", "key", "key2", "temperature")  # int32; the last one holds a float's bits


@dataclass(frozen=True)
class Shape:
    """What all buckets of a rank have in common."""

    blocks_per_sequence: int
    block_size: int
    scratch: int  # the block of rows that are padding
    device: torch.device
    dtype: torch.dtype


class _Numbers:
    """All numbers of a step side by side in one tensor, so that one copy takes them to the device."""

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        shorts = len(SHORT) * rows + rows * blocks
        self._all = torch.zeros(len(LONG) * rows + -(-shorts // 2), dtype=torch.int64, device=device)
        long, short = self._all[: len(LONG) * rows], self._all[len(LONG) * rows :].view(torch.int32)
        self._rows: dict[str, Tensor] = dict(zip(LONG, long.view(len(LONG), rows), strict=True))
        self._rows |= dict(zip(SHORT, short[: len(SHORT) * rows].view(len(SHORT), rows), strict=True))
        self.keys_B2 = short[SHORT.index("key") * rows :][: 2 * rows].view(2, rows).T
        self.tables_BM = short[len(SHORT) * rows : shorts].view(rows, blocks)

    def __getitem__(self, name: str) -> Tensor:
        return self._rows[name]

    def take(self, other: _Numbers) -> None:
        """A copy of what stands in `other` now; the host may write there again at once."""
        sent = other._all
        if self._all.is_cuda:
            sent = torch.empty(sent.shape, dtype=sent.dtype, pin_memory=True)
            np.copyto(sent.numpy(), other._all.numpy())
        self._all.copy_(sent, non_blocking=True)


class StaticStep:
    """One bucket. `stage` computes a step: the logits on the last stage, what goes to the next one elsewhere.

    All buckets leave their logits in the same memory: whoever reads them does before the next replay.
    """

    def __init__(
        self,
        rows: int,
        shape: Shape,
        replicated: bool,
        rope: Rope,
        feedback: Feedback,
        stage: Callable[[StepInput, Tensor | None, Tensor | None], Tensor],
        x_tD: Tensor | None,
        logits_BV: Tensor | None,
    ) -> None:
        """`x_tD`: where the stage before leaves its result, None on the first stage. logits_BV: where this stage leaves
        its logits, None if it is not the last."""
        self.rows, self.shape, self.replicated = rows, shape, replicated
        self.rope, self.feedback, self.stage, self.x_tD, self.logits_BV = rope, feedback, stage, x_tD, logits_BV
        self._host, self._numbers = (_Numbers(rows, shape.blocks_per_sequence, d) for d in (_CPU, shape.device))
        self._held: list[tuple[int, ...]] = [()] * rows  # what stands in each row of the tables
        self._used = 0
        longest = shape.blocks_per_sequence * shape.block_size
        starts_N = torch.arange(rows + 1, dtype=torch.int32, device=shape.device)
        self.paged = PagedBatch(
            list(range(rows + 1)), [longest] * rows, self._numbers.tables_BM, shape.block_size, starts_N,
            self._numbers["length"],
        )  # fmt: skip
        self._rows_B = torch.arange(rows, device=shape.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.fill(StepBatch(0), np.zeros(0, np.int64), np.zeros(0, np.int64))

    # -- the host's part --------------------------------------------------------------------------------------------
    def fill(self, batch: StepBatch, sources: np.ndarray, places: np.ndarray) -> None:
        """Put a batch's numbers where the next replay reads them. `sources` and `places`: see `Feedback`."""
        chunks, used, size = batch.chunks, len(batch.chunks), self.shape.block_size
        self._fill_tables(batch)
        row = {name: self._host[name].numpy() for name in (*LONG, *SHORT)}
        for values in row.values():
            values[:] = 0
        row["source"][:], row["place"][:], row["length"][:] = -1, self.feedback.nowhere, 1
        row["slot"][:] = self.shape.scratch * size
        positions = np.fromiter((c.start for c in chunks), np.int64, used)
        row["id"][:used] = np.fromiter((max(c.tokens[0], 0) for c in chunks), np.int64, used)
        row["source"][:used], row["place"][:used] = sources, places
        row["position"][:used], row["length"][:used], row["live"][:used] = positions, positions + 1, 1
        tables_BM = self._host.tables_BM.numpy()
        row["slot"][:used] = tables_BM[np.arange(used), positions // size].astype(np.int64) * size + positions % size
        for index, chunk in enumerate(chunks):
            if chunk.samples and chunk.params and chunk.params.temperature > 0:
                row["key"][index], row["key2"][index] = key_of(chunk)
                row["temperature"].view(np.float32)[index] = chunk.params.temperature
        if self.shape.device.type == "cpu":  # in a graph these are bounds
            self.paged.lengths[:] = row["length"].tolist()
        self._numbers.take(self._host)

    def _fill_tables(self, batch: StepBatch) -> None:
        tables_BM = self._host.tables_BM.numpy()
        for index, chunk in enumerate(batch.chunks):
            if self._held[index] != chunk.blocks:
                tables_BM[index, : len(chunk.blocks)] = chunk.blocks
                self._held[index] = chunk.blocks
        used, before, self._used = len(batch.chunks), self._used, len(batch.chunks)
        self._held[used:before] = [()] * (before - used)
        tables_BM[used:, 0] = self.shape.scratch

    # -- the device's part ------------------------------------------------------------------------------------------
    def compute(self) -> None:
        """What is captured. Leaves `out`, and where it chooses, `chosen`: tokens and margins, as doubles [2, B]."""
        step = self._input()
        self.ids_B, self.out = step.ids_T, self.stage(step, self.x_tD, self.logits_BV)
        if self.logits_BV is not None:
            fused = self.out.is_cuda and AVAILABLE
            temperature_B1, keys_B2 = self._numbers["temperature"].view(torch.float32)[:, None], self._numbers.keys_B2
            token_B, margin_B = (choose_fused if fused else choose)(self.out, temperature_B1, keys_B2)
            self.feedback.ids.index_copy_(0, self._numbers["place"], token_B)
            self.chosen = torch.stack([token_B.double(), margin_B.double()])

    def _input(self) -> StepInput:
        numbers, rows = self._numbers, self.rows
        source_B = numbers["source"]
        ids_B = torch.where(source_B < 0, numbers["id"], self.feedback.ids[source_B.clamp(min=0)])
        cos, sin = self.rope.angles(numbers["position"], self.shape.dtype)
        return StepInput(
            ids_B, numbers["slot"], self.paged, cos, sin, self._rows_B, self.replicated,
            f"a step of {rows} rows", rows, live_T=numbers["live"].bool(), static=True,
        )  # fmt: skip

    def capture(self, pool: Any, stream: torch.cuda.Stream) -> None:
        """Called by all ranks for the same buckets in the same order."""
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.compute()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.compute()

    def replay(self) -> None:
        if self._graph is None:
            self.compute()
        else:
            self._graph.replay()


def widths(longest: int, block_size: int) -> tuple[int, ...]:
    """Blocks of the longest table of a graph: for contexts up to SHORT_CONTEXT, and for all."""
    return tuple(sorted({-(-min(longest, SHORT_CONTEXT) // block_size), -(-longest // block_size)}))


class StaticSteps:
    """All buckets of a rank, in one pool of memory: they never run at once."""

    def __init__(
        self,
        buckets: Sequence[int],
        widths: Sequence[int],
        make: Callable[[int, int], StaticStep],
        device: torch.device,
    ) -> None:
        """`make`: from rows and width. Captures the largest first, so that the others fit into its memory."""
        self.buckets, self.widths = tuple(buckets), tuple(widths)
        self._steps = {(rows, width): make(rows, width) for rows in reversed(buckets) for width in reversed(widths)}
        if device.type == "cuda" and self._steps:
            stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream(device))
            for step in self._steps.values():
                step.capture(pool, stream)
            torch.cuda.current_stream(device).wait_stream(stream)

    def of(self, batch: StepBatch) -> StaticStep | None:
        """For a batch that all groups run in this form; None where they run it otherwise.

        All ranks take the same bucket; the width concerns nobody but the ranks that share these sequences.
        """
        at = bisect_left(self.buckets, max(batch.peak, 1))
        if not batch.decodes or at == len(self.buckets):
            return None
        blocks = max((len(chunk.blocks) for chunk in batch.chunks), default=0)
        return self._steps[self.buckets[at], self.widths[bisect_left(self.widths, blocks)]]
