"""`soloist bench layer`: one MoE layer, dispatch to combine, beside its floor and beside itself without an exchange.

Shape legend: T tokens of a rank, D model width, F expert width, X expanded rows, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from soloist.bench.dispatchers import join_nccl, padded, ragged
from soloist.bench.floors import Machine
from soloist.bench.layer_parts import parts_of
from soloist.bench.layer_run import LayerRun, repeated
from soloist.bench.load import Load
from soloist.bench.portable import PortableRun
from soloist.bench.report import Point
from soloist.bench.shapes import Wanted
from soloist.bench.shared_experts import SharedRun, Sum
from soloist.bench.trace import Trace
from soloist.dispatch.forms import COPY, LATENCY, PUSH, choose_form
from soloist.errors import ConfigurationError
from soloist.kernels.experts import FP8_BLOCKS, FP8_ROWS, Fp8Experts, choose_tiles, fits, swiglu_experts
from soloist.kernels.grouped_gemm import BLOCK
from soloist.probes.gpus import Bench, OneGpu, captured
from soloist.transport.base import Transport
from soloist.transport.nvlink import Channels, NvlinkTransport

CASES = {
    "decode, two-expert": Load(128, 4096, 2, 16, width=16384),
    "decode, fine-grained": Load(128, 2048, 8, 128, width=768),
    "prefill, two-expert": Load(8192, 4096, 2, 16, width=16384),
    "prefill, fine-grained": Load(8192, 2048, 8, 128, width=768),
    "prefill, wide": Load(4096, 7168, 8, 64, width=2048),
}
# All ranks share every expert: its width is cut.
SHARED = ("decode, two-expert", "decode, fine-grained", "prefill, two-expert")
FP8_CASE = "prefill, wide"
FORM_TOKENS = (512, 1024, 2048, 4096)  # of a rank: where the forms of the exchange cross


@dataclass
class Measured:
    """Points of one machine."""

    bench: Bench
    chunks: int
    pause_s: float
    trace: Trace
    machine: Machine
    transport: Transport
    parts: bool = False

    def layer(self, name: str, load: Load) -> Iterator[Point]:
        """Over NVLink, and over NCCL; where all ranks share the experts, also for tokens that all of them have."""
        run = LayerRun(self.bench, load, choose_form(load.shape(self.bench.size)), 1 if load.is_decode else self.chunks)
        floor = run.floor(self.machine.ceilings)
        yield self._one_sided(name, run, floor)
        if self.parts:
            yield from parts_of(run, name, self.machine, self.pause_s, fp8=name == FP8_CASE)
        if load.tp == 1:
            yield from self._portable(name, run, floor)
        else:
            yield from self._replicated(name, run)

    def by_form(self, name: str, load: Load) -> Iterator[Point]:
        """By every form of the exchange, the chosen one marked."""
        chosen = choose_form(load.shape(self.bench.size))
        for form in (LATENCY, PUSH, COPY):
            run = LayerRun(self.bench, load, form)
            point = self._one_sided(name, run, run.floor(self.machine.ceilings))
            yield replace(point, variant=f"{point.variant}{', chosen' if form == chosen else ''}")
            del run
            torch.cuda.empty_cache()

    def _one_sided(self, name: str, run: LayerRun, floor: tuple[float, str]) -> Point:
        """With the share of its time by which it takes longer than without its exchange."""
        run.check()
        layer, bare = run.measure(_calls(run.load), self._pause_s(run.load), self.trace, name)
        shape = run.load.named | {"chunks": run.chunks, "exposed": f"{(layer - bare) / layer:.1%}"}
        return self.machine.point(name, f"one-sided, {run.form.name}", shape, layer, *floor)

    def _replicated(self, name: str, run: LayerRun) -> Iterator[Point]:
        shared = SharedRun(run)
        floor = shared.floor(self.machine.ceilings)
        ways = self._sums(shared.x_TD)
        for variant, seconds in shared.measure(ways, _calls(run.load), self._pause_s(run.load)):
            yield self.machine.point(name, variant, run.load.named, seconds, *floor)

    def _sums(self, x_TD: Tensor) -> dict[str, Sum]:
        """NCCL's ring, and one launch over NVLink where it serves so many tokens."""
        channels = Channels(self.bench.group.window(Channels.size(self.bench.size)))
        nvlink = NvlinkTransport(self.transport, channels, self.bench.watch)
        ways: dict[str, Sum] = {"tokens on all ranks, summed by NCCL": self.transport.all_reduce}
        if nvlink.serves(x_TD):
            ways["tokens on all ranks, summed in one launch"] = nvlink.all_reduce
        return ways

    def _pause_s(self, load: Load) -> float:
        return 0.0 if load.is_decode else self.pause_s

    def _portable(self, name: str, run: LayerRun, floor: tuple[float, str]) -> Iterator[Point]:
        """The same over NCCL with `F.grouped_mm`."""
        load = run.load
        for variant, dispatcher in {
            "NCCL, ragged, grouped_mm": ragged(self.transport, load),
            "NCCL, padded, grouped_mm, in a graph": padded(self.transport, load),
        }.items():
            portable = PortableRun(self.bench, load, dispatcher)
            work = portable.timed(portable.layer(run.gate_up, run.down))
            (seconds,) = self.bench.seconds(work, repeats=7, pause_s=self._pause_s(load))
            yield self.machine.point(name, variant, load.named, seconds, *floor)
            del portable, work
            torch.cuda.empty_cache()


def fp8_experts(bench: OneGpu, machine: Machine, name: str, load: Load, pause_s: float) -> Iterator[Point]:
    """The experts alone, expansion and the quantisation of activations included: bf16 and both forms of fp8."""
    run = LayerRun(bench, load, choose_form(load.shape(bench.size)))
    batch = run.arrived()
    rows = batch.rows_RD.clone(), batch.row_X.clone(), batch.offsets_S.clone()
    floor = run.floor(machine.ceilings)
    work = {"bf16": lambda: swiglu_experts(*rows, run.gate_up, run.down, run.tiling)}
    want_XD = work["bf16"]()[: int(rows[2][-1])]
    for variant, width, tiles in (("a scale a row", None, FP8_ROWS), ("blocks of 128 × 128", BLOCK, FP8_BLOCKS)):
        experts = Fp8Experts.quantised(run.gate_up, run.down, width)
        error = (experts.forward(*rows, tiles)[: len(want_XD)] - want_XD).norm() / want_XD.norm()
        assert error < 0.08, f"fp8, {variant}: {error:.3f} from bf16"
        work[f"fp8, {variant}"] = partial(experts.forward, *rows, tiles)
    seconds = bench.seconds(*map(captured, work.values()), repeats=9, pause_s=pause_s)
    for variant, each in zip(work, seconds, strict=True):
        shape = load.named | {"rate": f"{seconds[0] / each:.2f} x bf16"}
        yield machine.point(f"experts of {name}", variant, shape, each, *floor)


def _calls(load: Load) -> int:
    """In a graph."""
    return 10 if load.is_decode else 1


def measure(
    wanted: Wanted, chunks: int, pause_s: float, parts: bool, forms: bool, trace_file: Path | None
) -> Iterator[Point]:
    """Joins the world, checks and times each case; called by every rank."""
    bench = Bench.join()
    transport, machine = join_nccl(bench), Machine.measured(bench)
    yield from machine.points()
    measured = Measured(bench, chunks, pause_s, Trace.of(trace_file, bench.rank), machine, transport, parts)
    if forms:
        for name, load in _by_tokens(wanted, bench.size):
            yield from measured.by_form(name, load)
        return
    for name, load in _cases(wanted, bench.size).items():
        yield from measured.layer(name, load)
        torch.cuda.empty_cache()
        dist.barrier()
    if not wanted and wanted.routing is None:
        yield from fp8_experts(bench, machine, FP8_CASE, CASES[FP8_CASE], pause_s)
        for name in SHARED:
            torch.cuda.empty_cache()
            yield from measured.layer(f"{name}, shared experts", replace(CASES[name], tp=bench.size))


def measure_alone(wanted: Wanted, ranks: int, pause_s: float, parts: bool) -> Iterator[Point]:
    """On one GPU what one of `ranks` computes: expansion, experts and weighted sums, without an exchange."""
    bench = OneGpu.alone(ranks)
    machine = Machine.measured(bench)
    yield from machine.points()
    for name, load in _cases(wanted, ranks).items():
        run = LayerRun(bench, load, choose_form(load.shape(ranks)))
        work = repeated(run.without_exchange(), _calls(load))
        pause = 0.0 if load.is_decode else pause_s
        (seconds,) = bench.seconds(work, repeats=15, pause_s=pause)
        seconds /= _calls(load)
        yield machine.point(name, f"a rank of {ranks}, no exchange", load.named, seconds, *run.floor(machine.ceilings))
        if parts:
            yield from parts_of(run, name, machine, pause, fp8=name == FP8_CASE)
        del run, work
        torch.cuda.empty_cache()
    if not wanted and wanted.routing is None:
        yield from fp8_experts(bench, machine, FP8_CASE, CASES[FP8_CASE], pause_s)


def _cases(wanted: Wanted, ranks: int) -> dict[str, Load]:
    """Raises ConfigurationError for experts that the kernels' tiles do not divide."""
    if not wanted:
        return {name: replace(load, routing=wanted.routing or load.routing) for name, load in CASES.items()}
    load = Load(**wanted.sizes(ranks, with_experts=True))
    tiles = choose_tiles(ranks * load.tokens * load.top_k / load.experts, load.width)
    if not fits(tiles, load.d_model, load.width):
        remedy = f"no kernel serves experts of {load.width} x {load.d_model}; take multiples of 256 for both"
        raise ConfigurationError.of("--width", load.width, remedy)
    return {wanted.model or "as asked": load}


def _by_tokens(wanted: Wanted, ranks: int) -> Iterator[tuple[str, Load]]:
    """The shapes of prefill, or the one that is asked for, with the tokens that are asked for or some of each size."""
    sizes = FORM_TOKENS if wanted.tokens is None else (wanted.tokens,)
    for name, load in _cases(wanted, ranks).items():
        if not name.startswith("decode"):
            yield from ((name, replace(load, tokens=tokens)) for tokens in sizes)
