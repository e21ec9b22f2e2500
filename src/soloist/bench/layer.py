"""`soloist bench layer`: one MoE layer, dispatch to combine, beside its floor and beside itself without an exchange.

Shape legend: T tokens of a rank, D model width, F expert width, X expanded rows, S slots.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import Tensor

from soloist.bench.exchange import one_sided
from soloist.bench.load import Load
from soloist.bench.report import Ceilings, Point, commit, report
from soloist.dispatch.base import ExpertBatch, SlotChoice
from soloist.dispatch.forms import Form, choose_form
from soloist.dispatch.one_sided import OneSidedDispatcher, Ticket
from soloist.kernels.experts import ExpertTiles, choose_tiles, swiglu_experts
from soloist.probes.gpus import Bench, captured, in_ranks

DECODE_TOKENS = 512
LANES = 3  # a chunk being computed, one on its way there, one on its way home


@dataclass
class LayerRun:
    """The experts of a load, this rank's share of them, and a dispatcher for chunks of its tokens."""

    bench: Bench
    load: Load
    width: int  # F
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
        self.tiling = self.tiles or choose_tiles(used)

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

        return draw(2 * self.width, load.d_model), draw(load.d_model, self.width)

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
        """The same rows through the same experts and weighted sums, nothing travelling."""
        dispatcher = self.dispatcher
        batch = dispatcher.start_dispatch(*self.parts()[0]).wait()
        dispatcher.start_combine_expanded(self.experts(batch), batch).wait()
        ticket = batch.ticket
        assert isinstance(ticket, Ticket)

        def work() -> None:
            for _ in range(self.chunks):
                dispatcher._weigh(ticket, self.experts(batch), weigh=True, push=False)

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
        everybody = [
            self.load.inputs(rank, self.bench.size, 0, self.bench.device)[1] for rank in range(self.bench.size)
        ]
        group = torch.cat([choice.group_TK.flatten() for choice in everybody])
        slot = torch.cat([choice.slot_TK.flatten() for choice in everybody])
        d, slots = self.load.d_model, self.load.experts // self.bench.size
        loads = torch.bincount(group * slots + slot, minlength=self.bench.size * slots).view(-1, slots)
        flops = int(loads.sum(1).max()) * 6 * d * self.width
        weights = int((loads > 0).sum(1).max()) * 3 * d * self.width * self.load.dtype.itemsize
        compute, memory = flops / ceilings.flops, weights / ceilings.memory
        bound = f"{flops / 1e12:.3f} TFLOP" if compute > memory else f"{weights / 1e9:.2f} GB of weights"
        return max(compute, memory), bound

    def measure(self, calls: int = 1, repeats: int = 15, pause_s: float = 0.0) -> tuple[float, float]:
        """Seconds of the layer and of the layer without its exchange, both as graphs.

        `pause_s` between repeats keeps a GPU from lowering its clocks under a load that only a benchmark has.
        """

        def times(work: Callable[[], object]) -> Callable[[], None]:
            def many() -> None:
                for _ in range(calls):
                    work()

            return captured(many, warm_up=0)

        alone = self.without_exchange()
        alone()
        layer, bare = self.bench.seconds(times(self.forward), times(alone), repeats=repeats, pause_s=pause_s)
        return layer / calls, bare / calls


CASES = {
    "decode, two-expert": (Load(128, 4096, 2, 16), 16384),
    "decode, fine-grained": (Load(128, 2048, 8, 128), 768),
    "prefill, two-expert": (Load(8192, 4096, 2, 16), 16384),
    "prefill, fine-grained": (Load(8192, 2048, 8, 128), 768),
    "prefill, wide": (Load(4096, 7168, 8, 64), 2048),
}
PAUSE_S = 0.03  # between repeats of prefill


def measure(chunks: int, pause_s: float) -> Iterator[Point]:
    """Joins the world, checks and times each case; called by every rank."""
    bench, ceilings = Bench.join(), Ceilings()
    machine = f"{bench.size} x {torch.cuda.get_device_name(bench.device)}"
    for name, (load, width) in CASES.items():
        decode = load.tokens <= DECODE_TOKENS
        run = LayerRun(bench, load, width, choose_form(load.shape(bench.size)), 1 if decode else chunks)
        run.check()
        layer, bare = run.measure(calls=10 if decode else 1, pause_s=0.0 if decode else pause_s)
        floor, bound = run.floor(ceilings)
        shape = {"T": load.tokens, "D": load.d_model, "F": width, "E": load.experts, "K": load.top_k}
        shape |= {"chunks": run.chunks, "exposed": f"{(layer - bare) / layer:.1%}"}
        yield Point(name, f"one-sided, {run.form.name}", shape, layer, floor, bound, machine, commit())
        del run
        torch.cuda.empty_cache()
        dist.barrier()


def main(
    chunks: Annotated[int, typer.Option(help="parts of a prefill that travel and are computed in turn")] = 1,
    pause_s: Annotated[float, typer.Option(help="between repeats of prefill, so that clocks stay up")] = PAUSE_S,
    lines: Annotated[Path | None, typer.Option(help="append JSON lines to this file")] = None,
    explain: Annotated[bool, typer.Option(help="say what bounds each point")] = False,
) -> None:
    """Time a whole MoE layer on the GPUs of this host; started once, or once a rank by torchrun and the like."""
    if "RANK" not in os.environ:
        raise typer.Exit(in_ranks("soloist.bench.layer", sys.argv[1:]))
    points = list(measure(chunks, pause_s))
    if os.environ["RANK"] == "0":
        report(points, lines, explain)


if __name__ == "__main__":
    typer.run(main)
