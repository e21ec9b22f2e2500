"""The kernels of an expert layer, each alone beside its own bound.

Shape legend: R rows, D model width, F expert width, X expanded rows, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from soloist.bench.floors import Machine
from soloist.bench.layer_run import LayerRun
from soloist.bench.report import Point
from soloist.dispatch.base import ExpertBatch
from soloist.kernels.experts import FP8_BLOCKS, FP8_ROWS, ExpertTiles, Fp8Experts, expand_rows
from soloist.kernels.grouped_gemm import BLOCK, grouped_gemm
from soloist.kernels.quantise import quantise
from soloist.probes.gpus import captured

FP8_RATE = 2.0  # of the tensor cores, against bf16


@dataclass(frozen=True)
class Part:
    """Some work of a layer, and what it has to do at least."""

    name: str
    work: Callable[[], object]
    flops: float = 0.0  # counted as of bf16
    bytes: float = 0.0

    def point(self, case: str, load: dict[str, object], machine: Machine, seconds: float) -> Point:
        compute, memory = self.flops / machine.ceilings.flops, self.bytes / machine.ceilings.memory
        bound = f"{self.flops / 1e12:.3f} TFLOP" if compute > memory else f"{self.bytes / 1e6:.0f} MB"
        return machine.point(f"part of {case}", self.name, load, seconds, max(compute, memory), bound)


def parts_of(run: LayerRun, case: str, machine: Machine, pause_s: float, fp8: bool = False) -> Iterator[Point]:
    """Every part as a graph on all ranks, with pauses in between as the whole layer has them."""
    batch = run.arrived()
    parts = list(_parts(run, batch))
    if fp8:
        parts += [*_fp8_parts(run, batch, None, FP8_ROWS), *_fp8_parts(run, batch, BLOCK, FP8_BLOCKS)]
    seconds = run.bench.seconds(*(captured(part.work) for part in parts), repeats=9, pause_s=pause_s)
    if not run.others:
        run.dispatcher.start_combine_expanded(run.experts(batch), batch).wait()
    for part, each in zip(parts, seconds, strict=True):
        yield part.point(case, run.load.named, machine, each)


def _parts(run: LayerRun, batch: ExpertBatch) -> Iterator[Part]:
    dispatcher, load = run.dispatcher, run.load
    used = int(batch.offsets_S[-1])
    rows = len(batch.row_X[:used].unique())
    row_bytes = load.d_model * load.dtype.itemsize
    gate_up, down, offsets_S = run.gate_up, run.down, batch.offsets_S
    if run.tiling.gather:
        x, index = batch.rows_RD, batch.row_X
    else:
        x, index = dispatcher.spread(batch), None
        yield Part("expand", lambda: dispatcher.spread(batch), bytes=(rows + used) * row_bytes)
    hidden_XF = grouped_gemm(x, gate_up, offsets_S, run.tiling.gate_up, index, gated=True)
    yield Part(
        "gate and up", lambda: grouped_gemm(x, gate_up, offsets_S, run.tiling.gate_up, index, gated=True),
        2.0 * used * gate_up[0].numel(), gate_up.nbytes,
    )  # fmt: skip
    y_XD = grouped_gemm(hidden_XF, down, offsets_S, run.tiling.down)
    yield Part(
        "down", lambda: grouped_gemm(hidden_XF, down, offsets_S, run.tiling.down), 2.0 * used * down[0].numel(),
        down.nbytes,
    )  # fmt: skip
    yield Part("weighted sum", lambda: run.weigh(batch, y_XD), bytes=(rows + used) * row_bytes)


def _fp8_parts(run: LayerRun, batch: ExpertBatch, width: int | None, tiles: ExpertTiles) -> Iterator[Part]:
    """Of experts with fp8 weights: the products, and the quantisation of what goes into them."""
    experts = Fp8Experts.quantised(run.gate_up, run.down, width)
    form = "a scale a row" if width is None else f"blocks of {width}"
    rows_RD, row_X, offsets_S = batch.rows_RD.clone(), batch.row_X.clone(), batch.offsets_S.clone()
    used = int(offsets_S[-1])

    def gate_up():
        return grouped_gemm(
            q_XD, experts.gate_up_SND, offsets_S, tiles.gate_up, gated=True, scale_R=scale_XB,
            scale_SN=experts.gate_up_scale, dtype=rows_RD.dtype,
        )  # fmt: skip

    def down():
        return grouped_gemm(
            q_XF, experts.down_SDF, offsets_S, tiles.down, scale_R=hidden_scale_XB, scale_SN=experts.down_scale,
            dtype=rows_RD.dtype,
        )  # fmt: skip

    q_RD, scale_RB = quantise(rows_RD, width)
    q_XD, scale_XB = expand_rows(q_RD, row_X, offsets_S, scale_RB)
    hidden_XF = gate_up()
    q_XF, hidden_scale_XB = quantise(hidden_XF, width, offsets_S)
    yield Part(f"fp8, {form}: quantise rows", lambda: quantise(rows_RD, width), bytes=1.5 * rows_RD.nbytes)
    yield Part(
        f"fp8, {form}: expand", lambda: expand_rows(q_RD, row_X, offsets_S, scale_RB),
        bytes=(len(rows_RD) + used) * run.load.d_model,
    )  # fmt: skip
    yield Part(f"fp8, {form}: gate and up", gate_up, 2.0 * used * run.gate_up[0].numel() / FP8_RATE)
    hidden_bytes = 1.5 * used * hidden_XF.shape[1] * hidden_XF.itemsize
    yield Part(f"fp8, {form}: quantise hidden", lambda: quantise(hidden_XF, width, offsets_S), bytes=hidden_bytes)
    yield Part(f"fp8, {form}: down", down, 2.0 * used * run.down[0].numel() / FP8_RATE)
