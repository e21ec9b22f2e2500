"""Steps of fixed shape: captured once in a CUDA graph, replayed with other numbers.

A decoding step of up to B sequences, one token each, is one graph for the smallest bucket that holds it: input, layers
with their exchange, logits, and the choice of the next tokens. A mixed step, in which some sequences have several
tokens, is one for the smallest bucket of T tokens, where the host would take longer to start its kernels than the GPU
to run them. Attention is cut for the longest context that a graph may meet, so where sequences may grow beyond
SHORT_CONTEXT, decoding steps in which none has have graphs of their own, and mixed steps in which one has are not
captured. All that differs between two replays lies in one buffer of integers, filled on the host and copied once. Rows
that no sequence uses are padding: their keys and values go to a block that nobody owns. On a CPU nothing is captured:
the same function is called.

Shape legend: T tokens, B sequences (T where each has one token), M blocks of the longest table, D model width,
V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
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
from soloist.planner.host import SHORT_CONTEXT, bucket_of
from soloist.scheduling.request import StepBatch

_CPU = torch.device("cpu")
WARM_UP = 1  # calls before a capture: kernels are compiled, buffers made
# int64 numbers, which index tensors: of a token, then of a sequence.
OF_TOKEN, OF_SEQUENCE = ("id", "source", "position", "slot"), ("place", "row")
SHORT = ("length", "key", "key2", "temperature")  # int32 of a sequence; the last one holds a float's bits


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

    def __init__(self, tokens: int, sequences: int, blocks: int, device: torch.device) -> None:
        long = {name: tokens for name in OF_TOKEN} | {name: sequences for name in OF_SEQUENCE}
        short = {name: sequences for name in SHORT} | {"starts": sequences + 1, "live": tokens}
        short["tables"] = sequences * blocks
        longs, shorts = sum(long.values()), sum(short.values())
        self._all = torch.zeros(longs + -(-shorts // 2), dtype=torch.int64, device=device)
        ints = self._all[longs:].view(torch.int32)
        self._parts: dict[str, Tensor] = dict(zip(long, self._all[:longs].split([*long.values()]), strict=True))
        self._parts |= dict(zip(short, ints[:shorts].split([*short.values()]), strict=True))
        self.keys_B2 = ints[sequences : 3 * sequences].view(2, sequences).T
        self.tables_BM = self["tables"].view(sequences, blocks)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def arrays(self) -> dict[str, np.ndarray]:
        """All but the tables, on the host."""
        return {name: part.numpy() for name, part in self._parts.items() if name != "tables"}

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
        tokens: int,
        sequences: int,
        shape: Shape,
        replicated: bool,
        halved: bool,
        rope: Rope,
        feedback: Feedback,
        stage: Callable[[StepInput, Tensor | None, Tensor | None], Tensor],
        x_tD: Tensor | None,
        logits_BV: Tensor | None,
    ) -> None:
        """`x_tD`: where the stage before leaves its result, None on the first stage. logits_BV: where this stage leaves
        its logits, None if it is not the last."""
        self.tokens, self.sequences, self.shape = tokens, sequences, shape
        self.replicated, self.halved = replicated, halved
        self.rope, self.feedback, self.stage, self.x_tD, self.logits_BV = rope, feedback, stage, x_tD, logits_BV
        blocks = shape.blocks_per_sequence
        self._host, self._numbers = (_Numbers(tokens, sequences, blocks, device) for device in (_CPU, shape.device))
        self._held: list[tuple[int, ...]] = [()] * sequences  # what stands in each row of the tables
        self._used = 0
        # What the host cuts launches by: one token a sequence; in a mixed step also a sequence of several.
        self.paged = PagedBatch(
            [*range(sequences), tokens], [blocks * shape.block_size] * sequences, self._numbers.tables_BM,
            shape.block_size, self._numbers["starts"], self._numbers["length"],
        )  # fmt: skip
        self._graph: torch.cuda.CUDAGraph | None = None
        self.fill(StepBatch(0), np.zeros(0, np.int64), np.zeros(0, np.int64))

    # -- the host's part --------------------------------------------------------------------------------------------
    def fill(self, batch: StepBatch, sources: np.ndarray, places: np.ndarray) -> None:
        """Put a batch's numbers where the next replay reads them. `sources` and `places`: see `Feedback`."""
        chunks, used, size = batch.chunks, len(batch.chunks), self.shape.block_size
        self._fill_tables(batch)
        row = self._host.arrays()
        for values in row.values():
            values[:] = 0
        row["source"][:], row["place"][:], row["length"][:] = -1, self.feedback.nowhere, 1
        row["slot"][:] = self.shape.scratch * size
        counts = np.fromiter((len(c.tokens) for c in chunks), np.int64, used)
        ends, live = np.cumsum(counts), int(counts.sum())
        first, of = ends - counts, np.repeat(np.arange(used), counts)
        before = np.fromiter((c.start for c in chunks), np.int64, used)
        positions = np.arange(live) + (before - first)[of]
        row["id"][:live] = np.fromiter(chain.from_iterable(c.tokens for c in chunks), np.int64, live).clip(min=0)
        row["source"][first], row["position"][:live], row["live"][:live] = sources, positions, 1
        row["place"][:used], row["row"][:used], row["length"][:used] = places, ends - 1, before + counts
        row["starts"][1 : used + 1], row["starts"][used + 1 :] = ends, live
        if self.tokens == self.sequences:  # padding has a token a sequence, too
            row["starts"][:], row["row"][:] = np.arange(self.tokens + 1), np.arange(self.tokens)
        tables_BM = self._host.tables_BM.numpy()
        row["slot"][:live] = tables_BM[of, positions // size].astype(np.int64) * size + positions % size
        for index, chunk in enumerate(chunks):
            if chunk.samples and chunk.params and chunk.params.temperature > 0:
                row["key"][index], row["key2"][index] = key_of(chunk)
                row["temperature"].view(np.float32)[index] = chunk.params.temperature
        if self.shape.device.type == "cpu":  # in a graph these are bounds
            self.paged.lengths[:], self.paged.query_starts[:] = row["length"].tolist(), row["starts"].tolist()
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
        self.out = self.stage(step, self.x_tD, self.logits_BV)
        if self.logits_BV is not None:
            fused = self.out.is_cuda and AVAILABLE
            temperature_B1, keys_B2 = self._numbers["temperature"].view(torch.float32)[:, None], self._numbers.keys_B2
            token_B, margin_B = (choose_fused if fused else choose)(self.out, temperature_B1, keys_B2)
            self.feedback.ids.index_copy_(0, self._numbers["place"], token_B)
            self.chosen = torch.stack([token_B.double(), margin_B.double()])

    def _input(self) -> StepInput:
        numbers, tokens = self._numbers, self.tokens
        source_T = numbers["source"]
        ids_T = torch.where(source_T < 0, numbers["id"], self.feedback.ids[source_T.clamp(min=0)])
        cos, sin = self.rope.angles(numbers["position"], self.shape.dtype)
        return StepInput(
            ids_T, numbers["slot"], self.paged, cos, sin, numbers["row"], self.replicated, self.halved,
            f"a step of {tokens} rows", tokens, live_T=numbers["live"].bool(), static=True,
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
        mixed: Sequence[int],
        widths: Sequence[int],
        sequences: int,
        make: Callable[[int, int, int], StaticStep],
        device: torch.device,
    ) -> None:
        """buckets: sequences of decoding steps. mixed: tokens of the others, with up to `sequences` sequences.

        `make`: from tokens, sequences and width. The largest come first, so that the others fit into their memory.
        """
        self.buckets, self.mixed, self.widths = tuple(buckets), tuple(mixed), tuple(widths)
        self._mixed = {tokens: make(tokens, min(sequences, tokens - 1), widths[0]) for tokens in reversed(mixed)}
        self._decodes = {(rows, width): make(rows, rows, width) for rows in buckets[::-1] for width in widths[::-1]}
        self.steps, self.device = [*self._mixed.values(), *self._decodes.values()], device

    def capture(self) -> None:
        """On a GPU. Called by all ranks together."""
        if self.device.type == "cuda" and self.steps:
            stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
            stream.wait_stream(torch.cuda.current_stream(self.device))
            for step in self.steps:
                step.capture(pool, stream)
            torch.cuda.current_stream(self.device).wait_stream(stream)

    def bucket(self, batch: StepBatch) -> int | None:
        """Rows that all ranks take a batch for, None for as many as it has: for that its agreed fields are enough."""
        rows = max(batch.peak, 1)
        if not batch.decodes:
            return bucket_of(self.mixed, rows)
        return next((bucket for bucket in self.buckets if bucket >= rows), None)

    def of(self, batch: StepBatch) -> StaticStep | None:
        """The graph for a batch, None where these ranks run it without one: that concerns nobody but those that share
        its sequences. Other groups run one of as many rows then."""
        if (rows := self.bucket(batch)) is None:
            return None
        chunks, blocks = batch.chunks, max((len(chunk.blocks) for chunk in batch.chunks), default=0)
        if batch.decodes:
            return self._decodes[rows, self.widths[bisect_left(self.widths, blocks)]]
        step = self._mixed[rows]
        fits = blocks <= self.widths[0] and len(chunks) <= step.sequences
        return step if fits and not any(chunk.scores_prompt for chunk in chunks) else None
