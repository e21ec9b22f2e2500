"""`soloist bench exchange`: dispatch and combine by every form, beside NCCL, copies and what NVLink allows.

Shape legend: T tokens of a rank, D model width, R rows, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from soloist.bench.crossover import crossovers
from soloist.bench.dispatchers import join_nccl, one_sided, padded, ragged
from soloist.bench.exchange_run import ExchangeRun
from soloist.bench.floors import Machine
from soloist.bench.load import Load
from soloist.bench.portable import PortableRun
from soloist.bench.report import Point
from soloist.bench.shapes import Wanted
from soloist.bench.soak import soak
from soloist.bench.trace import Trace
from soloist.dispatch.forms import COPY, LATENCY, Form
from soloist.probes.gpus import Bench
from soloist.transport.base import Transport


def yardsticks(bench: Bench, load: Load) -> Iterator[tuple[str, float]]:
    """NCCL's equal-split exchange of as many rows as leave a rank, and a plain copy to the next rank."""
    rows = load.tokens * (bench.size - 1)
    sent = torch.randn(bench.size, rows // max(1, bench.size - 1), load.d_model, device=bench.device).to(load.dtype)
    got = torch.empty_like(sent)
    splits = [0 if peer == bench.rank else load.tokens for peer in range(bench.size)]
    flat, into = sent.view(-1, load.d_model)[:rows], got.view(-1, load.d_model)[:rows]
    (seconds,) = bench.seconds(lambda: dist.all_to_all_single(into, flat, splits, splits))
    yield "NCCL all_to_all_single", seconds
    window = bench.group.window(load.tokens * load.d_model * load.dtype.itemsize)
    peer = (bench.rank + 1) % bench.size
    target = window.view(0, (load.tokens, load.d_model), load.dtype, peer)
    (seconds,) = bench.seconds(lambda: target.copy_(sent[0]))
    yield "copy to the next rank", seconds


def forms(sms: int) -> dict[str, Form]:
    """Those of prefill, with all SMs and with so many."""
    return {
        "push": Form("push", programs=264, stages=2),
        f"push, {sms} SMs": Form("push", programs=sms, stages=4),
        "copy": COPY,
        f"copy, {sms} SMs": Form("copy", programs=sms, stages=4),
    }


PREFILL = [Load(4096, 7168, 8, 64), Load(4096, 7168, 8, 64, "skewed")]
WIRE = Load(32768, 4096, 1, 2, "remote")
DECODE = [Load(128, 7168, 8, 64), Load(16, 7168, 8, 64)]


@dataclass
class Measured:
    """Points of one machine, with what they have in common."""

    bench: Bench
    trace: Trace
    machine: Machine
    sms: int = 32  # of the limited forms

    def point(self, what: str, variant: str, load: Load, seconds: float, row_bytes: int) -> Point:
        """Against the rows of the busiest rank over its link."""
        rows = max(load.remote_rows([choice for _, choice in load.everybody(self.bench.size, 0, self.bench.device)]))
        link = self.machine.ceilings.link
        bound = f"{rows * row_bytes / 1e6:.1f} MB at {link / 1e9:.0f} GB/s"
        return self.machine.point(what, variant, load.named, seconds, rows * row_bytes / link, bound)

    def prefill(self, load: Load, fp8: bool = False) -> Iterator[Point]:
        """Dispatch and combine apart, by every form, and the yardsticks."""
        dispatcher = one_sided(self.bench, load.shape(self.bench.size, fp8), COPY, lanes=1)
        sent = load.d_model * (1 if fp8 else load.dtype.itemsize)
        for name, form in forms(self.sms).items():
            run = ExchangeRun(self.bench, load, dispatcher.fit(load.tokens, form))
            run.check()
            dispatch, combine = run.halves(self.trace, f"{name} {load.routing}{' fp8' if fp8 else ''}")
            yield self.point("dispatch fp8" if fp8 else "dispatch", name, load, dispatch, sent)
            if not fp8:
                yield self.point("combine", name, load, combine, sent)
        if not fp8:
            for name, seconds in yardsticks(self.bench, load):
                yield self.point("yardstick", name, load, seconds, sent)

    def decode(self, load: Load, fp8: bool) -> Iterator[Point]:
        """Both halves in a graph, as the decode experts use them (rows through the index) and with rows expanded."""
        dispatcher = one_sided(self.bench, load.shape(self.bench.size, fp8), LATENCY, lanes=1)
        run = ExchangeRun(self.bench, load, dispatcher)
        run.check()
        sent = load.d_model * (3 if fp8 else 2 * load.dtype.itemsize)
        for expand in (False, True):
            name = ("fp8" if fp8 else "bf16") + (", rows expanded" if expand else ", rows through the index")
            yield self.point("there and back", name, load, run.round_trip(expand), sent)

    def portable(self, load: Load, transport: Transport) -> Iterator[Point]:
        """Both halves over NCCL: exactly the rows needed, and equal splits in one round and in four."""
        sent = load.d_model * load.dtype.itemsize
        compared = {
            "NCCL, ragged": ragged(transport, load),
            "NCCL, padded, in a graph": padded(transport, load),
            "the same in 4 rounds": padded(transport, load, rounds=4),
        }
        for name, dispatcher in compared.items():
            run = PortableRun(self.bench, load, dispatcher)
            run.check()
            for what, seconds in run.halves():
                yield self.point(what, name, load, seconds, sent)

    def table(self, preset: str, routing: str | None, transport: Transport) -> Iterator[Point]:
        """What docs/benchmarks.md shows; `routing`: of all its loads but that of the wire."""
        many, few = _routed(PREFILL, routing), _routed(DECODE, routing)
        if preset in ("prefill", "all"):
            for load in many:
                yield from self.prefill(load)
            yield from self.prefill(many[0], fp8=True)
            yield from self.portable(many[0], transport)
        if preset in ("wire", "all"):
            yield from self.prefill(WIRE)
        if preset in ("decode", "all"):
            for load in few:
                yield from self.decode(load, fp8=True)
                yield from self.decode(load, fp8=False)
            yield from self.portable(few[0], transport)
        if preset == "forms":
            yield from crossovers(self.bench, self.point)

    def case(self, load: Load, transport: Transport) -> Iterator[Point]:
        """Everything that there is to say of one load."""
        if load.is_decode:
            yield from self.decode(load, fp8=True)
            yield from self.decode(load, fp8=False)
        else:
            yield from self.prefill(load)
            yield from self.prefill(load, fp8=True)
        yield from self.portable(load, transport)


def _routed(loads: list[Load], routing: str | None) -> list[Load]:
    """Each once, where they differ in nothing else."""
    return loads if routing is None else list(dict.fromkeys(replace(load, routing=routing) for load in loads))


def measure(preset: str, wanted: Wanted, trace_file: Path | None, calls: int, sms: int) -> Iterator[Point]:
    """Joins the world and measures; called by every rank. The calls that are compared come last."""
    bench = Bench.join()
    transport = join_nccl(bench)
    if preset != "none" or wanted:
        machine = Machine.measured(bench)
        yield from machine.points()
        measured = Measured(bench, Trace.of(trace_file, bench.rank), machine, sms)
        if wanted:
            yield from measured.case(Load(**wanted.sizes(bench.size)), transport)
        else:
            yield from measured.table(preset, wanted.routing, transport)
    if calls:
        soak(bench, transport, calls)
