"""`soloist bench layer`: one MoE layer, dispatch to combine, beside its floor and beside itself without an exchange.

Shape legend: T tokens of a rank, D model width, F expert width, X expanded rows, S slots.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor

from soloist.bench.dispatchers import join_nccl, one_sided, padded, ragged
from soloist.bench.load import Load
from soloist.bench.portable import PortableRun
from soloist.bench.report import Ceilings, Point, commit, report
from soloist.bench.shapes import (
    ExpertsOption,
    ExpertWidthOption,
    ModelOption,
    RoutingOption,
    TokensOption,
    TopKOption,
    Wanted,
    WidthOption,
)
from soloist.bench.trace import Trace, TraceOption
from soloist.dispatch.base import ExpertBatch, SlotChoice
from soloist.dispatch.forms import LATENCY_TOKENS, Form, choose_form
from soloist.dispatch.one_sided import OneSidedDispatcher, Ticket
from soloist.kernels.experts import FP8_BLOCKS, FP8_ROWS, ExpertTiles, Fp8Experts, choose_tiles, swiglu_experts
from soloist.kernels.grouped_gemm import BLOCK
from soloist.probes.gpus import Bench, captured, in_ranks
from soloist.transport.base import Transport

LANES = 3  # a chunk being computed, one on its way there, one on its way home


@dataclass
class LayerRun:
    """The experts of a load, this rank's share of them, and a dispatcher for chunks of its tokens."""

    bench: Bench
    load: Load
    form: Form
    chunks: int = 1
    tiles: ExpertTiles | None = None

    def __post_init__(self) -> None:
        bench, load = self.bench, self.load
        self.x_TD, self.choice = load.inputs(bench.rank, bench.size, 0, bench.device)
        self.shape = load.shape(bench.size).fit(load.tokens // self.chunks)
        self.dispatcher: OneSidedDispatcher = one_sided(bench, self.shape, self.form, LANES if self.chunks > 1 else 1)
        self.gate_up, self.down = self.weights(bench.rank)
        used = bench.size * load.tokens * load.top_k / load.experts / self.chunks
        self.tiling = self.tiles or choose_tiles(used, load.width)

    def weights(self, rank: int) -> tuple[Tensor, Tensor]:
        """gate_up `[S, 2F, D]` and down `[S, D, F]` of a rank's experts."""
        load, device = self.load, self.bench.device
        generator = torch.Generator(device).manual_seed(31 + rank)
        slots = load.experts // self.bench.size

        def draw(rows: int, columns: int) -> Tensor:
            made = torch.empty(slots, rows, columns, dtype=load.dtype, device=device)
            for slot in made:
                slot.normal_(generator=generator).mul_(columns**-0.5)
            return made

        return draw(2 * load.width, load.d_model), draw(load.d_model, load.width)

    def experts(self, batch: ExpertBatch, x_XD: Tensor | None = None) -> Tensor:
        return swiglu_experts(batch.rows_RD, batch.row_X, batch.offsets_S, self.gate_up, self.down, self.tiling, x_XD)

    def parts(self) -> list[tuple[Tensor, SlotChoice]]:
        """The tokens in chunks."""
        choice, size = self.choice, self.load.tokens // self.chunks
        spans = [slice(i * size, (i + 1) * size) for i in range(self.chunks)]
        return [(self.x_TD[s], SlotChoice(choice.group_TK[s], choice.slot_TK[s], choice.weight_TK[s])) for s in spans]

    def forward(self) -> list[Tensor]:
        """out_TD by chunks: while one is computed, the next travels there and the last travels home."""
        parts, going, out = self.parts(), [], []
        arriving = self.dispatcher.start_dispatch(*parts[0])
        for i in range(self.chunks):
            following = self.dispatcher.start_dispatch(*parts[i + 1]) if i + 1 < self.chunks else None
            batch, x_XD = (arriving.wait(), None) if self.tiling.gather else arriving.wait_expanded()
            going.append(self.dispatcher.start_combine_expanded(self.experts(batch, x_XD), batch))
            if i:
                out.append(going[i - 1].wait())
            arriving = following
        return [*out, going[-1].wait()]

    def without_exchange(self) -> Callable[[], None]:
        """The same rows through the same expansion, experts and weighted sums, nothing travelling."""
        dispatcher = self.dispatcher
        batch = dispatcher.dispatch(*self.parts()[0])
        dispatcher.start_combine_expanded(self.experts(batch), batch).wait()
        ticket = batch.ticket
        assert isinstance(ticket, Ticket)

        def work() -> None:
            for _ in range(self.chunks):
                x_XD = None if self.tiling.gather else dispatcher.spread(batch)
                dispatcher._weigh(ticket, self.experts(batch, x_XD), weigh=True, push=False)

        return work

    def check(self, tokens: int = 48) -> float:
        """Relative error of some tokens against fp32. Asserts that it is bf16 rounding."""
        out_TD = torch.cat(self.forward())[:tokens].float()
        torch.cuda.synchronize()
        self.dispatcher.watch.check()
        want_TD = torch.zeros_like(out_TD)
        for group in range(self.bench.size):
            gate_up, down = self.weights(group) if group != self.bench.rank else (self.gate_up, self.down)
            for slot in range(len(down)):
                weight_T = self._weight_of(group, slot, tokens)
                chosen = weight_T.nonzero()[:, 0]
                gate, up = (self.x_TD[chosen].float() @ gate_up[slot].float().T).chunk(2, -1)
                want_TD[chosen] += weight_T[chosen, None] * ((F.silu(gate) * up) @ down[slot].float().T)
        error = float((out_TD - want_TD).norm() / want_TD.norm())
        assert error < 0.012, f"the layer's output differs by {error:.4f}"
        return error

    def _weight_of(self, group: int, slot: int, tokens: int) -> Tensor:
        choice = self.choice
        here_TK = (choice.group_TK[:tokens] == group) & (choice.slot_TK[:tokens] == slot)
        return (choice.weight_TK[:tokens] * here_TK).sum(1)

    def floor(self, ceilings: Ceilings) -> tuple[float, str]:
        """Seconds of the busiest rank with nothing for the exchange, and what they are spent on."""
        everybody = [choice for _, choice in self.load.everybody(self.bench.size, 0, self.bench.device)]
        group = torch.cat([choice.group_TK.flatten() for choice in everybody])
        slot = torch.cat([choice.slot_TK.flatten() for choice in everybody])
        d, slots = self.load.d_model, self.load.experts // self.bench.size
        loads = torch.bincount(group * slots + slot, minlength=self.bench.size * slots).view(-1, slots)
        flops = int(loads.sum(1).max()) * 6 * d * self.load.width
        weights = int((loads > 0).sum(1).max()) * 3 * d * self.load.width * self.load.dtype.itemsize
        compute, memory = flops / ceilings.flops, weights / ceilings.memory
        bound = f"{flops / 1e12:.3f} TFLOP" if compute > memory else f"{weights / 1e9:.2f} GB of weights"
        return max(compute, memory), bound

    def graph(self, work: Callable[[], object], calls: int) -> Callable[[], None]:
        def many() -> None:
            for _ in range(calls):
                work()

        return captured(many, warm_up=0)

    def measure(self, calls: int, pause_s: float, trace: Trace, name: str) -> tuple[float, float]:
        """Seconds of the layer and of the layer without its exchange, both as graphs of `calls`.

        `pause_s` between repeats keeps a GPU from lowering its clocks under a load that only a benchmark has.
        """
        alone = self.without_exchange()
        alone()
        forward, bare = self.graph(self.forward, calls), self.graph(alone, calls)
        seconds = self.bench.seconds(forward, bare, repeats=15, pause_s=pause_s)
        trace.shot(name, forward)
        return seconds[0] / calls, seconds[1] / calls


CASES = {
    "decode, two-expert": Load(128, 4096, 2, 16, width=16384),
    "decode, fine-grained": Load(128, 2048, 8, 128, width=768),
    "prefill, two-expert": Load(8192, 4096, 2, 16, width=16384),
    "prefill, fine-grained": Load(8192, 2048, 8, 128, width=768),
    "prefill, wide": Load(4096, 7168, 8, 64, width=2048),
}
FP8_CASE = "prefill, wide"
PAUSE_S = 0.03  # between repeats of prefill


@dataclass
class Measured:
    """Points of one machine."""

    bench: Bench
    chunks: int
    pause_s: float
    trace: Trace
    ceilings: Ceilings = field(default_factory=Ceilings)

    def point(self, what: str, variant: str, load: Load, seconds: float, floor: tuple[float, str], **more) -> Point:
        machine = f"{self.bench.size} x {torch.cuda.get_device_name(self.bench.device)}"
        return Point(what, variant, load.named | more, seconds, *floor, machine, commit())

    def case(self, name: str, load: Load, transport: Transport) -> Iterator[Point]:
        """The layer over NVLink, the same without its exchange, and the portable path."""
        decode = load.tokens <= LATENCY_TOKENS
        run = LayerRun(self.bench, load, choose_form(load.shape(self.bench.size)), 1 if decode else self.chunks)
        run.check()
        pause_s = 0.0 if decode else self.pause_s
        layer, bare = run.measure(10 if decode else 1, pause_s, self.trace, name)
        floor = run.floor(self.ceilings)
        exposed = f"{(layer - bare) / layer:.1%}"
        yield self.point(name, f"one-sided, {run.form.name}", load, layer, floor, chunks=run.chunks, exposed=exposed)
        for variant, dispatcher in {
            "NCCL, ragged, grouped_mm": ragged(transport, load),
            "NCCL, padded, grouped_mm, in a graph": padded(transport, load),
        }.items():
            portable = PortableRun(self.bench, load, dispatcher)
            work = portable.timed(portable.layer(run.gate_up, run.down))
            (seconds,) = self.bench.seconds(work, repeats=7, pause_s=pause_s)
            yield self.point(name, variant, load, seconds, floor)
            del portable, work
            torch.cuda.empty_cache()

    def fp8(self, name: str, load: Load) -> Iterator[Point]:
        """The experts alone, expansion and the quantisation of activations included: bf16 and both forms of fp8."""
        run = LayerRun(self.bench, load, choose_form(load.shape(self.bench.size)))
        batch = run.dispatcher.dispatch(run.x_TD, run.choice)
        rows = batch.rows_RD.clone(), batch.row_X.clone(), batch.offsets_S.clone()
        floor = run.floor(self.ceilings)
        work = {"bf16": lambda: swiglu_experts(*rows, run.gate_up, run.down, run.tiling)}
        want_XD = work["bf16"]()[: int(rows[2][-1])]
        for variant, width, tiles in (("a scale a row", None, FP8_ROWS), ("blocks of 128 × 128", BLOCK, FP8_BLOCKS)):
            experts = Fp8Experts.quantised(run.gate_up, run.down, width)
            error = (experts.forward(*rows, tiles)[: len(want_XD)] - want_XD).norm() / want_XD.norm()
            assert error < 0.08, f"fp8, {variant}: {error:.3f} from bf16"
            work[f"fp8, {variant}"] = partial(experts.forward, *rows, tiles)
        seconds = self.bench.seconds(*map(captured, work.values()), repeats=9, pause_s=self.pause_s)
        for variant, each in zip(work, seconds, strict=True):
            yield self.point(f"experts of {name}", variant, load, each, floor, rate=f"{seconds[0] / each:.2f} x bf16")


def measure(chunks: int, pause_s: float, wanted: Wanted, trace_file: Path | None) -> Iterator[Point]:
    """Joins the world, checks and times each case; called by every rank."""
    bench = Bench.join()
    transport = join_nccl(bench)
    measured = Measured(bench, chunks, pause_s, Trace.of(trace_file, bench.rank))
    cases = CASES
    if wanted:
        load = Load(**wanted.sizes(bench.size, with_experts=True))
        cases = {wanted.model or "as asked": load}
    for name, load in cases.items():
        yield from measured.case(name, load, transport)
        torch.cuda.empty_cache()
        dist.barrier()
    if not wanted:
        yield from measured.fp8(FP8_CASE, CASES[FP8_CASE])


def main(
    model: ModelOption = None,
    tokens: TokensOption = None,
    d_model: WidthOption = None,
    width: ExpertWidthOption = None,
    experts: ExpertsOption = None,
    top_k: TopKOption = None,
    routing: RoutingOption = None,
    chunks: Annotated[int, typer.Option(help="parts of a prefill that travel and are computed in turn")] = 1,
    pause_s: Annotated[float, typer.Option(help="between repeats of prefill, so that clocks stay up")] = PAUSE_S,
    lines: Annotated[Path | None, typer.Option(help="append JSON lines to this file")] = None,
    explain: Annotated[bool, typer.Option(help="say what bounds each point")] = False,
    trace: TraceOption = None,
) -> None:
    """Time a whole MoE layer on the GPUs of this host; started once, or once a rank by torchrun and the like."""
    if "RANK" not in os.environ:
        raise typer.Exit(in_ranks("soloist.bench.layer", sys.argv[1:]))
    points = list(measure(chunks, pause_s, Wanted(model, tokens, d_model, width, experts, top_k, routing), trace))
    if os.environ["RANK"] == "0":
        report(points, lines, explain)


if __name__ == "__main__":
    typer.run(main)
